"""The OpenAI-compatible HTTP server: one file an endpoint family."""
