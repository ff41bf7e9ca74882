"""The REST API: OpenAI schemas, keys, errors."""
