"""Benchmarks of compression: quality, size and speed."""
