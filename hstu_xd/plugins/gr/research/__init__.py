"""The plug-in for generative-recommenders' research trainer."""
