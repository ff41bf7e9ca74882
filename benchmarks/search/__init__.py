"""Benchmarks of the search over compression recipes."""
