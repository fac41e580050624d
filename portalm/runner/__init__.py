"""From a step plan to its outcomes: host arrays, sampling parameters, captured steps."""
