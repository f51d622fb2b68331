"""The PyTorch backend (CUDA, CPU)."""
