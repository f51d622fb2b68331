"""`bridge init`: fresh Bridge blocks for a host (clauses 8.1 and 8.2), and fresh low-rank updates.

The blocks' outputs start at zero, so the new model is its host, exactly; the other matrices are a
pure function of the seed, the same on every machine. So it is with updates (clause 8.3).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bridge.checkpoints.forms import plain_config
from bridge.checkpoints.gguf import as_directory
from bridge.checkpoints.reading import Checkpoint, open_checkpoint
from bridge.checkpoints.tensor_specs import TensorSpec, float_dtype
from bridge.checkpoints.writing import write_adapter, write_checkpoint, write_lora
from bridge.config import (
    TARGETS,
    BridgeConfig,
    ModelConfig,
    bridge_shapes,
    lora_names,
    parse_config,
    tensor_shapes,
)
from bridge.errors import BridgeError, show
from bridge.files.atomic import refuse_existing
from bridge.numbers.machine import check_disk, check_memory
from bridge.numbers.ranges import take
from bridge.numbers.rounding import rounded
from bridge.philox import philox4x32

TENSOR_IDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "up_proj": 3}  # in the counter
LORA_IDS = {name: 4 + i for i, name in enumerate(TARGETS)}  # of a target's lora_A


@dataclass(frozen=True)
class Initialised:
    """What `init` made."""

    path: str
    kind: str
    layers: int
    host_parameters: int
    bridge_parameters: int
    dtype: str
    bytes: int

    @property
    def share(self) -> float:
        """The new parameters, as a fraction of the host's."""
        return self.bridge_parameters / self.host_parameters

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {**asdict(self), "share": self.share}


