"""The softmax threshold (T1): which blocks are kept, decided before anything is summed up.

Scores are bounded by products of 8-bit integers. With q = s q8 + e, k = t k8 + f, where no element
of e exceeds s / 2 and none of f exceeds t / 2,

    |<q, k> - s t <q8, k8>|  <=  t / 2 |s q8|_1 + s / 2 |k|_1,

|x|_1 the sum of absolute elements: the integer product is exact, costs half of one of 16 bits, and
is the same for every dtype. Two bounds then meet. From below, the sum of a row's exponentials over
the tiles that are likely to hold much, the first and those on the diagonal: T1 lets go what is
small against the final sum, all the more what is small against a part of it. From above, the
greatest score of a row in a block of keys. Forward and backward then visit what was kept.

Where few blocks can go, looking at all of them costs more than it saves: a launch over every
`EACH`th query tile looks at a sample, and those tiles of which one block in `WORTH` can go are
screened.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, gates, preparation, tuning
from .arguments import RECORD_BLOCK, Bounds, Terms
from .blocks import of_kept
from .primitives import (
    KEPT_KEYS,
    KEPT_ROWS,
    LOG2E,
    gate,
    load_alpha,
    load_bias,
    load_delta,
    load_tile,
    scores,
    unpruned,
    visible,
)
from .sequences import place_tile, placed
from .sizes import ceil_div
from .spans import key_tiles, nth_tile, scheduled, visited_tile

STEPS: tl.constexpr = tl.constexpr(127.0)
"""The greatest integer, so that its negative is one too."""
HALF: tl.constexpr = tl.constexpr(0.5001)
"""Of a step, what rounding to integers takes from an element, and float32 beside it."""
LANES: tl.constexpr = tl.constexpr(4)
"""Threads that share a row of a product in the layout of the tensor cores."""
NARROWEST = 32
"""Columns of the least product of 8-bit integers."""
SOURCES = {True: 2, False: 4}
"""Of full tiles and of partial ones, from how many a row's sum is bounded, where a sample is looked
at and where all are: the first, where sinks are, and the last, which are near."""
EACH = 16
"""Query tiles for which one decides."""
SAMPLE = 4
"""Key tiles that decide, where there are `SAMPLE` * 4 or more; else all are looked at."""
WORTH = 8
"""Of so many blocks of a sample, one at least must be droppable."""


class KeyBounds(NamedTuple):
    """What bounds the scores of keys, by block of the record axis."""

    keys: torch.Tensor
    """int8 `[B, Hkv, blocks * block, D]`, D padded with 0: keys in steps of their block."""
    steps: torch.Tensor
    """float32 `[B, Hkv, blocks]`: t."""
    norms: torch.Tensor
    """Likewise: the greatest |k|_1 of a key of the block."""
    bias: torch.Tensor
    """float32 `[B, Hq, blocks]`: the greatest bias (S4) in base 2, where `biased`."""
    batch: int
    """In blocks, as the others."""
    head: int
    bias_batch: int
    bias_head: int
    biased: Any


@triton.jit
def _in_steps(x, largest):
    """(x8, step): x in integers of at most `STEPS` steps, `largest` being its greatest absolute
    element, of all or of a row.
    """
    step = tl.where(largest > 0.0, largest * (1.0 / STEPS), 1.0)
    return tl.floor(x * (1.0 / step) + 0.5).to(tl.int8), step


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads_kv", "blocks"])
def key_bounds_kernel(
    k,
    keys,
    steps,
    norms,
    seqlen_q,
    seqlen_k,
    sequences,
    heads_kv,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUB: tl.constexpr,
    RECORD: tl.constexpr,
):
    """One block of `KeyBounds`; grid batch * kv heads * blocks. Keys that do not exist are 0."""
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    n = plane % heads_kv
    nth = block * SUB // RECORD
    if sequences is None:
        nth += plane // heads_kv * (blocks * SUB // RECORD)
    place, _, n_k, tile, _exists = place_tile(
        seqlen_q, seqlen_k, sequences, nth, blocks * SUB // RECORD, RECORD, True
    )
    start_k = tile * RECORD + block * SUB % RECORD
    x = load_tile(
        k, place.batch, n, place.key + start_k, place.key + n_k, SUB, D, BLOCK_D, True, False
    ).to(tl.float32)
    exists = (start_k + tl.arange(0, SUB) < n_k)[:, None]
    x = tl.where(exists, x, 0.0)
    x8, step = _in_steps(x, tl.max(tl.max(tl.abs(x), 1), 0))
    row = tl.program_id(0).to(tl.int64) * SUB + tl.arange(0, SUB)
    tl.store(keys + row[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], x8)
    tl.store(steps + tl.program_id(0), step)
    tl.store(norms + tl.program_id(0), tl.max(tl.sum(tl.abs(x), 1), 0))


@triton.jit
def _products(q8, known, first, BLOCK_N: tl.constexpr, SUB: tl.constexpr, BLOCK_D: tl.constexpr):
    """<q8, k8> for BLOCK_N keys from the block `first` on."""
    start = known.keys + first.to(tl.int64) * (SUB * BLOCK_D)
    rows = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D
    k8 = tl.load(start + (rows + tl.arange(0, BLOCK_D)[None, :]))
    return tl.dot(q8, tl.trans(k8), out_dtype=tl.int32)


@triton.jit
def _largest(product, BLOCK_M: tl.constexpr, PARTS: tl.constexpr, SUB: tl.constexpr):
    """The greatest products of rows in parts of SUB keys, [BLOCK_M, PARTS, LANES]: over the keys
    that one thread holds, two neighbours of every 2 * LANES, so that none has to be exchanged.
    """
    held = tl.reshape(product, [BLOCK_M, PARTS, SUB // (2 * LANES), LANES, 2])
    return tl.max(tl.max(held, 2), 3)


@triton.jit
def _both(x, y):
    return x & y


@triton.jit
def _take(gone, entry, there, COUNTED: tl.constexpr):
    """Take the bits that are set in all of `gone` from words of kept bits, one a row block of a
    query tile; returns how many they are, if COUNTED.

    All rows or none, so that tiles of the attention kernels stay whole.
    """
    taken = tl.reduce(tl.ravel(gone), 0, _both)
    clear = tl.zeros(there.shape, tl.int32) + ~taken
    tl.atomic_and(entry, clear, mask=there & (taken != 0), sem="relaxed")
    spared = 0
    if COUNTED:
        spared = tl.sum(taken >> tl.arange(0, 32) & 1, 0)
    return spared


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_q", "group", "tiles_q", "n_tiles_q"])
def screen_kernel(
    q,
    known,
    kept,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    score,
    gates,
    bias,
    mask,
    blocks,
    ranges,
    sequences,
    lists,
    worth,
    threshold,
    heads_q,
    group,
    tiles_q,
    n_tiles_q,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    RISES: tl.constexpr,
    SOURCES: tl.constexpr,
    SAMPLE: tl.constexpr,
    WORTH: tl.constexpr,
    EACH: tl.constexpr,
    SAMPLING: tl.constexpr,
):
    """Take from the bits of `kept` those of blocks that a query tile lets go; grid query tiles *
    batch * heads or, SAMPLING, one of EACH of these tiles. Then the last of them looks at a sample
    and tells by `worth` whether the others shall look at all.

    RISES says whether scores rise with the products; else those of -q do.
    """
    h, nth = scheduled(None, heads_q, group, tiles_q, not SAMPLING)
    if SAMPLING:
        decision = worth + tl.program_id(0)
        tl.store(decision, 1)
        nth = tl.minimum(nth * EACH + EACH - 1, n_tiles_q - 1)
    else:
        decision = worth + nth // EACH * heads_q + h
        if tl.load(decision) == 0:
            return
    place, n_q, n_k, tile_q, exists = place_tile(
        seqlen_q, seqlen_k, sequences, nth, tiles_q, BLOCK_M, False
    )
    bounds = Bounds(
        n_q, n_k, left, right, tl.minimum(left_sinks, n_k), tl.minimum(right_sinks, n_k)
    )
    if not exists:
        return
    start_q = tile_q * BLOCK_M
    i = start_q + tl.arange(0, BLOCK_M)
    exists = i < n_q
    own = nth if sequences is not None else tile_q
    tiles, n_full, n_partial = key_tiles(bounds, lists, place, h, tile_q, own, BLOCK_M, BLOCK_N)
    n_tiles = n_full + n_partial
    if n_tiles == 0:  # a list of none has no number to start from
        return
    q_tile = load_tile(
        q, place.batch, h, place.row + start_q, place.row + n_q, BLOCK_M, D, BLOCK_D, True, False
    )
    sign: tl.constexpr = 1.0 if RISES else -1.0
    q_tile = q_tile.to(tl.float32) * sign
    q8, step = _in_steps(q_tile, tl.max(tl.abs(q_tile), 1)[:, None])
    step = tl.reshape(step, [BLOCK_M])
    half_norm = tl.sum(tl.abs(q8.to(tl.float32)), 1) * step * HALF
    plane = place.batch * known.batch + h // group * known.head
    base = plane + place.key_record // SUB
    row_step = step[:, None, None]
    row_half_norm = half_norm[:, None, None]
    PARTS: tl.constexpr = BLOCK_N // SUB
    part = tl.arange(0, PARTS)
    alpha = None
    if gates is not None:
        alpha = load_alpha(gates, place, h, i)

    # From below: what a row's sum is at least.
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for PARTIAL in tl.static_range(1, -1, -1):
        n = n_partial if PARTIAL else n_full
        for source in range(tl.minimum(n, SOURCES)):
            t = tl.where((source == 0) | (n < SOURCES), source, n - SOURCES + source)
            tile_k = nth_tile(tiles, lists, t, PARTIAL)
            start_k = tile_k * BLOCK_N
            j = start_k + tl.arange(0, BLOCK_N)
            first = base + start_k // SUB
            product = _products(q8, known, first, BLOCK_N, SUB, BLOCK_D)
            key_step = tl.load(known.steps + first + part)[None, :, None]
            norm = tl.load(known.norms + first + part)[None, :, None] * HALF
            x = tl.reshape(product, [BLOCK_M, PARTS, SUB]).to(tl.float32)
            x = x * (row_step * key_step) - (row_half_norm * key_step + row_step * norm)
            x = tl.reshape(x, [BLOCK_M, BLOCK_N]) * sign
            row_alpha = None
            delta = None
            bias_tile = None
            if gates is not None:
                row_alpha = alpha[:, None]
                delta = load_delta(gates, place, h, j)[None, :]
            if bias is not None:
                bias_tile = load_bias(bias, place, h, i[:, None], j[None, :], bounds)
            s, _, gated, _ = scores(x, score, gates, row_alpha, delta, bias_tile)
            x = s.to(tl.float32)
            if PARTIAL:
                keep = visible(
                    place, h, start_q, start_k, bounds, mask, blocks, ranges,
                    BLOCK_M, BLOCK_N, False,
                )  # fmt: skip
                if gates is not None:
                    keep = unpruned(keep, gated, gates, place, h, i[:, None])
                x = tl.where(keep, x, float("-inf"))  # N2
            new_peak = tl.maximum(peak, tl.max(x, 1))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(x - shift[:, None]), 1)
            peak = new_peak
    # The keys of the tiles that are visited are no fewer than those that a row sees.
    n = tl.minimum(n_tiles * BLOCK_N, bounds.seqlen_k)
    share = tl.log2(threshold / tl.maximum(n, 1).to(tl.float32))
    level = tl.where(exists, peak + tl.log2(total) + share, float("inf"))

    # From above: a sample of the tiles, or all of them.
    GROUPS: tl.constexpr = BLOCK_M // KEPT_ROWS
    BITS: tl.constexpr = SUB // KEPT_KEYS
    bits = ((tl.constexpr(1) << BITS) - 1) << part * BITS
    row = start_q // KEPT_ROWS + tl.arange(0, GROUPS)
    there = row * KEPT_ROWS < n_q
    entry = kept.words + tl.cast(place.batch, tl.int64) * kept.batch
    entry += tl.cast(h, tl.int64) * kept.head + (place.row_block + row).to(tl.int64) * kept.row
    row_bias = None
    if bias is not None and not known.biased:  # of rows
        row_bias = load_bias(bias, place, h, i, i, None)[:, None, None].to(tl.float32) * LOG2E
    stride = 1
    n_looks = n_tiles
    if SAMPLING:
        stride = n_tiles // SAMPLE
        n_looks = tl.where(n_tiles >= SAMPLE * 4, SAMPLE, 0)
    spared = 0
    # A thread notes in the bits of a word of `kept` what its elements let go. All vote where the
    # next tile is of another word, as that takes barriers: once in 1024 keys that follow each
    # other. A word may be come back to, as bits are only ever taken.
    gone = tl.zeros([BLOCK_M, LANES], tl.int32)
    # What belongs to a tile is read one tile ahead.
    tile_k = visited_tile(tiles, lists, tl.minimum(stride // 2, n_tiles - 1), n_full)
    key_step = tl.load(known.steps + base + tile_k * PARTS + part)
    norm = tl.load(known.norms + base + tile_k * PARTS + part)
    word = tile_k * (PARTS * BITS) >> 5
    for look in range(n_looks):
        bit = tile_k * (PARTS * BITS)
        if bit >> 5 != word:
            spared += _take(gone, entry + word, there, SAMPLING)
            gone = tl.zeros([BLOCK_M, LANES], tl.int32)
            word = bit >> 5
        product = _products(q8, known, base + tile_k * PARTS, BLOCK_N, SUB, BLOCK_D)
        most = _largest(product, BLOCK_M, PARTS, SUB).to(tl.float32)
        most = most * row_step * key_step[None, :, None]
        most += row_half_norm * key_step[None, :, None] + row_step * (norm * HALF)[None, :, None]
        most, _, _, _ = scores(most * sign, score, None, None, None, None)
        most = most.to(tl.float32)
        if gates is not None:
            at = (
                gates.extrema
                + tl.cast(place.batch, tl.int64) * gates.extrema_batch
                + h // gates.heads_per_delta * gates.extrema_head
                + (place.key_record // SUB + tile_k * PARTS + part) * 2
            )
            row_alpha = alpha[:, None, None]
            one, _slope = gate(gates, row_alpha * tl.load(at)[None, :, None], gates.coarse)
            other, _slope = gate(gates, row_alpha * tl.load(at + 1)[None, :, None], gates.coarse)
            most += tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL).to(tl.float32)
        if known.biased:
            at = tl.cast(place.batch, tl.int64) * known.bias_batch + h * known.bias_head
            at += place.key_record // SUB + tile_k * PARTS + part
            most += tl.load(known.bias + at)[None, :, None]
        if row_bias is not None:
            most += row_bias
        lost = tl.sum(tl.where(most < level[:, None, None], bits[None, :, None], 0), 1)
        gone |= lost << (bit & 31)
        following = tl.minimum((look + 1) * stride + stride // 2, n_tiles - 1)
        tile_k = visited_tile(tiles, lists, following, n_full)
        key_step = tl.load(known.steps + base + tile_k * PARTS + part)
        norm = tl.load(known.norms + base + tile_k * PARTS + part)
    spared += _take(gone, entry + word, there, SAMPLING)
    if SAMPLING:
        tl.store(decision, (spared * WORTH >= n_looks * PARTS * BITS).to(tl.int32))


def _key_bounds(problem: AttentionProblem, tensors: AttentionTensors, terms: Terms) -> KeyBounds:
    """The bounds of all keys; a pair bias is unbounded, so that nothing is dropped."""
    width = _width(problem)
    length = arguments.record_length(problem, problem.seqlen_k)
    batch, n_blocks = arguments.records(problem), length // terms.block
    shape = (batch, problem.heads_kv, n_blocks)
    keys = tensors.k.new_empty((*shape, terms.block, width), dtype=torch.int8)
    steps, norms = (keys.new_empty(shape, dtype=torch.float32) for _ in range(2))
    key_bounds_kernel[(batch * problem.heads_kv * n_blocks,)](
        arguments.operand(tensors.k),
        keys,
        steps,
        norms,
        problem.seqlen_q,
        problem.seqlen_k,
        terms.sequences,
        problem.heads_kv,
        n_blocks,
        D=problem.head_dim,
        BLOCK_D=width,
        SUB=terms.block,
        RECORD=RECORD_BLOCK,
    )
    bias, biased = steps, False
    if terms.bias is not None and terms.bias.has_keys.value:
        biased = True
        if terms.bias.has_rows.value:
            bias = steps.new_full((1, 1, n_blocks), torch.inf)
        else:
            bias = terms.bias.pointer.unflatten(2, (n_blocks, terms.block)).amax(3)
            bias = bias.float() * arguments.LOG2E
            bias = bias.repeat_interleave(terms.bias.heads_per_head, 1)
    strides = arguments.broadcast_strides(bias)[:2] if biased else (0, 0)
    batch_stride = 0 if batch == 1 else problem.heads_kv * n_blocks
    return KeyBounds(
        keys, steps, norms, bias, batch_stride, n_blocks, *strides, arguments.flag(biased)
    )


def _width(problem: AttentionProblem) -> int:
    return max(arguments.block_width(problem.head_dim), NARROWEST)


def _all(problem: AttentionProblem, tensors: AttentionTensors, terms: Terms) -> torch.Tensor:
    """Every block that V5 leaves, as bits of `problem.kept_shape`."""
    if terms.blocks is None:
        return tensors.q.new_full(problem.kept_shape, -1, dtype=torch.int32)
    words = terms.blocks.words[:, :, : problem.kept_shape[2]]
    words = words.repeat_interleave(terms.blocks.heads_per_head, 1)
    return words.expand(problem.kept_shape).contiguous()


def screen(
    problem: AttentionProblem, tensors: AttentionTensors, terms: Terms
) -> tuple[torch.Tensor, Terms]:
    """What is kept (T1), int32 `problem.kept_shape`, and the terms under which only that is
    visited.
    """
    kept = _all(problem, tensors, terms)
    tile = tuning.tile("screen", problem)
    tiles = arguments.tile_count(problem, problem.seqlen_q, tile.block_m)
    lists = preparation.list_tiles(problem, terms, None, tile)
    extrema = gates.extrema(problem, terms) if terms.gates is not None else None
    places = placed(terms.sequences, tiles, tile.block_m, False)
    groups = ceil_div(tiles, EACH)
    worth = kept.new_empty(groups * problem.heads_q)
    operands = (
        arguments.operand(tensors.q),
        _key_bounds(problem, tensors, terms),
        of_kept(kept),
        *terms._replace(score=arguments.score(problem), gates=extrema, sequences=places).flat(),
        lists,
        worth,
        problem.softmax_threshold,
        problem.heads_q,
        problem.group,
        tiles // max(arguments.records(problem), 1),
        tiles,
    )
    for sampling, programs in ((True, groups), (False, tiles)):
        screen_kernel[(programs * problem.heads_q,)](
            *operands,
            D=problem.head_dim,
            BLOCK_D=_width(problem),
            SUB=terms.block,
            RISES=problem.softmax_scale >= 0,
            SOURCES=SOURCES[sampling],
            SAMPLE=SAMPLE,
            WORTH=WORTH,
            EACH=EACH,
            SAMPLING=sampling,
            **tile.options(),
        )
    if terms.ranges is None:
        ranges, _live = preparation.key_ranges(problem, tensors, terms.sequences, terms.block)
        terms = terms._replace(ranges=ranges)
    return kept, terms._replace(blocks=of_kept(kept))
