"""The XLA backend: TPUs, and XLA's own clients for the host and GPUs, through JAX."""
