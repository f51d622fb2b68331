"""The MLX backend (Metal, CUDA, CPU).

float32 is meant as such: unless the user says otherwise, MLX may not multiply it in TF32, as it
does by default where a GPU has units for that. MLX reads the variable once, at its first product.
"""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")
