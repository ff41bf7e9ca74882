"""Quality, latency and the gate."""
