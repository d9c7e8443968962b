"""Decoding in the interpreter: every term of the cache form against the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flash_sparse_attn.backends.triton.kernels import decode as kernels
from flash_sparse_attn.backends.triton.kernels import decode_lists
from torch import Tensor

from flash_sparse_attn.problem import AttentionOptions, Form
from flash_sparse_attn.tensors import AttentionTensors
from tests.conformance.poison import poisoned_memory

from .decoding import CacheCall, random_call
from .memory import checked_memory, last_program_first

FLOAT32, FLOAT16, FLOAT64 = torch.float32, torch.float16, torch.float64


def normal(seed: int, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def call(
    seqlen_q: int = 1,
    seqlen_k: int = 200,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    batch: int = 2,
    options: dict | None = None,
    **tensors: Tensor,
) -> CacheCall:
    """A call of random q, k, v; the terms are given."""
    q = normal(1, batch, seqlen_q, heads[0], dim)
    k, v = (normal(seed, batch, seqlen_k, heads[1], dim) for seed in (2, 3))
    options = AttentionOptions(**{"form": Form.CACHE, "softmax_scale": 0.3} | (options or {}))
    return CacheCall(AttentionTensors(q, k, v, **tensors), options, (k, v))


def cut(made: CacheCall, splits: int, **changes: object) -> kernels.Plan:
    """The plan of a call with another number of splits."""
    return replace(kernels.plan(made.problem, multiprocessors=0), splits=splits, **changes)


def decode(made: CacheCall, plan: kernels.Plan | None = None) -> tuple[Tensor, Tensor]:
    return kernels.decode(made.problem, made.tensors, plan)[:2]


@pytest.mark.parametrize("seed", range(24))
def test_random_calls(seed):
    """From memory that held garbage, every access checked."""
    made = random_call(seed, FLOAT16 if seed % 3 == 0 else FLOAT32, seqlens_k=(1, 40, 200))
    with poisoned_memory("cpu"), checked_memory():
        results = kernels.decode(made.problem, made.tensors)
    assert not made.judge(*results), str(made.problem)


@pytest.mark.parametrize("seed", [2, 14, 29])
def test_double_precision(seed):
    made = random_call(seed, FLOAT64, seqlens_k=(40, 100))
    assert not made.failures(), str(made.problem)


@pytest.mark.parametrize("splits", [1, 2, 3, 40])
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_any_number_of_splits(splits, seqlen_q):
    """More than there are tiles too, and with sequences that are empty or short."""
    lengths = torch.tensor([200, 0, 5], dtype=torch.int32)
    made = call(seqlen_q, batch=3, options={"causal": True}, cache_seqlens=lengths)
    with poisoned_memory("cpu"), checked_memory():
        o, lse, _ = kernels.decode(made.problem, made.tensors, cut(made, splits))
    assert not made.judge(o, lse, None)
    assert not o[1].any()
    assert (lse[1] == -math.inf).all()


@pytest.mark.parametrize("seqlen_q", [128, 200])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_many_rows(seqlen_q, heads):
    made = call(seqlen_q, 150, heads, batch=1, options={"causal": True, "window_left": 70})
    assert not made.failures()


@pytest.mark.parametrize("sizes", [{"seqlen_q": 0}, {"seqlen_k": 0}])
def test_nothing(sizes):
    assert not call(**sizes).failures()


def test_no_sequence():
    o, lse = decode(call(batch=0))
    assert o.shape == (0, 1, 4, 16)
    assert lse.shape == (0, 4, 1)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_order_of_programs_does_not_matter(splits):
    made = call(seqlen_k=150)
    first = decode(made, cut(made, splits))
    with last_program_first():
        second = decode(made, cut(made, splits))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("window", [(0, None), (10, 0), (None, 3), (70, 2)])
@pytest.mark.parametrize("sinks", [0, 3, 70])
@pytest.mark.parametrize("causal", [False, True])
def test_window_and_sinks(window, sinks, causal):
    """V2, with a gap between the sinks and the window, and without."""
    left, right = window
    options = {"window_left": left, "window_right": right, "sinks": sinks, "causal": causal}
    lengths = torch.tensor([300, 20], dtype=torch.int32)
    made = call(3, 300, options=options, cache_seqlens=lengths)
    assert not made.failures(cut(made, 2))


def lists(count: int, high: int) -> Tensor:
    """Key lists in which many keys stand several times, at all distances."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(-1, high, (2, 2, count), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("tested", [True, False])
@pytest.mark.parametrize("count", [1, 64, 300, 1500])
def test_a_key_listed_twice_counts_once(tested, count):
    """V6, whether tiles look for repeats or a kernel has sorted the list."""
    made = call(2, 250, key_indices=lists(count, 260), options={"causal": True})
    with poisoned_memory("cpu"), checked_memory():
        results = kernels.decode(made.problem, made.tensors, cut(made, 2, repeats_tested=tested))
    assert not made.judge(*results)


