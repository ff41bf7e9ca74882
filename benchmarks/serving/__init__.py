"""Serving beside the engines people would pick instead; `python -m benchmarks.serving`."""
