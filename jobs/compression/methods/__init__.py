"""Compression methods; one plug-in a file."""
