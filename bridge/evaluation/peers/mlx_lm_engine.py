"""mlx-lm: its own batch generation, which reads the prompt once for each row."""

import time
from typing import Any

from bridge.evaluation.peers.engine import Call, Decoded, Setup


class MlxLmSession:
    """A model of mlx-lm's."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def decode(self, call: Call) -> Decoded:
        """One batch of equal prompts; every token reaches the host as it is drawn."""
        import mlx.core as mx
        from mlx_lm.generate import BatchGenerator
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(call.seed)
        batch = BatchGenerator(
            self.model,
            sampler=make_sampler(temp=call.temperature),
            max_tokens=call.new,
            prefill_batch_size=call.width,
            completion_batch_size=call.width,
        )
        rows: dict[int, list[int]] = {
            uid: [] for uid in batch.insert([list(call.prompt)] * call.width)
        }
        first = 0.0
        start = time.perf_counter()
        while any(len(row) < call.new for row in rows.values()):
            for response in batch.next_generated():
                rows[response.uid].append(response.token)
            if not first and all(rows.values()):
                first = time.perf_counter() - start
        whole = time.perf_counter() - start
        batch.close()
        return Decoded(first, whole, list(rows.values()))


def load(setup: Setup) -> MlxLmSession:
    """The host, by mlx-lm alone."""
    from pathlib import Path

    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.Device(mx.gpu if setup.device.startswith("gpu") else mx.cpu))
    model, _ = load_model(Path(setup.host))
    model.set_dtype(getattr(mx, setup.entry.weights))
    return MlxLmSession(model)
