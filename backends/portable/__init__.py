"""Torch defaults for every part of the seam that needs no device of its own."""
