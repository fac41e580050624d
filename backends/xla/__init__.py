"""XLA devices (TPUs), by JAX; model functions written in torch are traced through torchax."""
