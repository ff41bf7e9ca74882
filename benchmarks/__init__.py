"""One module a claim: `python -m benchmarks.NAME --json OUT` measures and prints it."""
