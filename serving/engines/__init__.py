"""Inference engines; one plug-in a folder."""
