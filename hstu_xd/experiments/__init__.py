"""Many runs and what they say together: variants, ablation, comparison, report."""
