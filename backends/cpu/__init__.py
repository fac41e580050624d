"""The CPU: native kernels over paged KV blocks."""
