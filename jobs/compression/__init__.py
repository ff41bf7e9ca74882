"""Recipes, methods and the compressed format on disk."""
