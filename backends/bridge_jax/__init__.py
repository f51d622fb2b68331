"""The JAX backend (TPU, CUDA, CPU)."""
