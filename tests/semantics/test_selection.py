"""M5: the intervals of top-w against each row's own sort."""

from __future__ import annotations

import math

import pytest
import torch
from flash_sparse_attn.reference import selection, visibility
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_sparse_attn import reference

NAN, INF = math.nan, math.inf
LENGTH = 33
TORCH = torch.Generator().manual_seed(7)
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
PATTERNS = {
    "ascending": torch.arange(LENGTH).float(),
    "descending": -torch.arange(LENGTH).float(),
    "constant": torch.zeros(LENGTH),
    "sawtooth": torch.arange(LENGTH).remainder(5).float(),
    "falling sawtooth": -torch.arange(LENGTH).remainder(5).float(),
    "random": torch.randn(LENGTH, generator=TORCH),
    "duplicates": torch.randint(0, 4, (LENGTH,), generator=TORCH).float(),
    "signed zeros": torch.tensor([0.0, -0.0]).repeat(LENGTH)[:LENGTH],
    "all nan": torch.full((LENGTH,), NAN),
    "all -inf": torch.full((LENGTH,), -INF),
    "nan and infinities": torch.tensor([1.0, NAN, -INF, 0.0, NAN, INF, -INF]).repeat(5)[:LENGTH],
}


def by_sorting(scores, seqlen_q, window_size, causal=True, keep=None) -> torch.Tensor:
    """bool [Sq, Sk]: every row sorts the keys that it can see and takes the first w."""
    seqlen_k = len(scores)

    def badness(j: int):
        nan = math.isnan(scores[j])
        return nan, 0.0 if nan else -float(scores[j]), -j

    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    for i in range(seqlen_q):
        p = i + seqlen_k - seqlen_q
        keys = [j for j in range(seqlen_k) if (j <= p or not causal) and (keep is None or keep[j])]
        mask[i, sorted(keys, key=badness)[:window_size]] = True
    return mask


def by_intervals(scores, seqlen_q, *args, **kwargs) -> torch.Tensor:
    start, end = reference.topk_intervals(scores, seqlen_q, *args, **kwargs)
    assert start.dtype == end.dtype == torch.int32
    assert start.shape == end.shape == scores.shape
    assert start.min() >= 0
    assert end.max() <= seqlen_q
    return visibility.intervals(start[None, None], end[None, None], seqlen_q)[0, 0]


@pytest.mark.parametrize("window_size", [1, 2, 8, LENGTH - 1, LENGTH, LENGTH + 5])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_patterns(device, pattern, window_size):
    scores = PATTERNS[pattern].to(device)
    for seqlen_q in (LENGTH, 1, 7, LENGTH + 6):
        for causal in (True, False):
            got = by_intervals(scores, seqlen_q, window_size, causal).cpu()
            want = by_sorting(PATTERNS[pattern], seqlen_q, window_size, causal)
            assert torch.equal(got, want)


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, -INF, INF, NAN]), st.floats(width=32, allow_nan=True)
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    keys=st.lists(st.tuples(VALUES, st.booleans()), min_size=1, max_size=20),
    seqlen_q=st.integers(1, 24),
    window_size=st.integers(1, 22),
    causal=st.booleans(),
    padded=st.booleans(),
)
def test_anything(keys, seqlen_q, window_size, causal, padded):
    scores = torch.tensor([score for score, _ in keys], dtype=torch.float32)
    keep = torch.tensor([kept for _, kept in keys]) if padded else None
    got = by_intervals(scores, seqlen_q, window_size, causal, key_padding_mask=keep)
    assert torch.equal(got, by_sorting(scores, seqlen_q, window_size, causal, keep))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), length=st.integers(1, 40))
def test_prefix_quantile(data, length):
    sequence = torch.tensor(data.draw(st.permutations(range(length))))
    n = data.draw(st.integers(1, length))
    got = selection.prefix_quantile(sequence, n)
    for r in range(n, length):
        assert got[r] == sequence[:r].sort().values[n - 1]


def test_equal_scores_are_a_sliding_window():
    start, end = reference.topk_intervals(torch.zeros(1, 1, 9), 9, 4)
    want = reference.window_intervals(9, 9, 3, 0)
    assert torch.equal(start, want[0])
    assert torch.equal(end, want[1])


def test_a_window_of_all_keys_is_causal(rand):
    got = reference.topk_intervals(rand(1, 1, 9), 5, 9)
    want = reference.causal_intervals(5, 9)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_every_row_sees_as_many_keys_as_it_can(rand):
    start, end = reference.topk_intervals(rand(2, 3, 200), 200, 16)
    count = visibility.intervals(start, end, 200).sum(3)
    assert torch.equal(count, torch.arange(1, 201).clamp(max=16).expand(2, 3, 200))


