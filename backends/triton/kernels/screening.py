"""The softmax threshold (T1): which blocks are kept, decided before anything is summed up.

Two bounds meet. From below, the sum of a row's exponentials over the tiles that are likely to hold
much, those on the diagonal and the first keys: T1 lets go what is small against the final sum, all
the more what is small against a part of it. From above, the greatest score that a row can have with
a block of keys: the product is largest where every coordinate of the key is the block's greatest or
least, as q's sign has it (the bound by which Quest selects pages, arXiv 2406.10774). It costs two
products with one row a block instead of one with each key. Forward and backward then visit what was
kept.
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
from .spans import key_tiles, nth_tile

BOXES = 64
"""Blocks of keys that a program compares with its rows at a time."""
_SCALARS = [*Bounds._fields, "heads_q", "group", "tiles_q"]


class Boxes(NamedTuple):
    """What bounds the scores of a block of keys, by block of the record axis."""

    low: torch.Tensor
    """`[B, Hkv, blocks, D]`: the least coordinates."""
    high: torch.Tensor
    bias: torch.Tensor
    """`[B, Hq, blocks]`: the greatest bias (S4), 0 without one of keys."""
    batch: int
    """In blocks, as `head`; strides of low and high are D times these."""
    head: int
    bias_batch: int
    bias_head: int
    biased: Any


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "heads_kv", "blocks"])
def key_boxes_kernel(
    k,
    low,
    high,
    seqlen_q,
    seqlen_k,
    sequences,
    heads_kv,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUB: tl.constexpr,
    RECORD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Least and greatest coordinates of a block of keys; grid batch * kv heads * blocks."""
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
    exists = (start_k + tl.arange(0, SUB) < n_k)[:, None]
    tile_k = load_tile(
        k, place.batch, n, place.key + start_k, place.key + n_k, SUB, D, BLOCK_D, True, False
    ).to(ACC)
    least = tl.reduce(tl.where(exists, tile_k, float("inf")), 0, _minimum)
    greatest = tl.reduce(tl.where(exists, tile_k, float("-inf")), 0, _maximum)
    column = tl.arange(0, BLOCK_D)
    target = tl.program_id(0).to(tl.int64) * BLOCK_D + column
    some = (start_k < n_k) & (column < D)
    tl.store(low + target, tl.where(some, least, 0.0).to(low.dtype.element_ty))
    tl.store(high + target, tl.where(some, greatest, 0.0).to(high.dtype.element_ty))


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=_SCALARS)
def row_levels_kernel(
    q,
    k,
    level,
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
    threshold,
    padded,
    heads_q,
    group,
    tiles_q,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The score in base 2 below which T1 lets an element of a row go, a record; grid as the
    forward's.
    """
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
    q_tile = load_tile(
        q, place.batch, h, place.row + start_q, place.row + bounds.seqlen_q, BLOCK_M, D, BLOCK_D,
        True, False,
    )  # fmt: skip
    alpha = None
    if gates is not None:
        alpha = load_alpha(gates, place, h, i)[:, None]
    total = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], float("-inf"), ACC)
    for PARTIAL in tl.static_range(1, -1, -1):
        for t in range(tl.minimum(n_partial, 4) if PARTIAL else tl.minimum(n_full, 1)):
            # Of the partial tiles the first, where sinks are, then those from the last back.
            at = tl.where(t == 0, 0, n_partial - t) if PARTIAL else t
            start_k = nth_tile(tiles, lists, at, PARTIAL) * BLOCK_N
            j = start_k + tl.arange(0, BLOCK_N)
            k_tile = load_tile(
                k, place.batch, h // group, place.key + start_k, place.key + bounds.seqlen_k,
                BLOCK_N, D, BLOCK_D, PARTIAL, False,
            )  # fmt: skip
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
            delta = None
            bias_tile = None
            if gates is not None:
                delta = load_delta(gates, place, h, j)[None, :]
            if bias is not None:
                bias_tile = load_bias(bias, place, h, i[:, None], j[None, :], bounds)
            x, _, gated, _ = scores(x, score, gates, alpha, delta, bias_tile)
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
    n = tl.minimum((n_full + n_partial) * BLOCK_N, bounds.seqlen_k)
    share = tl.log2(threshold / tl.maximum(n, 1).to(tl.float32))
    record = (tl.cast(place.batch, tl.int64) * heads_q + h) * padded + place.row_record + i
    tl.store(level + record, peak + tl.log2(total) + share, mask=i < bounds.seqlen_q)


@triton.jit(do_not_specialize=_SCALARS)
def screen_boxes_kernel(
    q,
    boxes,
    kept,
    level,
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
    padded,
    n_words,
    heads_q,
    group,
    tiles_q,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BOXES: tl.constexpr,
    SUB: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    RISES: tl.constexpr,
):
    """Write every word of what T1 keeps for a query tile; grid as the forward's.

    RISES says whether scores rise with the products; else it is the least product that bounds them.
    """
    h = tl.program_id(0) % heads_q
    nth = tl.program_id(0) // heads_q
    place, n_q, n_k, tile_q, exists = place_tile(
        seqlen_q, seqlen_k, sequences, nth, tiles_q, BLOCK_M, False
    )
    if not exists:
        return
    start_q = tile_q * BLOCK_M
    i = start_q + tl.arange(0, BLOCK_M)
    exists = i < n_q
    q_tile = load_tile(
        q, place.batch, h, place.row + start_q, place.row + n_q, BLOCK_M, D, BLOCK_D, True, False
    )
    positive = tl.where(q_tile > 0.0, q_tile, 0.0)
    negative = tl.where(q_tile > 0.0, 0.0, q_tile)
    record = (tl.cast(place.batch, tl.int64) * heads_q + h) * padded + place.row_record + i
    row_level = tl.load(level + record, mask=exists, other=0.0)
    # Keys past the last row's (V1, V2) are seen by none.
    end = n_k
    if right is not None:
        end = tl.minimum(n_k, tl.maximum(start_q + BLOCK_M + n_k - n_q + right, right_sinks))
    first_box = place.key_record // SUB
    plane = tl.cast(place.batch, tl.int64) * boxes.batch + h // group * boxes.head
    column = tl.arange(0, BLOCK_D)
    alpha = None
    if gates is not None:
        alpha = load_alpha(gates, place, h, i)[:, None]
    WORDS: tl.constexpr = BOXES * SUB // (32 * KEPT_KEYS)
    PER_BOX: tl.constexpr = SUB // KEPT_KEYS
    for chunk in range(0, tl.cdiv(n_words, WORDS)):
        nth_box = chunk * BOXES + tl.arange(0, BOXES)
        has_keys = nth_box * SUB < end
        keeps = tl.zeros([BOXES], tl.int32)
        if chunk * BOXES * SUB < end:
            at = (plane + first_box + nth_box)[:, None] * BLOCK_D + column[None, :]
            low = tl.load(boxes.low + at, mask=has_keys[:, None], other=0.0)
            high = tl.load(boxes.high + at, mask=has_keys[:, None], other=0.0)
            if not RISES:
                low, high = high, low
            x = tl.dot(positive, tl.trans(high), input_precision=PRECISION, out_dtype=ACC)
            x = tl.dot(negative, tl.trans(low), x, input_precision=PRECISION, out_dtype=ACC)
            x, _, _, _ = scores(x, score, None, None, None, None)
            if gates is not None:
                entry = (
                    gates.extrema
                    + tl.cast(place.batch, tl.int64) * gates.extrema_batch
                    + h // gates.heads_per_delta * gates.extrema_head
                    + (first_box + nth_box) * 2
                )
                least = tl.load(entry, mask=has_keys, other=0.0)[None, :]
                greatest = tl.load(entry + 1, mask=has_keys, other=0.0)[None, :]
                one, _slope = gate(gates, alpha * least)
                other, _slope = gate(gates, alpha * greatest)
                x += tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)
            if boxes.biased:
                entry = tl.cast(place.batch, tl.int64) * boxes.bias_batch + h * boxes.bias_head
                x += tl.load(boxes.bias + entry + first_box + nth_box, mask=has_keys, other=0.0)[
                    None, :
                ]
            if bias is not None and not boxes.biased:  # of rows
                x += load_bias(bias, place, h, i, i, None)[:, None].to(ACC) * LOG2E
            spare = (x < row_level[:, None]) | ~exists[:, None]
            keeps = (has_keys & (tl.min(spare.to(tl.int32), 0) == 0)).to(tl.int32)
        bits = keeps * ((tl.constexpr(1) << PER_BOX) - 1)
        nth_in_word = tl.arange(0, BOXES) % (BOXES // WORDS) * PER_BOX
        words = tl.sum(tl.reshape(bits << nth_in_word, [WORDS, BOXES // WORDS]), 1)
        word = chunk * WORDS + tl.arange(0, WORDS)
        row = start_q // KEPT_ROWS + tl.arange(0, BLOCK_M // KEPT_ROWS)
        there = (row * KEPT_ROWS < n_q)[:, None] & (word < n_words)[None, :]
        row = (place.row_block + row).to(tl.int64)[:, None]
        words = words[None, :] + tl.zeros([BLOCK_M // KEPT_ROWS, WORDS], tl.int32)
        if blocks is not None:  # V5
            entry = tl.cast(place.batch, tl.int64) * blocks.batch
            entry += tl.cast(h // blocks.heads_per_head, tl.int64) * blocks.head
            words &= tl.load(blocks.words + entry + row * blocks.row + word[None, :], mask=there)
        entry = tl.cast(place.batch, tl.int64) * kept.batch + tl.cast(h, tl.int64) * kept.head
        tl.store(kept.words + entry + row * kept.row + word[None, :], words, mask=there)


def _boxes(problem: AttentionProblem, tensors: AttentionTensors, terms: Terms) -> Boxes:
    """The boxes of all keys; those of a pair bias are unbounded, so that nothing is dropped."""
    width = arguments.block_width(problem.head_dim)
    length = arguments.record_length(problem, problem.seqlen_k)
    batch, blocks = arguments.records(problem), length // terms.block
    low, high = (tensors.k.new_empty((batch, problem.heads_kv, blocks, width)) for _ in range(2))
    key_boxes_kernel[(batch * problem.heads_kv * blocks,)](
        arguments.operand(tensors.k),
        low,
        high,
        problem.seqlen_q,
        problem.seqlen_k,
        terms.sequences,
        problem.heads_kv,
        blocks,
        D=problem.head_dim,
        BLOCK_D=width,
        SUB=terms.block,
        RECORD=RECORD_BLOCK,
        ACC=arguments.accumulator(problem),
    )
    bias, biased = low, False
    if terms.bias is not None and terms.bias.has_keys.value:
        biased = True
        if terms.bias.has_rows.value:
            bias = low.new_full((1, 1, blocks), torch.inf, dtype=torch.float32)
        else:
            bias = terms.bias.pointer.unflatten(2, (blocks, terms.block)).amax(3)
            bias = bias * arguments.LOG2E
            bias = bias.repeat_interleave(terms.bias.heads_per_head, 1)
    strides = (0, 0)
    if biased:
        strides = arguments.broadcast_strides(bias)[:2]
    return Boxes(
        low,
        high,
        bias,
        0 if batch == 1 else problem.heads_kv * blocks,
        blocks,
        *strides,
        tl.constexpr(biased),
    )


def screen(
    problem: AttentionProblem, tensors: AttentionTensors, terms: Terms
) -> tuple[torch.Tensor, Terms]:
    """What is kept (T1), int32 `problem.kept_shape`, and the terms under which only that is
    visited.
    """
    kept = tensors.q.new_empty(problem.kept_shape, dtype=torch.int32)
    tile = tuning.tile("forward", problem)
    width = arguments.block_width(problem.head_dim)
    tiles = arguments.tile_count(problem, problem.seqlen_q, tile.block_m)
    padded = arguments.record_length(problem, problem.seqlen_q)
    rows = arguments.records(problem) * problem.heads_q
    level = kept.new_empty(rows * padded, dtype=arguments.sum_dtype(problem))
    lists = preparation.list_tiles(problem, terms, None, tile)
    places = placed(terms.sequences, tiles, tile.block_m, False)
    grid = (tiles * problem.heads_q,)
    q = arguments.source(tensors.q, tile.block_m, width, tile.tma)
    heads = (problem.heads_q, problem.group, tiles // max(arguments.records(problem), 1))
    constants = {
        "D": problem.head_dim,
        "BLOCK_D": width,
        "PRECISION": arguments.precision(problem),
        "ACC": arguments.accumulator(problem),
    }
    row_levels_kernel[grid](
        q,
        arguments.source(tensors.k, tile.block_n, width, tile.tma),
        level,
        *terms._replace(sequences=places).flat(),
        lists,
        problem.softmax_threshold,
        padded,
        *heads,
        **constants,
        **tile.options(),
    )
    extrema = gates.extrema(problem, terms) if terms.gates is not None else None
    bounded = terms._replace(gates=extrema, sequences=places)
    screen_boxes_kernel[grid](
        q,
        _boxes(problem, tensors, terms),
        of_kept(kept),
        level,
        *bounded.flat(),
        padded,
        kept.shape[3],
        *heads,
        **constants,
        BLOCK_M=tile.block_m,
        BOXES=BOXES,
        SUB=terms.block,
        RISES=problem.softmax_scale >= 0,
        num_warps=tile.warps,
    )
    if terms.ranges is None:
        ranges, _live = preparation.key_ranges(problem, tensors, terms.sequences, terms.block)
        terms = terms._replace(ranges=ranges)
    return kept, terms._replace(blocks=of_kept(kept))
