"""Endpoints: one module per family of paths."""
