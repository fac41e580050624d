"""Checkpoints as named tensors, whatever their format."""
