"""Where text comes from; one plug-in a file."""
