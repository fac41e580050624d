"""The OpenAI-compatible HTTP server.

Routers read request bodies (schemas) and write replies; `state` is what they share.
"""
