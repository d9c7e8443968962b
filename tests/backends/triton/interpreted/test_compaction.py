"""Compaction: what slots hold, and which tiles of them are visited, by brute force over pairs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from flash_sparse_attn.backends.triton.kernels import (
    arguments,
    compaction,
    preparation,
    segment_keys,
    tuning,
)
from flash_sparse_attn.backends.triton.kernels.arguments import Place
from flash_sparse_attn.backends.triton.kernels.sizes import ceil_div
from flash_sparse_attn.backends.triton.kernels.spans import slot_tile_span
from torch.nn import functional as F

from .calls import TOLERANCE, Draw, check
from .compacted import CALLS, Compacted, compacted, top_keys
from .memory import checked_memory
from .pairs import Call, tiles_with_everything, tiles_with_something

RECORD_BLOCK = arguments.RECORD_BLOCK
FAR = 2**31 - 1

SMALL = {"LIVE_CHUNK": 64, "ENTRIES": 2, "CHUNK": 32, "SORT_CHUNK": 16, "BUCKETS": 4}
"""Chunks of which even a small call has several."""


@pytest.mark.parametrize("chunks", [{}, SMALL], ids=["large chunks", "small chunks"])
@pytest.mark.parametrize("case", CALLS)
def test_slots_of_segments(case, chunks, monkeypatch):
    """A segment's slots hold the keys that its rows see, each once: first those that only leave, by
    their last row, in buckets, then the others by key, which is by their first row; where the
    number of keys is unknown, all by key.
    """
    for name, size in chunks.items():
        monkeypatch.setattr(segment_keys, name, size)
    found = Compacted(CALLS[case](Draw.seeded(1)))
    rows = min(found.slots.rows, found.call.problem.seqlen_q)
    for visible, keys in found.segments():
        assert sorted(keys) == visible.any(0).nonzero().flatten().tolist()
        if not found.slots.ordered.value:
            assert keys == sorted(keys)
            continue
        seen = visible[:, keys]
        enters = seen.int().argmax(0)
        leaves = rows - 1 - F.pad(seen, (0, 0, 0, rows - len(seen))).flip(0).int().argmax(0)
        stays = (enters > 0) | (leaves == len(seen) - 1)
        bucket = torch.where(stays, segment_keys.BUCKETS, leaves * segment_keys.BUCKETS // rows)
        order = list(zip(bucket.tolist(), keys, strict=True))
        assert enters[stays].tolist() == sorted(enters[stays].tolist())
        assert order == sorted(order)


@pytest.mark.parametrize("case", CALLS)
def test_several_segments_where_the_number_of_keys_is_known(case):
    """What the other tests rely on."""
    call, slots = compacted(case).call, compacted(case).slots
    known = compaction.keys_per_row(call.problem) is not None
    assert slots.ordered.value == known
    assert (slots.segments > 1) == (known and call.problem.seqlen_q > slots.rows)
    assert slots.shared.value == (slots.segments == 1)
    assert slots.capacity % RECORD_BLOCK == 0


def test_no_row_sees_more_than_all_keys():
    """However far a window reaches: sizes stay those of integers on the device."""
    mask = {"mask": torch.ones(1, 1, 1, 100, dtype=torch.bool)}
    call = Call(70, 100, tensors=mask, causal=True, window_left=2**31 - 2)
    assert compaction.keys_per_row(call.problem) == 100
    call = Call(70, 100, tensors=top_keys(Draw.seeded(1), 70, 100, heads=1), keys_per_row=2**31 - 1)
    assert compaction.keys_per_row(call.problem) == 100


BIASES = {
    "shared": (1, 1, 1, 200),
    "per key-value head": (2, 2, 1, 200),
    "per head": (1, 4, 1, 200),
    "one number": (2, 1, 1, 1),
}


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("known", [False, True])
def test_gathered_keys(known, kind):
    """Slots hold k, v, bias and rows of their keys; the rest of a tile is 0 and hidden."""
    draw = Draw.seeded(2)
    heads = BIASES[kind][1]
    terms = top_keys(draw, 150, 200)
    terms["bias"] = draw.normal(*reversed(BIASES[kind])).permute(3, 2, 1, 0)
    call = Call(150, 200, 2, (4, 2), terms, dim=20, keys_per_row=20 * known)
    call.tensors = replace(call.tensors, k=call.tensors.k.mT.contiguous().mT)
    found = Compacted(call)
    tensors, bias = found.tensors, found.terms.bias.pointer
    ranges, source = found.terms.ranges, found.slots
    want_bias = terms["bias"].float().expand(-1, max(heads, 2), 1, 200)
    for b, n in itertools.product(range(2), range(2)):
        plane = b % found.planes[0], n % found.planes[1]
        key = found.keys[plane]
        used = key >= 0
        in_tile = used.view(-1, RECORD_BLOCK).any(1).repeat_interleave(RECORD_BLOCK)
        beside = in_tile & ~used
        assert beside.any()
        for name in ("k", "v"):
            got, want = getattr(tensors, name)[b, :, n], getattr(call.tensors, name)[b, :, n]
            assert torch.equal(got[used], want[key[used]])
            assert not got[beside].any()
        for h in range(n * want_bias.shape[1] // 2, (n + 1) * want_bias.shape[1] // 2):
            got, want = bias[b % len(bias), h], want_bias[b % len(want_bias), h, 0]
            assert torch.equal(got[used], want[key[used]])
            assert not got[beside].any()
        for name, none in (("first", FAR), ("last", -FAR - 1)):
            got, want = getattr(ranges, name)[plane], getattr(source, name)[plane]
            assert torch.equal(got[used], want[key[used]])
            assert (got[beside] == none).all()
    assert torch.equal(tensors.q, call.tensors.q)


@pytest.mark.parametrize("case", CALLS)
def test_extrema_of_slots(case):
    """Of the rows of each block; a block without keys is never seen."""
    found = compacted(case)
    block, ranges = found.terms.block, found.terms.ranges
    used = (found.keys >= 0).unflatten(-1, (-1, block))
    first, last = (
        x.unflatten(-1, (-1, block)).where(used, none)
        for x, none in ((ranges.first, FAR), (ranges.last, -FAR - 1))
    )
    extrema = torch.stack([first.amin(-1), first.amax(-1), last.amin(-1), last.amax(-1)], -1)
    assert torch.equal(ranges.extrema, extrema)


# Tiles of slots


TILES = [(32, 64), (64, 32)]


def visited_keys(lists, b, h, own):
    """(visited, full) tiles of a query tile."""
    at = b * lists.batch + h // lists.heads_per_head * lists.head + own
    index = lists.index[at * lists.length : (at + 1) * lists.length].tolist()
    if lists.spans.value:
        low, full_low, full_high, high = index
        assert low <= full_low <= full_high <= high
        return list(range(low, high)), list(range(full_low, full_high))
    n_full, n_partial = lists.counts[3 * at : 3 * at + 2].tolist()
    full = index[:n_full]
    return sorted(full + index[lists.length - n_partial :]), full


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", CALLS)
def test_key_tiles(case, tile):
    """A query tile visits every tile of slots that it sees something of, once, and slots of its own
    segment alone; those it calls full hide nothing. What it visits in vain is little.
    """
    m, n = tile
    found = compacted(case)
    problem = found.call.problem
    with checked_memory():
        lists = preparation.list_tiles(
            problem, found.terms, found.slots, tuning.Tile(m, n, 4, 1, False)
        )
    some = tiles_with_something(found.visible, m, n)
    every = tiles_with_everything(found.visible, m, n)
    used = tiles_with_something(found.keys[:, :, None] >= 0, 1, n)
    wasted = 0
    for b, h, t in itertools.product(*map(range, some.shape[:3])):
        visited, full = visited_keys(lists, b, h, t)
        assert len(set(visited)) == len(visited)
        missed = set(some[b, h, t].nonzero().flatten().tolist()) - set(visited)
        assert not missed
        assert every[b, h, t, full].all()
        own = t * m // found.slots.rows
        segment = [x * n // found.slots.capacity for x in visited]
        assert set(segment) <= {own}
        plane = b % found.planes[0], h * found.planes[1] // problem.heads_q
        assert used[plane][0, visited].all()
        if lists.spans.value and every[b, h, t].any():
            assert full[0] == every[b, h, t].int().argmax()
        wasted += len(visited) - int(some[b, h, t].sum())
    assert wasted <= 0.35 * max(int(some.sum()), 4)


@triton.jit
def slot_spans_kernel(
    out, slots, ranges, heads, seqlen_q, M: tl.constexpr, N: tl.constexpr, SUB: tl.constexpr
):
    tiles = slots.total // N
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    place = Place(plane // heads, 0, 0, 0, 0, 0)
    start_q = tile * N // slots.capacity * slots.rows
    low, full_low, full_high, high = slot_tile_span(
        slots, ranges, place, plane % heads, tile, start_q, seqlen_q, M, N, SUB
    )
    tl.store(out + tl.program_id(0) * 4, low)
    tl.store(out + tl.program_id(0) * 4 + 1, full_low)
    tl.store(out + tl.program_id(0) * 4 + 2, full_high)
    tl.store(out + tl.program_id(0) * 4 + 3, high)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", CALLS)
def test_query_tiles_of_slots(case, tile):
    """A tile of slots visits every query tile that sees something of it, of its own segment; those
    it calls full see everything.
    """
    m, n = tile
    found = compacted(case)
    problem, slots = found.call.problem, found.slots
    shape = (problem.batch, problem.heads_q, slots.total // n)
    spans = torch.full((*shape, 4), -1, dtype=torch.int32)
    with checked_memory():
        slot_spans_kernel[(math.prod(shape),)](
            spans,
            slots,
            found.terms.ranges,
            problem.heads_q,
            problem.seqlen_q,
            M=m,
            N=n,
            SUB=found.terms.block,
        )
    some = tiles_with_something(found.visible, m, n).mT
    every = tiles_with_everything(found.visible, m, n).mT
    for b, h, t in itertools.product(*map(range, shape)):
        low, full_low, full_high, high = spans[b, h, t].tolist()
        assert low <= full_low <= full_high <= high
        seen = some[b, h, t].nonzero().flatten().tolist()
        assert set(seen) <= set(range(low, high))
        assert every[b, h, t, full_low:full_high].all()
        own = t * n // slots.capacity * slots.rows
        assert not seen or own // m <= low <= high <= ceil_div(own + slots.rows, m)
        if every[b, h, t].any():
            assert full_low == every[b, h, t].int().argmax()
            assert full_high - full_low == every[b, h, t].sum()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tiles_of_half_a_block(dtype, monkeypatch):
    """As those of float32 are on a GPU: one block's rows bound what a tile sees."""
    monkeypatch.setattr(tuning, "INTERPRETED_MASK_BLOCK", 64)
    kernels = ("forward", "key_gradients", "query_gradients")
    call = Call(
        150, 200, 1, (2, 1), top_keys(Draw.seeded(4), 150, 200, heads=1), 16, dtype, keys_per_row=20
    )
    tiles = [tuning.tile(kernel, call.problem, gathered=True) for kernel in kernels]
    assert any(tile.block_n < tuning.mask_block(call.problem) for tile in tiles)
    check(call.tensors, call.options)