@pytest.mark.parametrize("lengths", [None, (3000, 1100)])
@pytest.mark.parametrize(("count", "entries"), [(1, 2048), (300, 2048), (300, 64)])
def test_lists_are_sorted(monkeypatch, lengths, count, entries):
    """Every key once, ascending, in all ranges of keys together; what is no key is -1."""
    monkeypatch.setattr(decode_lists, "KEYS", 1024)
    monkeypatch.setattr(decode_lists, "MOST_ENTRIES", entries)
    listed = lists(count, 3010)
    listed[:, :, ::7] = torch.tensor(-(2**31))
    listed[:, :, 1::7] = torch.tensor(2**31 - 1)
    listed[0, 0, 2::7] = 2999
    terms = {}
    if lengths is not None:
        terms["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    made = call(seqlen_k=3000, key_indices=listed, **terms)
    with poisoned_memory("cpu"), checked_memory():
        found = decode_lists.ascending(made.problem, made.tensors, OVERLAP=False)
    for b, length in enumerate(lengths or (3000, 3000)):
        for got, given in zip(found[b], listed[b], strict=True):
            want = given[(given >= 0) & (given < length)].unique()
            assert torch.equal(got[got >= 0], want)
            assert (got[got < 0] == -1).all()


def test_the_same_key_alone():
    """A list of one key, many times, is that key."""
    listed = torch.full((2, 2, 200), 7, dtype=torch.int32)
    o, lse = decode(call(key_indices=listed))
    alone, alone_lse = decode(call(key_indices=listed[..., :1]))
    assert torch.equal(o, alone)
    assert torch.equal(lse, alone_lse)


def test_lists_of_no_key():
    listed = torch.tensor([-1, 200, 2**31 - 1, -(2**31)], dtype=torch.int32).expand(2, 2, 4)
    o, lse = decode(call(key_indices=listed))
    assert not o.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("gate", ["logsigmoid", "identity"])
@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_the_largest_gate_always_stays(gate, scale):
    """V7 with the strictest threshold: one key a row, unless gates are equal."""
    gates = {"gate_q": normal(7, 2, 3, 4), "gate_k": normal(8, 2, 200, 2)}
    options = {"gate": gate, "gate_threshold": 1.0, "softmax_scale": scale, "causal": True}
    made = call(3, options=options, **gates)
    assert not made.failures(cut(made, 3))
    assert decode(made)[1].isfinite().all()


def test_a_gate_that_is_nan_shows():
    """V7 drops nothing in its rows."""
    delta = normal(8, 2, 200, 2)
    delta[0, 30, 0] = math.nan
    options = {"gate": "identity", "gate_threshold": 0.9}
    o, lse = decode(call(options=options, gate_q=normal(7, 2, 1, 4), gate_k=delta))
    assert lse[0, :2].isnan().all()
    assert o[0, :, :2].isnan().all()
    assert lse[0, 2:].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_threshold_drops_all_that_it_may(splits, seqlen_q):
    """T1, exact and complete: a few keys hold the mass, and the blocks without them go."""
    q, k = normal(1, 1, seqlen_q, 4, 16), normal(2, 1, 1100, 2, 16) / 8
    k[:, [5, 700, 1050]] = q[:, :1, ::2] * 4
    tensors = AttentionTensors(q, k, normal(3, 1, 1100, 2, 16))
    options = {"softmax_scale": 1.0, "softmax_threshold": 0.5, "causal": True}
    made = CacheCall(tensors, AttentionOptions(form=Form.CACHE, **options), (k, tensors.v))
    with poisoned_memory("cpu"), checked_memory():
        o, lse, kept = kernels.decode(made.problem, tensors, cut(made, splits))
    assert not made.judge(o, lse, kept)
    if seqlen_q == 1:
        assert made.kept_pairs(kept)[:, ::2].float().mean() < 0.2  # heads that find their keys


def test_rows_that_do_not_exist_do_not_veto():
    """T1: 3 of 16 rows of a block exist, and 3 query heads of 4."""
    q, k = torch.zeros(1, 3, 3, 16), torch.zeros(1, 2000, 1, 16)
    q[..., 0], k[:, 40, 0, 0] = 8.0, 8.0
    tensors = AttentionTensors(q, k, normal(3, 1, 2000, 1, 16))
    options = AttentionOptions(form=Form.CACHE, softmax_scale=1.0, softmax_threshold=1.0)
    made = CacheCall(tensors, options, (k, tensors.v))
    results = kernels.decode(made.problem, tensors)
    assert not made.judge(*results)
    kept = made.kept_pairs(results[2])
    assert kept[..., 32:64].all()
    assert not kept[..., :32].any()
    assert not kept[..., 64:].any()


def test_one_row_needs_no_bounds():
    """A single causal row compiles to the code of a row without rules."""
    bounds = [
        kernels.decode_arguments.decode_bounds(call(options={"causal": causal}).problem)
        for causal in (False, True)
    ]
    assert bounds[0].right is None
    assert bounds[1].right is None


@pytest.mark.parametrize(("batch", "count", "tested"), [(2, 1024, 1), (2, 1025, 0), (40, 1024, 0)])
def test_long_and_many_lists_are_sorted(batch, count, tested):
    listed = torch.zeros(batch, 2, count, dtype=torch.int32)
    made = call(batch=batch, seqlen_k=8, key_indices=listed)
    assert kernels.plan(made.problem, multiprocessors=0).repeats_tested == bool(tested)


def test_plans_fill_the_slots():
    """Few splits where sequences fill the GPU, more where they leave a wave half empty, many where
    one does not fill it, none without keys.
    """
    assert kernels._splits(programs=256, slots=264, most=100) == 1
    assert kernels._splits(programs=2600, slots=264, most=100) == 1
    assert kernels._splits(programs=384, slots=264, most=100) == 2
    assert kernels._splits(programs=384, slots=264, most=1) == 1
    assert kernels._splits(programs=128, slots=264, most=100) == 2
    assert kernels._splits(programs=8, slots=264, most=2000) == 32
    assert kernels._splits(programs=1, slots=264, most=5) == 5
    assert kernels._splits(programs=1, slots=264, most=0) == 1
