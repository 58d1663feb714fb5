"""What a few new rows of users read of their memories, in one call for all users of a step."""
