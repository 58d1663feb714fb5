"""The stand-alone trainer: settings from gin, deterministic steps, resumable runs."""
