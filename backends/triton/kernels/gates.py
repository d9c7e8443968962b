"""Gates (S3) as records, and their threshold (V7) as one number a row.

g is monotone, so that the largest gate of a row lies at the least or the greatest delta that it
sees: mu_i takes no K. Turned round, a row keeps the keys whose delta is on one side of a number;
so the extrema of delta in a block of keys tell which tiles a row group can leave out before K is
loaded.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from flash_sparse_attn.problem import KEPT_BLOCK, AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments
from .arguments import (
    LOG2E,
    RECORD_BLOCK,
    Bounds,
    Gates,
    Score,
    Sequences,
    Terms,
    TileLists,
    broadcast_strides,
)
from .primitives import KEPT_ROWS, LN2, gate, load_alpha, load_delta, visible
from .sequences import place_tile, record
from .spans import listed_tiles, nth_tile, scheduled
from .tuning import Tile

SLACK = {4: 4e-6, 8: 1e-14}
"""Relative rounding, by bytes of the sums, within which a gate is at its threshold."""
TOLERANCE = {2: 1e-3, 4: 1e-4, 8: 1e-10}
"""Error of g, by bytes of the inputs, that a verdict on a whole tile allows for."""
COARSE_SCALE = 0.45
"""Greatest c at which c times an error of g of 5e-4 is below 2^-12."""
CHUNK = 128
"""Tiles whose extrema are read at a time."""
REACH_CHUNK = 512
"""Blocks of rows whose limits are."""


@triton.jit(do_not_specialize=[*Bounds._fields, "heads"])
def delta_extrema_kernel(
    delta,
    extrema,
    seqlen_q,
    seqlen_k,
    sequences,
    heads,
    blocks,
    SUB: tl.constexpr,
    RECORD: tl.constexpr,
):
    """Least and greatest delta of a block of keys, NaN if one is; grid batch * heads * blocks."""
    block = tl.program_id(0) % blocks
    _place, _, n_k, tile, _exists = place_tile(
        seqlen_q, seqlen_k, sequences, block * SUB // RECORD, blocks, RECORD, True
    )
    at = tl.program_id(0).to(tl.int64) * SUB + tl.arange(0, SUB)
    exists = tile * RECORD + block * SUB % RECORD + tl.arange(0, SUB) < n_k
    store_delta_extrema(extrema, tl.program_id(0).to(tl.int64), tl.load(delta + at), exists)


@triton.jit
def store_delta_extrema(extrema, block, delta, exists):
    """Least and greatest delta of those keys of a block that exist, NaN if one is."""
    dirty = tl.sum(((delta != delta) & exists).to(tl.int32), 0) > 0
    low = tl.min(tl.where(exists, delta, float("inf")), 0)
    high = tl.max(tl.where(exists, delta, float("-inf")), 0)
    tl.store(extrema + block * 2, tl.where(dirty, float("nan"), low))
    tl.store(extrema + block * 2 + 1, tl.where(dirty, float("nan"), high))


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_q", "tiles_q"])
def gate_floor_kernel(
    floor,
    limits,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    gates,
    mask,
    blocks,
    ranges,
    sequences,
    lists,
    share,
    slack,
    tolerance,
    heads_q,
    tiles_q,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """V7: mu_i + ln gamma in the base of scores, less what rounding may take, and what it means for
    the delta of a key; grid query tiles * batch * heads.
    """
    h, nth = scheduled(None, heads_q, 1, tiles_q, False)
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
    own = nth if sequences is not None else tile_q
    tiles, n_full, n_partial = listed_tiles(lists, place, h, own)
    low, high, dirty = _extremes_of_full(
        gates, place, h, bounds, tiles, n_full, BLOCK_N, SUB, CHUNK
    )
    low = tl.zeros([BLOCK_M], ACC) + low
    high = tl.zeros([BLOCK_M], ACC) + high
    dirty = tl.zeros([BLOCK_M], tl.int32) + dirty
    for t in range(n_partial):
        start_k = nth_tile(tiles, lists, t, True) * BLOCK_N
        delta = load_delta(gates, place, h, start_k + tl.arange(0, BLOCK_N))[None, :]
        keep = visible(
            place, h, start_q, start_k, bounds, mask, blocks, ranges, BLOCK_M, BLOCK_N, False
        )
        dirty |= tl.max(((delta != delta) & keep).to(tl.int32), 1)
        low = tl.minimum(low, tl.min(tl.where(keep, delta, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(keep, delta, float("-inf")), 1))
    alpha = load_alpha(gates, place, h, i)
    one, _slope = gate(gates, alpha * low, gates.coarse, NATURAL)
    other, _slope = gate(gates, alpha * high, gates.coarse, NATURAL)
    largest = tl.maximum(one, other)
    value = largest + share - slack * (1.0 + tl.abs(largest))
    # Where a gate is NaN nothing is dropped.
    value = tl.where((dirty != 0) | (alpha != alpha), float("-inf"), value)
    record = tl.cast(place.batch, tl.int64) * gates.alpha_batch + h * gates.alpha_head
    record += place.row_record
    tl.store(floor + record + i, value, mask=i < bounds.seqlen_q)

    up, some = _delta_limit(gates, alpha, value, -tolerance, NATURAL)
    _up, every = _delta_limit(gates, alpha, value, tolerance, NATURAL)
    row = i < bounds.seqlen_q
    entry = limits + (record // KEPT_ROWS + start_q // KEPT_ROWS) * 4
    entry += tl.arange(0, BLOCK_M // KEPT_ROWS) * 4
    exists = start_q + tl.arange(0, BLOCK_M // KEPT_ROWS) * KEPT_ROWS < bounds.seqlen_q
    SHAPE: tl.constexpr = [BLOCK_M // KEPT_ROWS, KEPT_ROWS]
    some_up = tl.reshape(tl.where(row & up, some, float("inf")), SHAPE)
    some_down = tl.reshape(tl.where(row & ~up, some, float("-inf")), SHAPE)
    all_up = tl.reshape(tl.where(row & up, every, float("-inf")), SHAPE)
    all_down = tl.reshape(tl.where(row & ~up, every, float("inf")), SHAPE)
    tl.store(entry, tl.min(some_up, 1), mask=exists)
    tl.store(entry + 1, tl.max(some_down, 1), mask=exists)
    tl.store(entry + 2, tl.max(all_up, 1), mask=exists)
    tl.store(entry + 3, tl.min(all_down, 1), mask=exists)


@triton.jit(do_not_specialize=["seqlen_q", "blocks"])
def gate_reach_kernel(reach, limits, seqlen_q, blocks, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """`gate_reach`, from the limits of `blocks` blocks of rows a head; grid batch * kv heads."""
    plane = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(seqlen_q, KEPT_ROWS * CHUNK)
    up = float("inf")
    down = float("-inf")
    for nth in range(chunks):
        block = (chunks - 1 - nth) * CHUNK + tl.arange(0, CHUNK)
        exists = block * KEPT_ROWS < seqlen_q
        least = tl.full([CHUNK], float("inf"), limits.dtype.element_ty)
        greatest = tl.full([CHUNK], float("-inf"), limits.dtype.element_ty)
        for g in tl.static_range(GROUP):
            entry = limits + ((plane * GROUP + g) * blocks + block) * 4
            least = tl.minimum(least, tl.load(entry, mask=exists, other=float("inf")))
            greatest = tl.maximum(greatest, tl.load(entry + 1, mask=exists, other=float("-inf")))
        least = tl.minimum(tl.associative_scan(least, 0, _lesser, reverse=True), up)
        greatest = tl.maximum(tl.associative_scan(greatest, 0, _greater, reverse=True), down)
        entry = reach + (plane * blocks + block) * 2
        tl.store(entry, least, mask=exists)
        tl.store(entry + 1, greatest, mask=exists)
        up = tl.min(least, 0)
        down = tl.max(greatest, 0)


@triton.jit
def _lesser(x, y):
    return tl.minimum(x, y)


@triton.jit
def _greater(x, y):
    return tl.maximum(x, y)


@triton.jit
def _extremes_of_full(
    gates,
    place,
    h,
    bounds,
    tiles,
    n_full,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(least, greatest) delta of the full tiles of a list, and whether one is NaN."""
    at = (
        gates.extrema
        + tl.cast(place.batch, tl.int64) * gates.extrema_batch
        + h // gates.heads_per_delta * gates.extrema_head
        + place.key_record // SUB * 2
    )
    low = tl.full([CHUNK], float("inf"), gates.extrema.dtype.element_ty)
    high = tl.full([CHUNK], float("-inf"), gates.extrema.dtype.element_ty)
    dirty = tl.zeros([CHUNK], tl.int32)
    for first in range(0, n_full, CHUNK):
        t = first + tl.arange(0, CHUNK)
        tile = tl.load(tiles + t, mask=t < n_full, other=0)
        for part in tl.static_range((BLOCK_N + SUB - 1) // SUB):
            block = tile * BLOCK_N // SUB + part
            present = (t < n_full) & (block * SUB < bounds.seqlen_k)
            least = tl.load(at + block * 2, mask=present, other=float("inf"))
            greatest = tl.load(at + block * 2 + 1, mask=present, other=float("-inf"))
            dirty |= (least != least).to(tl.int32)
            low = tl.minimum(low, least)
            high = tl.maximum(high, greatest)
    return tl.min(low, 0), tl.max(high, 0), tl.max(dirty, 0)


@triton.jit
def _delta_limit(gates, alpha, floor, tolerance, NATURAL: tl.constexpr):
    """(up, limit): a row keeps the keys of delta >= limit where up, of delta <= limit elsewhere.

    c g(alpha delta) >= floor solved for delta, in base 2 whatever that of alpha and floor; a
    negative tolerance widens what is kept, a positive one narrows it.
    """
    if NATURAL:
        alpha = alpha / LN2
        floor = floor / LN2
    rises = gates.scale > 0.0
    target = floor / gates.scale
    step = tolerance * (1.0 + tl.abs(target))
    target = tl.where(rises, target + step, target - step)
    x = target
    if gates.logsigmoid:  # g(x) = -log2(1 + 2^-x); near both ends by its limits
        x = -tl.log2(tl.exp2(-target) - 1.0)
        x = tl.where(target > -0.001, -tl.log2(-target * LN2), x)
        x = tl.where(target < -20.0, target, x)
        x = tl.where(target >= 0.0, float("inf"), x)
    up = (alpha > 0.0) == rises
    limit = x / alpha
    margin = tolerance * tl.abs(limit)
    limit = tl.where(up, limit + margin, limit - margin)
    # Rows of alpha = 0 or c = 0, and those that drop nothing, keep every key.
    all_ = (alpha == 0.0) | (floor == float("-inf")) | (gates.scale == 0.0) | (limit != limit)
    return up | all_, tl.where(all_, float("-inf"), limit)


def gates(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    score: Score,
    sequences: Sequences | None,
    block: int,
) -> Gates | None:
    """S3, V7 not yet decided; None without gates.

    Args:
        problem, tensors: of the call.
        score: of the call, whose base is that of alpha.
        sequences: of a packed call.
        block: keys of a block of the extrema.
    """
    if problem.gate is None:
        return None
    unit = 1.0 if score.natural.value else LOG2E
    alpha = record(problem, _heads_first(tensors.gate_q), sequences, False, unit)
    delta = record(problem, _heads_first(tensors.gate_k), sequences, True)
    made = Gates(
        alpha,
        *broadcast_strides(alpha)[:2],
        delta,
        *broadcast_strides(delta)[:2],
        tl.constexpr(problem.group),
        arguments.number(problem, problem.softmax_scale),
        arguments.flag(problem.gate == "logsigmoid"),
        arguments.flag(problem.dtype.itemsize >= 4),
        arguments.flag(abs(problem.softmax_scale) <= COARSE_SCALE),
        alpha,
        alpha,
        delta,
        0,
        0,
        arguments.flag(False),
    )
    if problem.gate_threshold == 0:
        return made
    return _with_extrema(problem, made, sequences, block)


def extrema(problem: AttentionProblem, terms: Terms) -> Gates:
    """The gates of the terms with the extrema of delta, which V7 already has, all in base 2."""
    found = terms.gates
    if problem.gate_threshold == 0:
        found = _with_extrema(problem, found, terms.sequences, terms.block)
    if terms.score.natural.value:
        alpha = found.alpha * LOG2E
        floor = found.floor * LOG2E if found.pruned.value else alpha
        found = found._replace(alpha=alpha, floor=floor)
    return found


def _with_extrema(
    problem: AttentionProblem, made: Gates, sequences: Sequences | None, block: int
) -> Gates:
    delta = made.delta
    blocks = delta.shape[2] // block
    found = delta.new_empty((*delta.shape[:2], blocks, 2))
    delta_extrema_kernel[(delta.shape[0] * delta.shape[1] * blocks,)](
        delta,
        found,
        problem.seqlen_q,
        problem.seqlen_k,
        sequences,
        problem.heads_kv,
        blocks,
        SUB=block,
        RECORD=RECORD_BLOCK,
    )
    strides = broadcast_strides(found)[:2]
    return made._replace(extrema=found, extrema_batch=strides[0], extrema_head=strides[1])


def prune(problem: AttentionProblem, terms: Terms, lists: TileLists | None, tile: Tile) -> Gates:
    """V7 decided: the gates with their floor.

    Args:
        problem: of the call.
        terms: of the call, V7 not yet decided.
        lists: the tiles that the other rules leave, of the shape of `tile`.
        tile: rows and keys that are looked at together.
    """
    found = terms.gates
    natural = terms.score.natural.value
    share = math.log(problem.gate_threshold) * (1.0 if natural else LOG2E)
    floor = torch.empty_like(found.alpha)
    limits = floor.new_empty(floor.numel() // KEPT_BLOCK[0] * 4)
    tiles = arguments.tile_count(problem, problem.seqlen_q, tile.block_m)
    gate_floor_kernel[(tiles * problem.heads_q,)](
        floor,
        limits,
        *terms.bounds,
        found,
        terms.mask,
        terms.blocks,
        terms.ranges,
        terms.sequences,
        lists,
        arguments.number(problem, share),
        arguments.number(problem, SLACK[floor.element_size()]),
        arguments.number(problem, TOLERANCE[problem.dtype.itemsize]),
        problem.heads_q,
        tiles // max(arguments.records(problem), 1),
        SUB=terms.block,
        CHUNK=CHUNK,
        ACC=arguments.accumulator(problem),
        NATURAL=natural,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
    )
    return found._replace(floor=floor, limits=limits, pruned=arguments.flag(True))


def gate_reach(problem: AttentionProblem, found: Gates) -> torch.Tensor:
    """What V7 says of a key whatever the row, `[B, Hkv, blocks, 2]`: some row of the blocks of
    `KEPT_BLOCK` rows from one on, of some head of the group, may keep a key of delta >= the first
    or <= the second. Not packed.

    A key that a row cannot see is judged by that row all the same, if it comes after rows that can:
    V1 alone has none.
    """
    blocks = arguments.padded(problem.seqlen_q) // KEPT_BLOCK[0]
    reach = found.limits.new_empty((problem.batch, problem.heads_kv, blocks, 2))
    gate_reach_kernel[(problem.batch * problem.heads_kv,)](
        reach,
        found.limits,
        problem.seqlen_q,
        blocks,
        GROUP=problem.group,
        CHUNK=REACH_CHUNK,
    )
    return reach


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """`[B, S, H]`, or packed `[T, H]`, as `[B, H, S]`."""
    return (x.unsqueeze(0) if x.dim() == 2 else x).transpose(1, 2)
