"""An example backend in plain NumPy float32, for porters to read and to copy."""
