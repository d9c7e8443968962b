"""Gates (S3) as records, and their threshold (V7) as one number a row.

g is monotone, so that the largest gate of a row lies at the least or the greatest delta that it
sees: mu_i takes no K, and the extrema of delta per block of keys tell which tiles a row group can
leave out before K is loaded.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments
from .arguments import RECORD_BLOCK, Bounds, Gates, Sequences, Terms, TileLists, broadcast_strides
from .primitives import gate, load_alpha, load_delta, visible
from .sequences import place_tile, record
from .spans import key_tiles, nth_tile
from .tuning import Tile

SLACK = {4: 4e-6, 8: 1e-14}
"""Relative rounding, by bytes of the sums, within which a gate is at its threshold."""


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
    value = tl.load(delta + at)
    dirty = tl.sum(((value != value) & exists).to(tl.int32), 0) > 0
    low = tl.min(tl.where(exists, value, float("inf")), 0)
    high = tl.max(tl.where(exists, value, float("-inf")), 0)
    entry = extrema + tl.program_id(0).to(tl.int64) * 2
    tl.store(entry, tl.where(dirty, float("nan"), low))
    tl.store(entry + 1, tl.where(dirty, float("nan"), high))


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_q", "tiles_q"])
def gate_floor_kernel(
    floor,
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
    heads_q,
    tiles_q,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """V7: mu_i + ln gamma in base 2, less what rounding may take; grid as the forward's."""
    h = tl.program_id(0) % heads_q
    nth = tl.program_id(0) // heads_q
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
    tiles, n_full, n_partial = key_tiles(bounds, lists, place, h, tile_q, own, BLOCK_M, BLOCK_N)
    low = tl.full([BLOCK_M], float("inf"), ACC)
    high = tl.full([BLOCK_M], float("-inf"), ACC)
    dirty = tl.zeros([BLOCK_M], tl.int32)
    for PARTIAL in tl.static_range(2):
        for t in range(n_partial if PARTIAL else n_full):
            start_k = nth_tile(tiles, lists, t, PARTIAL) * BLOCK_N
            delta = load_delta(gates, place, h, start_k + tl.arange(0, BLOCK_N))[None, :]
            if PARTIAL:
                keep = visible(
                    place, h, start_q, start_k, bounds, mask, blocks, ranges,
                    BLOCK_M, BLOCK_N, False,
                )  # fmt: skip
                dirty |= tl.max(((delta != delta) & keep).to(tl.int32), 1)
                low = tl.minimum(low, tl.min(tl.where(keep, delta, float("inf")), 1))
                high = tl.maximum(high, tl.max(tl.where(keep, delta, float("-inf")), 1))
            else:
                dirty |= tl.max((delta != delta).to(tl.int32), 1)
                low = tl.minimum(low, tl.min(delta, 1))
                high = tl.maximum(high, tl.max(delta, 1))
    alpha = load_alpha(gates, place, h, i)
    one, _slope = gate(gates, alpha * low)
    other, _slope = gate(gates, alpha * high)
    largest = tl.maximum(one, other)
    value = largest + share - slack * (1.0 + tl.abs(largest))
    record = tl.cast(place.batch, tl.int64) * gates.alpha_batch + h * gates.alpha_head
    target = floor + record + place.row_record + i
    # Where a gate is NaN nothing is dropped.
    value = tl.where((dirty != 0) | (alpha != alpha), float("-inf"), value)
    tl.store(target, value, mask=i < bounds.seqlen_q)


def gates(
    problem: AttentionProblem, tensors: AttentionTensors, sequences: Sequences | None, block: int
) -> Gates | None:
    """S3, V7 not yet decided; None without gates.

    Args:
        problem, tensors: of the call.
        sequences: of a packed call.
        block: keys of a block of the extrema.
    """
    if problem.gate is None:
        return None
    alpha = record(problem, _heads_first(tensors.gate_q), sequences, False)
    delta = record(problem, _heads_first(tensors.gate_k), sequences, True)
    made = Gates(
        alpha,
        *broadcast_strides(alpha)[:2],
        delta,
        *broadcast_strides(delta)[:2],
        problem.group,
        arguments.number(problem, problem.softmax_scale),
        tl.constexpr(problem.gate == "logsigmoid"),
        tl.constexpr(problem.dtype.itemsize >= 4),
        alpha,
        delta,
        0,
        0,
        tl.constexpr(False),
    )
    if problem.gate_threshold == 0:
        return made
    blocks = delta.shape[2] // block
    extrema = delta.new_empty((*delta.shape[:2], blocks, 2))
    delta_extrema_kernel[(delta.shape[0] * delta.shape[1] * blocks,)](
        delta,
        extrema,
        problem.seqlen_q,
        problem.seqlen_k,
        sequences,
        problem.heads_kv,
        blocks,
        SUB=block,
        RECORD=RECORD_BLOCK,
    )
    strides = broadcast_strides(extrema)[:2]
    return made._replace(extrema=extrema, extrema_batch=strides[0], extrema_head=strides[1])


def prune(problem: AttentionProblem, terms: Terms, lists: TileLists | None, tile: Tile) -> Gates:
    """V7 decided: the gates with their floor.

    Args:
        problem: of the call.
        terms: of the call, V7 not yet decided.
        lists: the tiles that the other rules leave, of the shape of `tile`.
        tile: rows and keys that are looked at together.
    """
    found = terms.gates
    floor = torch.empty_like(found.alpha)
    tiles = arguments.tile_count(problem, problem.seqlen_q, tile.block_m)
    gate_floor_kernel[(tiles * problem.heads_q,)](
        floor,
        *terms.bounds,
        found,
        terms.mask,
        terms.blocks,
        terms.ranges,
        terms.sequences,
        lists,
        arguments.number(problem, math.log2(problem.gate_threshold)),
        arguments.number(problem, SLACK[floor.element_size()]),
        problem.heads_q,
        tiles // max(arguments.records(problem), 1),
        ACC=arguments.accumulator(problem),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
    )
    return found._replace(floor=floor, pruned=tl.constexpr(True))


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """`[B, S, H]`, or packed `[T, H]`, as `[B, H, S]`."""
    return (x.unsqueeze(0) if x.dim() == 2 else x).transpose(1, 2)
