"""The kit that checks a backend: float64 reference, cases, laws, planted faults, report."""
