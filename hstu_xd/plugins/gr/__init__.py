"""The plug-in for generative-recommenders, without side effects at import."""
