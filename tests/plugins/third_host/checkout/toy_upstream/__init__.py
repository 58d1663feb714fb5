"""A stand-in for a codebase of somebody else's, of the test's own writing."""