def test_batches_heads_and_padding_are_independent(rand, coin):
    scores, keep = rand(2, 3, 12), coin(2, 1, 12)
    start, end = reference.topk_intervals(scores, 10, 4, key_padding_mask=keep)
    assert start.shape == (2, 3, 12)
    got = visibility.intervals(start, end, 10)
    for b in range(2):
        for n in range(3):
            assert torch.equal(got[b, n], by_sorting(scores[b, n], 10, 4, True, keep[b, 0]))
    shared = reference.topk_intervals(scores[:1], 10, 4, key_padding_mask=keep)
    assert shared[0].shape == (2, 3, 12), "one row of scores, padded a sequence at a time"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype(rand, dtype):
    scores = rand(LENGTH).to(dtype)
    assert torch.equal(by_intervals(scores, 20, 5), by_sorting(scores, 20, 5))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    outside=st.tuples(st.integers(0, 2), st.integers(0, 4)),
    window_size=st.integers(1, 14),
    causal=st.booleans(),
    padded=st.booleans(),
)
def test_packed_sequences_choose_by_themselves(data, lengths, outside, window_size, causal, padded):
    """Rows counted inside each sequence; what lies outside of all is hidden, whatever its score."""
    before, behind = outside
    cu_seqlens = torch.tensor([before, *lengths]).cumsum(0).int()
    tokens = int(cu_seqlens[-1]) + behind
    keys = data.draw(st.lists(st.tuples(VALUES, st.booleans()), min_size=tokens, max_size=tokens))
    scores = torch.tensor([score for score, _ in keys], dtype=torch.float32)
    keep = torch.tensor([kept for _, kept in keys], dtype=torch.bool) if padded else None
    start, end = reference.topk_intervals(scores, -1, window_size, causal, keep, cu_seqlens)
    assert start.dtype == end.dtype == torch.int32
    inside = torch.zeros(tokens, dtype=torch.bool)
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        own = slice(first, last)
        inside[own] = True
        i = torch.arange(last - first)[:, None]
        got = (start[own] <= i) & (i < end[own])
        kept = None if keep is None else keep[own]
        assert torch.equal(got, by_sorting(scores[own], last - first, window_size, causal, kept))
        assert (end[own] <= last - first).all()
    assert not start[~inside].any()
    assert not end[~inside].any()


def test_heads_of_packed_sequences_are_independent(rand, coin):
    scores, keep = rand(1, 3, 20), coin(1, 1, 20)
    cu_seqlens = torch.tensor([0, 7, 7, 19], dtype=torch.int32)
    got = reference.topk_intervals(scores, -1, 4, True, keep, cu_seqlens)
    for n in range(3):
        want = reference.topk_intervals(scores[:, n], -1, 4, True, keep[:, 0], cu_seqlens)
        assert torch.equal(got[0][:, n], want[0])
        assert torch.equal(got[1][:, n], want[1])


def test_no_keys():
    start, end = reference.topk_intervals(torch.zeros(2, 1, 0), 4, 3)
    assert start.shape == end.shape == (2, 1, 0)


def test_long_sequences_in_linear_memory(rand):
    """2**17 keys, of which a mask of all pairs would be 16 GiB; rows sampled against their sort."""
    length, window_size = 2**17, 1000
    scores = rand(length).half().float()
    start, end = reference.topk_intervals(scores, length, window_size)
    recent_first = scores.flip(0)
    for i in (0, 998, 999, 1000, 1001, 54321, length - 1):
        prefix = recent_first[length - 1 - i :]
        best = i - prefix.argsort(descending=True, stable=True)[:window_size]
        seen = ((start <= i) & (i < end)).nonzero().squeeze(1)
        assert torch.equal(seen, best.sort().values)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_no_value_is_read_on_the_host(causal, packed):
    """It runs where there are no values at all."""
    scores = torch.empty(2, 1, 100, device="meta")
    keep = torch.empty(2, 1, 100, device="meta", dtype=torch.bool)
    cu_seqlens = torch.empty(4, device="meta", dtype=torch.int32) if packed else None
    start, end = reference.topk_intervals(scores, 90, 8, causal, keep, cu_seqlens)
    assert start.shape == end.shape == (2, 1, 100)
    assert start.dtype == end.dtype == torch.int32


@pytest.mark.parametrize("device", [CUDA])
def test_cuda_graph_capture(device):
    scores = torch.zeros(2, 3, 4096, device=device)
    reference.topk_intervals(scores, 4096, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = reference.topk_intervals(scores, 4096, 64)
    scores.normal_()
    graph.replay()
    want = reference.topk_intervals(scores, 4096, 64)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_window_size_below_one_is_refused():
    for window_size in (0, -3):
        with pytest.raises(ValueError, match=r"window_size.*E6"):
            reference.topk_intervals(torch.zeros(1, 1, 4), 4, window_size)


def test_no_gradient_flows_through_the_choice(rand):
    scores = rand(1, 1, 8).requires_grad_()
    assert not reference.topk_intervals(scores, 8, 3)[0].requires_grad
