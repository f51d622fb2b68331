"""AdamW and clipping by the global norm (clauses 7.7 to 7.9), as torch defines both.

Arithmetic is in the dtype of the master weights, float32 or wider. Tensors are dicts by name.
"""

from collections.abc import Mapping

import numpy as np

from bridge.contract import AdamW
from bridge_ref.precision import wide

Tensors = Mapping[str, np.ndarray]
CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


def global_norm(grads: Tensors) -> float:
    """The square root of the sum of squares over all tensors, in float64."""
    return float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values())))


def clip_by_global_norm(
    grads: Tensors, max_norm: float | None
) -> tuple[dict[str, np.ndarray], float]:
    """Clause 7.7: `g * min(1, max_norm / (norm + 1e-6))`, and the norm before. None: unclipped."""
    norm = global_norm(grads)
    scale = 1.0 if max_norm is None else min(1.0, max_norm / (norm + CLIP_EPS))
    return {name: g * scale for name, g in grads.items()}, norm


class AdamWState:
    """Master weights, first and second moments of the trained tensors, and the step count."""

    def __init__(self, weights: Tensors) -> None:
        """Masters start at the model's own values, moments at 0 (clause 7.9)."""
        self.step = 0
        self.master = {name: wide(w).copy() for name, w in weights.items()}
        self.exp_avg = {name: np.zeros_like(w) for name, w in self.master.items()}
        self.exp_avg_sq = {name: np.zeros_like(w) for name, w in self.master.items()}

    def update(self, grads: Tensors, options: AdamW) -> None:
        """Clause 7.8, at step t = 1, 2, ... for weight p with gradient g:

        p = p - lr weight_decay p
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
        """
        self.step += 1
        beta1, beta2 = options.betas
        for name, p in self.master.items():
            g, m, v = wide(grads[name]), self.exp_avg[name], self.exp_avg_sq[name]
            p = p - options.lr * options.weight_decay * p
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            m_hat, v_hat = m / (1 - beta1**self.step), v / (1 - beta2**self.step)
            self.master[name] = p - options.lr * m_hat / (np.sqrt(v_hat) + options.eps)
            self.exp_avg[name], self.exp_avg_sq[name] = m, v

    def state(self) -> dict[str, np.ndarray]:
        """All of its arrays, by the names that `array` knows them by."""
        keys = [f"{kind}.{name}" for kind, name, _ in self._arrays()]
        return {key: self.array(key) for key in ("step", *keys)}

    def array(self, key: str) -> np.ndarray:
        """`step`, or `master.NAME`, `exp_avg.NAME` or `exp_avg_sq.NAME` of a trained tensor."""
        kind, _, name = key.partition(".")
        return getattr(self, kind)[name].copy() if name else np.array(self.step, np.int64)

    def restore(self, state: Tensors) -> None:
        """Take over what `state` gave: the same names and shapes."""
        self.step = int(state["step"])
        for kind, name, a in self._arrays():
            getattr(self, kind)[name] = state[f"{kind}.{name}"].astype(a.dtype)

    def _arrays(self) -> list[tuple[str, str, np.ndarray]]:
        kinds = ("master", "exp_avg", "exp_avg_sq")
        return [(kind, name, a) for kind in kinds for name, a in getattr(self, kind).items()]
