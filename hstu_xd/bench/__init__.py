"""Benchmarks with a correctness gate: a provider that computes something else gets no time."""
