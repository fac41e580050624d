"""A device that answers at once: tests of scheduling and overhead."""
