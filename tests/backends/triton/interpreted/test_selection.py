"""The kernels of M5 against the reference, in several segments and blocks of a few keys each."""

from __future__ import annotations

import math
import random

import pytest
import torch
from flash_sparse_attn.backends.triton.kernels import selection
from torch import Tensor

from flash_sparse_attn import reference
from tests.conformance.poison import poisoned_memory

from .calls import Draw

SIZES = selection.Sizes(
    segment=16, segment_chunk=16, segment_warps=1, block=8, block_chunk=16, block_warps=1
)
LENGTH = 44
SEEDS = range(16)
PACKED_SEEDS = range(10)
NAN, INF = math.nan, math.inf
PATTERNS = {
    "ascending": torch.arange(LENGTH).float(),
    "descending": -torch.arange(LENGTH).float(),
    "constant": torch.zeros(LENGTH),
    "falling sawtooth": -torch.arange(LENGTH).remainder(7).float(),
    "hill": -(torch.arange(LENGTH) - 25).abs().float(),
    "random": Draw.seeded(0).normal(LENGTH),
    "duplicates": Draw.seeded(1).integers(0, 4, LENGTH).float(),
    "subnormal": Draw.seeded(2).normal(LENGTH) * 1e-40,
    "special": torch.tensor([1.0, NAN, -INF, 0.0, NAN, INF, -0.0, -INF]).repeat(10)[:LENGTH],
}


def check(
    scores: Tensor,
    seqlen_q: int,
    window_size: int,
    causal: bool = True,
    keep: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sizes: selection.Sizes = SIZES,
) -> None:
    arguments = scores, seqlen_q, window_size, causal, keep, cu_seqlens
    with poisoned_memory("cpu"):
        got = selection.topk_intervals(*arguments, sizes)
    start, end = reference.topk_intervals(*arguments)
    for tensor, want in zip(got, (start, torch.maximum(start, end)), strict=True):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert torch.equal(tensor, want)


@pytest.mark.parametrize("window_size", [1, 7])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern, window_size):
    check(PATTERNS[pattern][None, None], LENGTH, window_size)


@pytest.mark.parametrize("window_size", [15, 16, 17, LENGTH - 1])
def test_windows_about_as_long_as_a_segment(window_size):
    check(PATTERNS["random"][None, None], LENGTH, window_size)


@pytest.mark.parametrize("pattern", ["duplicates", "special"])
@pytest.mark.parametrize("window_size", [1, 7])
def test_not_causal(pattern, window_size):
    check(PATTERNS[pattern][None, None], 20, window_size, causal=False)


@pytest.mark.parametrize("seqlen_k", [0, 1, 8, 15, 16, 17, 32])
def test_lengths(seqlen_k):
    """Ends of blocks and segments, and no key at all."""
    check(Draw.seeded(3).normal(1, 2, seqlen_k), seqlen_k, 5)


@pytest.mark.parametrize("window_size", [LENGTH, LENGTH + 1, 2**40])
def test_a_window_of_all_keys(window_size):
    keep = Draw.seeded(4).coin(1, 1, LENGTH)
    check(PATTERNS["random"][None, None], LENGTH + 3, window_size, keep=keep)


def test_segments_grow_with_the_length():
    check(Draw.seeded(6).normal(1, 1, 60), 60, 8, sizes=SIZES._replace(segment=8, segment_chunk=8))


def test_one_row_of_scores_for_every_head_and_sequence():
    draw = Draw.seeded(5)
    check(draw.normal(1, 1, 40), 40, 5, keep=draw.coin(2, 2, 40))


