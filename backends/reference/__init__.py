"""The meaning of every operation, in plain torch."""
