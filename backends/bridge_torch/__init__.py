"""The PyTorch backend (CUDA, CPU)."""

from bridge_torch.threads import import_torch

import_torch()
