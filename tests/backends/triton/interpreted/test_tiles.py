"""The preparation kernels and the spans of tiles, each against brute force over elements."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from flash_sparse_attn.backends.triton.kernels import arguments, preparation, tuning
from flash_sparse_attn.backends.triton.kernels.arguments import Bounds
from flash_sparse_attn.backends.triton.kernels.spans import key_tile_span, query_tile_span
from torch.nn import functional as F

from flash_sparse_attn.masks import IntervalMask

from .calls import Draw
from .pairs import Call, classes_of, tiles_with_everything, tiles_with_something

BLOCK = tuning.INTERPRETED_MASK_BLOCK

WINDOWS = [(None, None), (0, 0), (5, None), (None, 3), (40, 10)]
LENGTHS = [(1, 1), (64, 128), (33, 200), (150, 70)]
BLOCKS = [(32, 64), (64, 32)]


# Spans: tiles by bounds alone


@triton.jit
def key_spans_kernel(
    out,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    M: tl.constexpr,
    N: tl.constexpr,
):
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    tile = tl.program_id(0)
    sinks, low, full_low, full_high, high = key_tile_span(bounds, tile * M, M, N)
    tl.store(out + tile * 5, sinks)
    tl.store(out + tile * 5 + 1, low)
    tl.store(out + tile * 5 + 2, full_low)
    tl.store(out + tile * 5 + 3, full_high)
    tl.store(out + tile * 5 + 4, high)


@triton.jit
def query_spans_kernel(
    out,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    M: tl.constexpr,
    N: tl.constexpr,
):
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    tile = tl.program_id(0)
    low, full_low, full_high, high = query_tile_span(bounds, tile * N, M, N)
    tl.store(out + tile * 5, 0)
    tl.store(out + tile * 5 + 1, low)
    tl.store(out + tile * 5 + 2, full_low)
    tl.store(out + tile * 5 + 3, full_high)
    tl.store(out + tile * 5 + 4, high)


SPANS = {"keys of a query tile": key_spans_kernel, "rows of a key tile": query_spans_kernel}


@pytest.mark.parametrize("sinks", [0, 45, 1000])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("direction", SPANS)
def test_spans(direction, causal, window, sinks):
    """A span visits every tile that holds something, once, and no other; it calls full the tiles
    that hold everything but those of sinks. Where the tile whose span it is ends does not matter.
    """
    left, right = window
    options = {"causal": causal, "window_left": left, "window_right": right, "sinks": sinks}
    for (seqlen_q, seqlen_k), (m, n) in itertools.product(LENGTHS, BLOCKS):
        call = Call(seqlen_q, seqlen_k, **options)
        some = tiles_with_something(call.visible, m, n)[0, 0]
        if direction == "rows of a key tile":
            whole = F.pad(call.visible, (0, -seqlen_k % n), value=True)
            some, every = some.T, tiles_with_everything(whole, m, n)[0, 0].T
        else:
            whole = F.pad(call.visible, (0, 0, 0, -seqlen_q % m), value=True)
            every = tiles_with_everything(whole, m, n)[0, 0]
        spans = torch.full((len(some), 5), -1, dtype=torch.int32)
        SPANS[direction][(len(some),)](spans, *arguments.bounds(call.problem), M=m, N=n)
        for tile, (first, low, full_low, full_high, high) in enumerate(spans.tolist()):
            told = f"tile {tile} of Sq {seqlen_q} Sk {seqlen_k} in tiles of {m} x {n}"
            assert first <= low <= full_low <= full_high <= high, told
            visited = [*range(first), *range(low, high)]
            full = list(range(full_low, full_high))
            want_full = [x for x in every[tile].nonzero().flatten().tolist() if x >= first]
            assert visited == some[tile].nonzero().flatten().tolist(), told
            assert full == want_full, told


# Packed masks


MASK_SIZES = [(1, 1, 70, 100), (2, 2, 33, 300), (1, 2, 128, 128), (2, 1, 40, 1), (1, 1, 2, 31)]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("sizes", MASK_SIZES, ids=str)
def test_packed_mask(sizes, share):
    """Bits are those of the mask, 0 where nothing exists, and blocks have the right class."""
    batch, _, rows, keys = sizes
    mask = Draw.seeded(1).coin(*sizes, share=share)
    mask[..., : rows // 2, : keys // 2] = True
    call = Call(rows, 5 if keys == 1 else keys, batch, (2, 2), {"mask": mask.mT.clone().mT})
    *_, terms, _ = preparation.prepare(call.problem, call.tensors, "forward")
    packed = terms.mask

    bits = packed.words.unsqueeze(-1) >> torch.arange(32) & 1
    bits = bits.flatten(-2).bool()
    if keys == 1:  # one word stands for every key
        mask = mask.expand(*mask.shape[:3], 32)
        keys = 32
    beyond = bits.clone()
    beyond[..., :rows, :keys] = False
    assert torch.equal(bits[..., :rows, :keys], mask)
    assert not beyond.any()
    want = classes_of(mask, BLOCK, BLOCK)
    got = packed.classes[..., : want.shape[-2], : want.shape[-1]]
    assert torch.equal(got.int(), want)


# Runs of rows


KEY_TERMS = {
    "key mask": lambda draw: {"mask": draw.coin(2, 4, 1, 100)},
    "one mask for all keys": lambda draw: {"mask": draw.coin(2, 1, 1, 1)},
    "intervals": lambda draw: {
        "interval_start": draw.integers(-5, 60, 1, 2, 100),
        "interval_end": draw.integers(-5, 90, 1, 2, 100),
    },
    "intervals beside the rows": lambda draw: {
        "interval_start": draw.integers(-50, 90, 1, 2, 100),
        "interval_end": draw.integers(-50, 120, 1, 2, 100),
    },
    "both": lambda draw: {
        "mask": draw.coin(1, 2, 1, 100, share=0.8),
        "interval_start": draw.integers(-5, 30, 2, 1, 100),
        "interval_end": draw.integers(20, 90, 2, 1, 100),
    },
}


BOUNDS = [{}, {"causal": True}, {"window_left": 9, "sinks": 40}, {"window_left": 9}]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("terms", KEY_TERMS)
def test_runs_of_rows(terms, bounds):
    """A row is inside a key's run where it sees the key; extrema are those of the runs, and live
    keys those that have one.
    """
    tensors = KEY_TERMS[terms](Draw.seeded(2))
    call = Call(70, 100, 2, (4, 2), tensors, **bounds)
    ranges, live = preparation.key_ranges(call.problem, call.tensors, None, BLOCK)

    i = torch.arange(70)[:, None]
    runs = (ranges.first[:, :, None] <= i) & (i <= ranges.last[:, :, None])
    runs = runs.repeat_interleave(4 // runs.shape[1], 1)
    assert torch.equal(runs[..., :100].expand_as(call.visible), call.visible)
    assert not runs[..., 100:].any()
    first, last = (x.unflatten(-1, (-1, BLOCK)) for x in (ranges.first, ranges.last))
    extrema = torch.stack([first.amin(-1), first.amax(-1), last.amin(-1), last.amax(-1)], -1)
    assert torch.equal(ranges.extrema, extrema)
    seen = runs[:, :: ranges.heads_per_head].any(2).unflatten(-1, (-1, BLOCK))
    assert torch.equal(live, seen.sum(-1))


# Lists of tiles


def dense(draw, batch, heads, seqlen_q, seqlen_k):
    """A mask with blocks of every class and something ragged."""
    mask = draw.coin(batch, heads, seqlen_q, seqlen_k, share=0.03)
    mask[..., :64, :64] = True
    mask[..., 64:, :128] = False
    mask[:1, :, :, 160:] = True
    return {"mask": mask}


def top_keys(draw, batch, heads, seqlen_q, seqlen_k):
    mask = IntervalMask.topk(draw.normal(batch, heads, seqlen_k), 20)
    return {"interval_start": mask.start, "interval_end": mask.end}


def documents(draw, batch, heads, seqlen_q, seqlen_k):
    boundaries = torch.tensor([0, 60, 64, 130, seqlen_k], dtype=torch.int32)
    mask = IntervalMask.documents(boundaries, seqlen_k)
    return {"interval_start": mask.start, "interval_end": mask.end}


def nothing(draw, batch, heads, seqlen_q, seqlen_k):
    return {"mask": torch.zeros(batch, heads, 1, seqlen_k, dtype=torch.bool)}


def everything(draw, batch, heads, seqlen_q, seqlen_k):
    return {"mask": torch.ones(batch, heads, seqlen_q, seqlen_k, dtype=torch.bool)}


LISTED = {
    "mask": (dense, {}),
    "mask, causal": (dense, {"causal": True}),
    "mask, window": (dense, {"window_left": 50, "sinks": 10}),
    "top keys": (top_keys, {}),
    "top keys, causal": (top_keys, {"causal": True}),
    "documents, causal": (documents, {"causal": True}),
    "nothing": (nothing, {}),
    "everything": (everything, {}),
    "everything, causal": (everything, {"causal": True}),
}
EXACT = ("mask", "documents, causal", "nothing", "everything", "everything, causal")
"""Where no tile is emptied by two rules, or two blocks, only together."""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [(32, 64), (128, 32)], ids=str)
@pytest.mark.parametrize("case", LISTED)
def test_lists_of_tiles(case, tile, transposed):
    """A list holds every tile with something visible, once: full ones first, the rest from the
    back; and full ones are those with everything visible.
    """
    make, options = LISTED[case]
    batch, heads, seqlen = (1, (2, 1), 200) if case in EXACT else (2, (4, 2), 200)
    tensors = make(Draw.seeded(3), batch, heads[1], seqlen, seqlen)
    tensors["bias"] = torch.zeros(1, 1, seqlen, seqlen)  # of pairs: keys stay where they are
    call = Call(seqlen, seqlen, batch, heads, tensors, **options)
    *_, terms, slots = preparation.prepare(call.problem, call.tensors, "forward")
    assert slots is None
    m, n = tile
    lists = preparation.list_tiles(
        call.problem, terms, slots, tuning.Tile(m, n, 4, 1, False), transposed=transposed
    )
    assert not lists.spans.value
    some = tiles_with_something(call.visible, m, n)
    every = tiles_with_everything(call.visible, m, n)
    if transposed:
        some, every = some.mT, every.mT
    own, other = some.shape[-2:]
    assert lists.length == other

    wasted = 0
    for b, h, t in itertools.product(range(batch), range(heads[0]), range(own)):
        at = b * lists.batch + h // lists.heads_per_head * lists.head + t
        index = lists.index.view(-1, other)[at].tolist()
        n_full, n_partial, missing = lists.counts.view(-1, 3)[at].tolist()
        full, partial = index[:n_full], index[other - n_partial :]
        assert not missing  # blocks
        assert full == every[b, h, t].nonzero().flatten().tolist()
        assert len({*full, *partial}) == n_full + n_partial
        assert {*full, *partial} <= {*range(other)}
        missed = {*some[b, h, t].nonzero().flatten().tolist()} - {*full, *partial}
        assert not missed
        wasted += n_full + n_partial - int(some[b, h, t].sum())
    assert wasted == 0 if case in EXACT else wasted <= 0.25 * math.prod(some.shape)


def test_bounds_alone_need_no_lists():
    call = Call(70, 100, causal=True, window_left=5, sinks=3)
    *_, terms, slots = preparation.prepare(call.problem, call.tensors, "forward")
    assert terms.ranges is None
    assert terms.mask is None
    assert slots is None
    tile = tuning.tile("forward", call.problem)
    assert preparation.list_tiles(call.problem, terms, slots, tile) is None
