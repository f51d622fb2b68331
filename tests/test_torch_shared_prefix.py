"""Attention over a shared prefix by Triton kernels: run by Triton's interpreter, or on a GPU where
there is one, against the sums written out in float64."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # see conftest.py

from bridge.config import parse_config  # noqa: E402
from bridge.contract import Sampling  # noqa: E402
from bridge_conformance.cases import random_tensors  # noqa: E402
from bridge_torch import ahead, fused, shared_prefix  # noqa: E402
from bridge_torch.backend import TorchBackend  # noqa: E402
from bridge_torch.shared_prefix import Units, attend  # noqa: E402

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def units(first, count, begin, end):
    widest, longest = max(count), max(max(b - a for a, b in zip(begin, end, strict=True)), 1)
    tensors = (
        torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (first, count, begin, end)
    )
    return Units(*tensors, widest, longest)


def in_float64(q, prefix, own, of_prefix, of_own):
    """Row by row; and the largest of the numbers that are weighed."""
    shared, rows = q.shape[1] // own.shape[2], []
    for unit, (first, count) in enumerate(zip(of_prefix[0], of_prefix[1], strict=True)):
        for row in range(first, first + count):
            seen = [
                prefix[:, unit, :, of_prefix[2][unit] : of_prefix[3][unit]],
                own[:, row, :, of_own[2][row] : of_own[3][row]],
            ]
            k, v = torch.cat(seen, 2).double().repeat_interleave(shared, 1)
            score = (k @ q[row].double()[..., None])[..., 0] * q.shape[2] ** -0.5
            rows.append((score.softmax(-1)[:, None] @ v).flatten())
    return torch.stack(rows)


def check(dtype, widths, lengths, steps, K, shared, d, window=None, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    P, T, R = max(lengths), max(steps) + 2, sum(widths)
    steps = np.repeat(steps, widths)

    def normal(*shape, size=1.0):
        return (torch.randn(*shape, generator=generator) * size).to(dtype)

    # A roomy cache, as rows that left leave it; what is not to be read is NaN.
    prefix, own = normal(2, len(widths) + 1, K, P, d), normal(2, R + 2, K, T, d)
    q = normal(R, K * shared, d, size=scale)
    reach = 10**6 if window is None else window
    first = np.cumsum([0, *widths[:-1]])
    at = [steps[min(row, R - 1)] for row in first]
    begin = [max(P - n, min(P, P + s + 1 - reach)) for n, s in zip(lengths, at, strict=True)]
    of_prefix = (first.tolist(), widths, begin, [P] * len(widths))
    own_begin = [max(0, int(s) + 1 - reach) for s in steps]
    of_own = (list(range(R)), [1] * R, own_begin, [int(s) + 1 for s in steps])
    want = in_float64(q, prefix, own, of_prefix, of_own)
    for g, start in enumerate(begin):
        prefix[:, g, :, :start] = float("nan")
    for row, (start, end) in enumerate(zip(own_begin, of_own[3], strict=True)):
        own[:, row, :, :start] = own[:, row, :, end:] = float("nan")
    on_device = [x.to(DEVICE) for x in (q, prefix, own)]
    got = attend(*on_device, units(*of_prefix), units(*of_own)).cpu()
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.double() - want).abs().max() <= 8 * ULP[dtype] * want.abs().max().clamp(min=1)


@settings(max_examples=6)
@given(st.data())
def test_a_step_is_one_softmax_over_prefix_and_own_timesteps(data):
    groups = st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any)
    widths = data.draw(groups)
    lengths = [data.draw(st.integers(1, 40)) for _ in widths]
    steps = [data.draw(st.integers(0, 20)) for _ in widths]
    K, shared = data.draw(st.sampled_from([(1, 1), (1, 6), (2, 3)]))
    check(
        data.draw(st.sampled_from(list(ULP))),
        widths,
        lengths,
        steps,
        K,
        shared,
        data.draw(st.sampled_from([4, 16, 24])),
        data.draw(st.sampled_from([None, 1, 7, 30])),
        seed=data.draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize(("d", "dtype"), list(zip((48, 64, 128), ULP, strict=True)))
def test_heads_of_any_width_and_slots_of_many_parts(d, dtype, monkeypatch):
    monkeypatch.setattr(shared_prefix, "multiprocessors", lambda device: 16)
    check(dtype, [5], [150], [70], 1, 3, d)  # 15 queries, prefix and timesteps in parts


def test_a_wide_group_takes_several_tiles(monkeypatch):
    monkeypatch.setitem(shared_prefix.TILES, torch.bfloat16, ((16, 16), (16, 16)))
    check(torch.bfloat16, [1, 9], [20, 3], [2, 5], 1, 4, 16)


def test_a_score_is_not_rounded_before_it_is_scaled():
    """q and k whose product float16 does not hold, and whose scaled score it does."""
    q, k = (torch.full((1, n, 128), 32.0, dtype=torch.float16) for n in (1, 3))
    k[0, 1] = 31.9
    v = torch.arange(3.0)[:, None].expand(3, 128).half()
    cache = torch.stack([k[0], v])[:, None, None].to(DEVICE)
    one = units([0], [1], [0], [2])
    y = attend(q.to(DEVICE), cache, cache, one, units([0], [1], [2], [3])).cpu()
    assert torch.allclose(y, torch.ones_like(y))  # of timesteps 0 and 2, alike


def small(window):
    raw = {
        "model_type": "mistral",
        "vocab_size": 12,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "sliding_window": window,
        "tie_word_embeddings": False,
        "bridge": {
            "spec_version": "1.0",
            "kind": "attention",
            "num_heads": 1,
            "head_dim": 4,
            "layers": [0],
            "norm_eps": 1e-6,
        },
    }
    config = parse_config(raw)
    tensors = random_tensors(config, 0, "float32")
    return TorchBackend().load(config, tensors, device=DEVICE, dtype="float32")


@pytest.mark.parametrize("window", [None, 4])
def test_a_decoder_says_the_same_by_the_kernels(window, monkeypatch):
    """Groups of different widths, lengths and steps; turns in buckets with rows to fill them."""
    monkeypatch.setattr(fused, "serves", lambda *_: False)
    monkeypatch.setattr(ahead, "serves", lambda *_: True)
    if DEVICE == "cpu":
        monkeypatch.setattr(ahead, "Graph", lambda call, state: call)
    found = []
    for by_kernels in (False, True):
        monkeypatch.setattr(shared_prefix, "serves", lambda *_, by=by_kernels: by)
        decoder = small(window).prefill([np.arange(2)], [1], 9)
        decoder.advance(np.array([3]))
        decoder.admit([np.arange(5), np.arange(3)], [3, 1], 9)
        tables = [decoder.sample_ahead(Sampling(seed=5), 3, [7])]
        decoder.advance(keep=tables[0][:, -1] >= 0)
        tables.append(decoder.sample(Sampling(seed=5)))
        found.append((tables, decoder.logits()))
    for one, other in zip(*(tables for tables, _ in found), strict=True):
        assert np.array_equal(one, other)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bridge_torch import prefix_kernels as kernels

def compiled(kernel, pointers, constants):
    signature = {name: "i32" for name in kernel.arg_names} | {"scale": "fp32"} | pointers
    signature = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))

caches = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16")
plan = dict.fromkeys(("first_ptr", "count_ptr", "begin_ptr", "end_ptr"), "*i32")
parts = dict.fromkeys(("y_ptr", "lse_ptr"), "*fp32")
sizes = {"D": 64, "OF": 16, "QUERIES": 64, "SLOTS": 64, "FACTORS": tl.bfloat16}
done = compiled(kernels.attend_unit, caches | plan | parts, sizes)
assert done.metadata.shared <= 99 * 1024, done.metadata.shared
parts = {"y_ptr": "*bf16", "parts_ptr": "*fp32", "lse_ptr": "*fp32"}
compiled(kernels.merge, parts, {"D": 64, "OF": 16, "SPLITS": 64})
"""


def test_the_kernels_compile_for_a_gpu_that_need_not_be_there(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
