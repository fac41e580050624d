"""The engine, its process, and its client: requests in, tokens out."""
