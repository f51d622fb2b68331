"""Same seed, same answer: the draws of several backends compared, token by token (clause 11.6).

All backends decode the same rows in lockstep. Each draws for itself, and then every one is fed what
the first drew, so that one draw that differs does not hide those after it. A backend that decodes
slowly, as the reference does, can `replay` instead: it reads all that was said at once. Where draws
differ, the uniform lies close to the border between two tokens; how close is measured, and so is
how far apart rounding may have the logits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bridge.contract import BackendModel, Sampling
from bridge.decoding.inputs import default_positions
from bridge.philox import philox4x32, uniforms
from bridge_conformance.tolerance import allowance, proxy
from bridge_ref.backend import Reference
from bridge_ref.sampling import sample, sampling_weights

Tensors = Mapping[str, np.ndarray]
OUTPUTS = (".bridge.o_proj.weight", ".bridge.down_proj.weight")


@dataclass(frozen=True)
class Flip:
    """A draw in which a backend differs from the first one.

    `margin`: how far the uniform is from the border between the two tokens, as a fraction of all
    weight, on the first backend. `moved`: how far apart the two backends have that border, plus
    what summing a vocabulary of float32 weights may round away. `allowed`: how far apart rounding
    may have the logits (`allow_rounding`); 0 until that is measured.
    """

    step: int
    prompt: int
    row: int
    backend: str
    drawn: int
    first_drew: int
    margin: float
    moved: float
    logits_apart: float  # the largest difference of the row's logits
    allowed: float = 0.0

    @property
    def explained(self) -> bool:
        """Whether rounding does: the border moved past the uniform, or one of the two draws by
        another rule; and the logits are as close as rounding has them, or one computes another
        model. The second bounds the first: a larger error does not explain more. The bound is on
        logits, since a token on the edge of a filter moves a border far, however small the change.
        """
        return self.margin <= self.moved and self.logits_apart <= self.allowed


@dataclass
class Agreement:
    """What was drawn, and where backends differed."""

    backends: list[str]
    tokens: list[list[int]]  # of each row, as the first backend drew them
    draws: int = 0  # compared, a row and step and further backend each
    flips: list[Flip] = field(default_factory=list)

    @property
    def unexplained(self) -> list[Flip]:
        """Flips that are not explained."""
        return [flip for flip in self.flips if not flip.explained]


def compare(
    models: Mapping[str, BackendModel],
    prompts: Sequence[np.ndarray],
    widths: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Sequence[int] = (),
) -> Iterator[Agreement]:
    """Decode on every backend; gives the same growing Agreement after each step.

    `models`: by name, the first is the one whose draws are fed. `prompts`: ids, int64 each.
    """
    names = list(models)
    rows = [(prompt, row) for prompt, width in enumerate(widths) for row in range(width)]
    result = Agreement(names, [[] for _ in rows])
    decoders = {n: m.prefill(prompts, widths, max_new_tokens) for n, m in models.items()}
    left = list(range(len(rows)))
    for step in range(max_new_tokens):
        drawn = {name: decoder.sample(sampling) for name, decoder in decoders.items()}
        followed = drawn[names[0]]
        result.draws += len(left) * (len(names) - 1)
        for name in names[1:]:
            for at in np.flatnonzero(drawn[name] != followed):
                prompt, row = rows[left[at]]
                u = float(uniforms(sampling.seed, step, row, prompt))
                tokens = int(followed[at]), int(drawn[name][at])
                ours, theirs = (decoders[n].logits()[at] for n in (names[0], name))
                measured = _measure(ours, theirs, tokens, u, sampling)
                result.flips.append(Flip(step, prompt, row, name, tokens[1], tokens[0], *measured))
        for place, token in zip(left, followed, strict=True):
            result.tokens[place].append(int(token))
        keep = ~np.isin(followed, list(eos_ids))
        left = [place for place, kept in zip(left, keep, strict=True) if kept]
        yield result
        if not left or step + 1 == max_new_tokens:
            return
        for decoder in decoders.values():
            decoder.advance(followed, keep)


def replay(
    name: str,
    model: BackendModel,
    first: BackendModel,
    prompts: Sequence[np.ndarray],
    widths: Sequence[int],
    max_new_tokens: int,
    result: Agreement,
    sampling: Sampling,
) -> None:
    """Draw on `model` from teacher-forced logits of what `first` said, and add to `result`.

    Clause 4.1 makes these the logits that decoding would have; rows end as they did (clause 2.3).
    Where a draw differs, `first` decodes once more, for the logits that it drew from.
    """
    rows = [(prompt, row) for prompt, width in enumerate(widths) for row in range(width)]
    theirs = model.logits(*_teacher_forced(prompts, widths, result))
    options = {n: getattr(sampling, n) for n in ("temperature", "top_k", "top_p", "min_p")}
    result.backends.append(name)
    differing: dict[int, dict[int, tuple[int, float]]] = {}  # by step and place: id and uniform
    for place, ((prompt, row), said) in enumerate(zip(rows, result.tokens, strict=True)):
        steps = np.arange(len(said))
        u = uniforms(sampling.seed, steps, row, prompt)
        drawn = sample(theirs[place, len(prompts[prompt]) - 1 + steps], u, **options)
        result.draws += len(said)
        for step in np.flatnonzero(drawn != said).tolist():
            differing.setdefault(step, {})[place] = int(drawn[step]), float(u[step])
    if not differing:
        return
    decoder = first.prefill(prompts, widths, max_new_tokens)
    left = list(range(len(rows)))
    for step in range(max(differing) + 1):
        for place, (drawn, u) in differing.get(step, {}).items():
            (prompt, row), followed = rows[place], result.tokens[place][step]
            ours = decoder.logits()[left.index(place)]
            there = theirs[place, len(prompts[prompt]) - 1 + step]
            measured = _measure(ours, there, (followed, drawn), u, sampling)
            result.flips.append(Flip(step, prompt, row, name, drawn, followed, *measured))
        if step < max(differing):
            fed = np.array([result.tokens[place][step] for place in left])
            keep = np.array([len(result.tokens[place]) > step + 1 for place in left])
            decoder.advance(fed, keep)
            left = [place for place, kept in zip(left, keep, strict=True) if kept]


def allow_rounding(
    result: Agreement,
    reference: BackendModel,
    prompts: Sequence[np.ndarray],
    widths: Sequence[int],
) -> None:
    """Measure how far apart rounding may have logits, and note it in every flip of `result`.

    `reference` is the reference's model in the dtype under test. What it errs against itself in
    float64, on the same stored numbers and what was said, is the rounding of a plain
    implementation; by clause 10.2 a backend may err 4 times that, and never less than 32 units in
    the last place of the largest logit, so that two of them may be twice as far apart. The nudged
    weights of that clause are left out: of all logits of all steps, the largest error is hardly
    ever small by luck.
    """
    stored = dict(reference.tensors())

    def run(dtype: str) -> np.ndarray:
        model = reference
        if dtype != reference.dtype:
            model = Reference().load(reference.config, stored, device="cpu", dtype=dtype)
        return model.logits(*arguments)[arguments[2]]

    arguments = _teacher_forced(prompts, widths, result)
    own = run(proxy(reference.dtype))
    allowed = 2 * allowance(run("float64"), own, reference.dtype)
    result.flips = [replace(flip, allowed=allowed) for flip in result.flips]


def _teacher_forced(
    prompts: Sequence[np.ndarray], widths: Sequence[int], result: Agreement
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What was said as the arguments of `BackendModel.logits`; last tokens are not fed."""
    row_prompt = [prompt for prompt, width in enumerate(widths) for _ in range(width)]
    fed = [[*prompts[p], *said[:-1]] for p, said in zip(row_prompt, result.tokens, strict=True)]
    tokens = np.zeros((len(fed), max(map(len, fed))), np.int64)
    active = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(fed):
        tokens[row, : len(ids)], active[row, : len(ids)] = ids, True
    return tokens, np.array(row_prompt), active, default_positions(active)


