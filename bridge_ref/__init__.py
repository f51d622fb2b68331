"""The NumPy reference: float64, written to be read."""
