"""Our own engine: continuous batching over the shared decoder."""
