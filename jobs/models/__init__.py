"""Model families; one plug-in a file."""
