"""The MLX backend (Metal, CUDA, CPU)."""
