"""The conformance kit for backends: checks, a float64 reference, and reports."""
