"""The null device: simulated, computes nothing; for tests."""