@pytest.mark.parametrize("seed", SEEDS)
def test_random(seed):
    """Shapes, layouts, values, padding and window drawn from a seed."""
    rng, draw = random.Random(seed), Draw.seeded(seed)
    batch, heads = rng.choice([(1, 1), (2, 1), (1, 2)])
    seqlen_k = rng.choice([5, 16, 31, 33, 57])
    dtype = rng.choice([torch.float32, torch.float16])
    scores = draw.normal(rng.choice([1, batch]), rng.choice([1, heads]), seqlen_k, dtype=dtype)
    if rng.random() < 0.4:
        scores = (scores * 2).round()
    if rng.random() < 0.3:
        scores[draw.coin(*scores.shape, share=0.3)] = rng.choice([NAN, INF, -INF, -0.0])
    if rng.random() < 0.5:
        scores = scores.transpose(1, 2).contiguous().transpose(1, 2)
    keep = None
    if rng.random() < 0.6:
        share = rng.choice([0.0, 0.05, 0.5, 0.9])
        keep = draw.coin(rng.choice([1, batch]), rng.choice([1, heads]), seqlen_k, share=share)
    window_size = rng.choice([1, 2, 3, 10, 16, 20, seqlen_k])
    seqlen_q = rng.choice([seqlen_k, seqlen_k, 0, 1, seqlen_k // 2, seqlen_k + 9])
    check(scores, seqlen_q, window_size, rng.random() < 0.75, keep)


def boundaries(*lengths: int, first: int = 0) -> Tensor:
    return torch.tensor((first, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize(
    "lengths",
    [(44,), (0,), (0, 0, 16, 0), (1, 1, 1), (8, 16, 17, 3), (40, 4), (4, 40)],
    ids=str,
)
@pytest.mark.parametrize("causal", [True, False])
def test_packed(lengths, causal):
    """Empty sequences, of one token, of whole segments and beyond; tokens behind the last."""
    scores = PATTERNS["duplicates"][None, None]
    check(scores, -1, 5, causal, cu_seqlens=boundaries(*lengths))


@pytest.mark.parametrize("pattern", ["ascending", "descending", "special"])
@pytest.mark.parametrize("window_size", [1, 20])
def test_packed_patterns(pattern, window_size):
    """Keys that all join, or never, and windows longer than a sequence."""
    check(PATTERNS[pattern][None, None], -1, window_size, cu_seqlens=boundaries(3, 35, 6))


def test_segments_of_packed_sequences_grow_with_their_length():
    sizes = SIZES._replace(segment=8, segment_chunk=8, block=4)
    check(Draw.seeded(7).normal(1, 1, 104), -1, 8, cu_seqlens=boundaries(60, 9, 35), sizes=sizes)


def test_no_sequence_at_all():
    start, end = selection.topk_intervals(
        torch.zeros(1, 2, 9), -1, 3, True, None, boundaries(), SIZES
    )
    assert start.shape == end.shape == (1, 2, 9)
    assert not start.any()
    assert not end.any()


@pytest.mark.parametrize("seed", PACKED_SEEDS)
def test_packed_random(seed):
    """Lengths, layouts, values, padding and window drawn from a seed."""
    rng, draw = random.Random(seed), Draw.seeded(seed)
    lengths = rng.choices([0, 1, 2, 7, 8, 15, 16, 17, 31, 33], k=rng.randint(1, 5))
    cu_seqlens = boundaries(*lengths, first=rng.choice([0, 0, 3]))
    tokens = int(cu_seqlens[-1]) + rng.choice([0, 1, 30])
    heads = rng.choice([1, 2])
    scores = draw.normal(1, tokens, rng.choice([1, heads])).transpose(1, 2)
    if rng.random() < 0.5:
        scores = (scores * 2).round()
    if rng.random() < 0.3:
        scores = scores.masked_fill(draw.coin(*scores.shape, share=0.3), rng.choice([NAN, -INF]))
    keep = None
    if rng.random() < 0.5:
        keep = draw.coin(1, heads, tokens, share=rng.choice([0.1, 0.7]))
    sizes = rng.choice([SIZES, SIZES._replace(segment=8, segment_chunk=8, block=4)])
    window_size = rng.choice([1, 2, 5, 16, 40])
    check(scores, -1, window_size, rng.random() < 0.75, keep, cu_seqlens, sizes)
