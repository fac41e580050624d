"""Torch defaults for everything in the backend interface that torch can do on any device."""
