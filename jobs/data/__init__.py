"""Text to packed tokens: sources, tokenizer, shards, sampler."""
