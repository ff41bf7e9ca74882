"""Search over compression recipes with Ray Tune."""