def init(
    host: str | Path,
    out: str | Path,
    *,
    heads: int = 8,
    head_dim: int = 64,
    kind: str = "attention",
    layers: str | Sequence[int] = "all",
    seed: int = 0,
    norm_eps: float | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    lora: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Initialised:
    """Write `host` with fresh blocks as the checkpoint `out`.

    `host`: a Hugging Face directory, or a GGUF file (extra `gguf`). `layers`: `all`, numbers, or
    a text such as `0-14,20`. `norm_eps`: None is the host's. `dtype`: None keeps the host's.
    `adapter`: write the blocks alone, for a host that stays where it is. `lora`: a directory of
    low-rank updates of the host, as PEFT saves it (clause 9.13); they stay beside it, as those that
    the host may have of its own do. `progress(done, total)`
    hears of bytes. Raises BridgeError before anything is written where `out` exists or something
    does not fit.
    """
    host, out = Path(host), Path(out)
    refuse_existing(out)
    seed, heads, head_dim = take("seed", seed), take("heads", heads), take("head_dim", head_dim)
    norm_eps = None if norm_eps is None else take("norm_eps", norm_eps)
    with _opened(host, out, adapter, None if lora is None else Path(lora)) as opened:
        chosen = BridgeConfig(
            kind=kind,
            num_heads=heads,
            head_dim=head_dim,
            layers=parse_layers(layers, opened.config.num_hidden_layers),
            norm_eps=opened.config.rms_norm_eps if norm_eps is None else norm_eps,
        )
        raw = {**plain_config(opened.raw_config), "bridge": chosen.to_json()}
        stored, numpy_dtype = float_dtype(dtype or opened.dtype)
        for key in ("dtype", "torch_dtype"):  # the host's own key says what is stored
            if dtype is not None and key in raw:
                raw[key] = stored
        config = parse_config(raw, str(out / "config.json"))
        fresh = {
            name: shape for i in chosen.layers for name, shape in bridge_shapes(config, i).items()
        }
        specs = {}
        for name, shape in (fresh if adapter else tensor_shapes(config)).items():
            kept = dtype is None and name not in fresh
            specs[name] = TensorSpec(opened.specs[name].dtype if kept else numpy_dtype, shape)
        _check_fits(out, config, fresh, specs)
        tensors = _with_blocks(opened, config, specs, seed, progress)
        also = _updates(opened, None if dtype is None else numpy_dtype)
        if adapter:
            write_adapter(out, opened, raw, specs, tensors, also)
        else:
            write_checkpoint(out, raw, specs, tensors, assets=opened.assets, also=also)
    return Initialised(
        path=str(out),
        kind=kind,
        layers=len(chosen.layers),
        host_parameters=sum(prod(s) for s in tensor_shapes(config.without_bridge()).values()),
        bridge_parameters=sum(prod(s) for s in fresh.values()),
        dtype=stored,
        bytes=sum(spec.nbytes for spec in specs.values()),
    )


def _check_fits(
    out: Path,
    config: ModelConfig,
    fresh: Mapping[str, tuple[int, ...]],
    specs: Mapping[str, TensorSpec],
) -> None:
    """Refuse blocks of which one matrix is more than the memory, or all more than the disk."""
    blocks = config.bridge
    assert blocks is not None
    what, mend = f"heads {blocks.num_heads} of {blocks.head_dim}", "lower heads or head_dim"
    check_memory(8 * max(map(prod, fresh.values())), f"{what} in float64", mend)
    check_disk(out.parent, sum(spec.nbytes for spec in specs.values()), what, mend)


def _updates(opened: Checkpoint, dtype: np.dtype | None) -> Callable[[Path], None] | None:
    """What writes the host's updates, in another dtype if one is given; None where it has none."""
    lora = opened.config.lora
    if lora is None:
        return None
    of_host = {name: opened.specs[name] for name in lora_names(opened.config)}
    specs = {name: TensorSpec(dtype or spec.dtype, spec.shape) for name, spec in of_host.items()}
    tensors = ((n, rounded(opened.tensors[n], spec.dtype, n)) for n, spec in specs.items())
    return lambda directory: write_lora(directory, lora, specs, tensors)


@contextmanager
def _opened(host: Path, out: Path, adapter: bool, lora: Path | None) -> Iterator[Checkpoint]:
    """The host, opened; that of a GGUF file lies beside `out` for as long as it is needed."""
    if host.suffix != ".gguf":
        opened = open_checkpoint(host, lora=lora)
        if opened.config.bridge is not None:
            raise BridgeError(f"{host}: has Bridge blocks already; start from the plain host")
        yield opened
        return
    if adapter:
        raise BridgeError(f"{host}: an adapter needs a host directory to refer to, not a GGUF file")
    with as_directory(host, out) as directory:
        yield open_checkpoint(directory, lora=lora)


def _with_blocks(
    host: Checkpoint,
    config: ModelConfig,
    specs: Mapping[str, TensorSpec],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `specs`, the host's from its files and the blocks' fresh, one by one."""
    blocks = fresh_bridge_tensors(config, seed)
    done, total = 0, sum(spec.nbytes for spec in specs.values())
    for name, spec in specs.items():
        array = host.tensors[name] if name in host.specs else next(blocks)[1]
        yield name, rounded(array, spec.dtype, name)
        done += spec.nbytes
        if progress is not None:
            progress(done, total)


def fresh_bridge_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Clause 8.2: the tensors of every block in canonical order, float32.

    Norms are 1, output projections 0; the others are `uniform_matrix`.
    """
    for layer in range(config.num_hidden_layers):
        for name, shape in bridge_shapes(config, layer).items():
            matrix = name.split(".")[-2]
            if matrix == "norm":
                yield name, np.ones(shape, np.float32)
            elif matrix not in TENSOR_IDS:
                yield name, np.zeros(shape, np.float32)
            else:
                yield name, uniform_matrix(shape, layer, TENSOR_IDS[matrix], seed)


def fresh_lora(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Clause 8.3: the tensors of `config.lora` by name, in canonical order, float32; none without.

    `lora_B` is 0, so they change nothing; `lora_A` is `uniform_matrix`.
    """
    shapes, fresh = tensor_shapes(config), {}
    for name in lora_names(config):
        *_, layer, _, target, matrix, _ = name.split(".")
        if matrix == "lora_B":
            fresh[name] = np.zeros(shapes[name], np.float32)
        else:
            fresh[name] = uniform_matrix(shapes[name], int(layer), LORA_IDS[target], seed)
    return fresh


def uniform_matrix(shape: tuple[int, ...], layer: int, tensor_id: int, seed: int) -> np.ndarray:
    """A fresh matrix `[out, in]` of clauses 8.2 and 8.3, float32.

    Element i is word `i % 4` of Philox at the counter `(i // 4, layer, tensor id, 1)`: with u its
    upper 24 bits times 2^-24, the value is `(2 u - 1 + 2^-24) / sqrt(in)`, in float64 and then
    rounded. What a block reads has width D.
    """
    blocks = np.arange(-(-prod(shape) // 4))
    words = philox4x32((blocks, layer, tensor_id, 1), seed)
    u = (words.reshape(-1)[: prod(shape)] >> np.uint32(8)) * 2.0**-24
    values = (2 * u - 1 + 2.0**-24) / np.sqrt(shape[-1])
    return values.astype(np.float32).reshape(shape)


def parse_layers(layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    """`all`, numbers, or a text such as `0-14,20`: ascending layer numbers below `count`."""
    if layers == "all":
        return tuple(range(count))
    chosen: set[int] = set()
    if isinstance(layers, str):
        for part in layers.split(","):
            first, dash, last = part.strip().partition("-")
            if not _is_layer(first) or (dash and not _is_layer(last)):
                raise BridgeError(
                    f"layers: {show(part)} is no number or range; try 'all' or '0-14,20'"
                )
            # A range past the end is refused below; no need to list all of it.
            chosen |= set(range(int(first), min(int(last or first), count) + 1))
            chosen.add(int(last or first))
    else:
        chosen = set(layers)
    if not chosen or any(type(i) is not int or not 0 <= i < count for i in chosen):
        raise BridgeError(f"layers: {show(layers)} must name layers within 0..{count - 1}")
    return tuple(sorted(chosen))


def _is_layer(text: str) -> bool:
    return text.isdecimal() and len(text) < 20  # a longer one is none, and no integer to Python