def _measure(
    ours: np.ndarray, theirs: np.ndarray, tokens: tuple[int, int], u: float, sampling: Sampling
) -> tuple[float, float, float]:
    """Margin, movement of the border, and distance of the logits `[V]` of a row on two backends."""
    apart = float(np.abs(ours - theirs).max())
    if sampling.temperature == 0:  # two likeliest tokens: the border is their equality
        return float(abs(ours[tokens[0]] - ours[tokens[1]])), 2 * apart, apart
    border = min(tokens)  # the lower one is drawn where u is below what is summed up to it
    options = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
    sums = []
    for logits in (ours, theirs):
        w = sampling_weights(logits[None], temperature=sampling.temperature, **options)
        w = w[0].astype(np.float64)
        sums.append(w[: border + 1].sum() / w.sum())
    summing = float(np.finfo(np.float32).eps) * len(ours) ** 0.5
    return float(abs(sums[0] - u)), float(abs(sums[0] - sums[1])) + summing, apart


class WithOutputs(Mapping[str, np.ndarray]):
    """A checkpoint's tensors, with the blocks' output projections filled in.

    Fresh blocks end in zeros, and then rows exchange nothing. Here element i of a layer's output
    projection is made from word `i mod 4` of Philox at the counter `(i // 4, layer, 0, 2)`:
    uniform in `scale * (-1, 1) / sqrt(E)`, the same on every machine.
    """

    def __init__(self, tensors: Tensors, seed: int, scale: float) -> None:
        """Reads nothing yet."""
        self.tensors, self.seed, self.scale = tensors, seed, scale

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.tensors[name]
        if not name.endswith(OUTPUTS):
            return array
        layer = int(name.split(".")[2])
        counters = np.arange(-(-array.size // 4))
        words = philox4x32((counters, layer, 0, 2), self.seed).reshape(-1)[: array.size]
        values = (words >> np.uint32(8)) * 2.0**-23 - 1
        scaled = self.scale * values / np.sqrt(array.shape[1])
        return scaled.reshape(array.shape).astype(array.dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
