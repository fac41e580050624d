"""Requests in, tokens out: the engine, its process, and the client side of both."""
