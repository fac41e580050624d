"""Requests, block ids and token counts: plain Python, no torch, no numpy, no text."""
