"""The softmax threshold (T1): which blocks are kept, decided before anything is summed up.

Two kernels form scores and no output. The first visits, for each query tile, the tiles that are
likely to hold much, those on the diagonal and the first keys, and a sample of the others; the sum
of their exponentials is a lower bound of the final one, and so is what the threshold allows against
it. Where the sample shows that much can be dropped, the second kernel compares every tile with that
bound; elsewhere every tile is kept, and the sample is all that the threshold costs. Forward and
backward then visit what was kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, preparation, tuning
from .arguments import Bounds, Terms
from .blocks import of_kept
from .primitives import (
    KEPT_KEYS,
    KEPT_ROWS,
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

SAMPLE = 32
"""One in so many full tiles is looked at before all are."""
_SCALARS = [*Bounds._fields, "heads_q", "group", "tiles_q"]


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tile_scores(
    q_tile,
    k,
    tile_k,
    place,
    h,
    group,
    start_q,
    bounds,
    score,
    gates,
    bias,
    mask,
    blocks,
    ranges,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scores of a tile in base 2, -inf where not visible (N2)."""
    start_k = tile_k * BLOCK_N
    i = start_q + tl.arange(0, BLOCK_M)
    j = start_k + tl.arange(0, BLOCK_N)
    end_key = place.key + bounds.seqlen_k
    k_tile = load_tile(
        k, place.batch, h // group, place.key + start_k, end_key, BLOCK_N, D, BLOCK_D,
        PARTIAL, False,
    )  # fmt: skip
    x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
    alpha = None
    delta = None
    bias_tile = None
    if gates is not None:
        alpha = load_alpha(gates, place, h, i)[:, None]
        delta = load_delta(gates, place, h, j)[None, :]
    if bias is not None:
        bias_tile = load_bias(bias, place, h, i[:, None], j[None, :], bounds)
    x, _, gated, _ = scores(x, score, gates, alpha, delta, bias_tile)
    if PARTIAL:
        keep = visible(
            place, h, start_q, start_k, bounds, mask, blocks, ranges, BLOCK_M, BLOCK_N, False
        )
        if gates is not None:
            keep = unpruned(keep, gated, gates, place, h, i[:, None])
        x = tl.where(keep, x, float("-inf"))
    return x


@triton.jit
def _all_spare(x, level, exists):
    """Whether every score of a tile is below its row's level.

    Rows that see nothing here, or do not exist, have no say; one with a NaN objects.
    """
    largest = tl.reduce(x, 1, _maximum)
    spare = (largest < level) | (largest == float("-inf")) | ~exists
    return tl.min(spare.to(tl.int32), 0)


@triton.jit(do_not_specialize=_SCALARS)
def sample_scores_kernel(
    q,
    k,
    level,
    worthwhile,
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
    SAMPLE: tl.constexpr,
):
    """Of each row the score below which T1 lets an element go, a record; of each query tile whether
    most of the sampled tiles would. Grid as the forward's.
    """
    h = tl.program_id(0) % heads_q
    nth = tl.program_id(0) // heads_q
    nth = nth // tiles_q * tiles_q + (tiles_q - 1 - nth % tiles_q)
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
    # The keys of the tiles visited are no fewer than those that a row sees.
    n = tl.minimum((n_full + n_partial) * BLOCK_N, bounds.seqlen_k)
    share = tl.log2(threshold / tl.maximum(n, 1).to(tl.float32))
    total = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], float("-inf"), ACC)
    n_sample = tl.minimum(n_full, 1 + tl.cdiv(n_full - 1, SAMPLE))
    n_spare = 0
    for PARTIAL in tl.static_range(1, -1, -1):
        for t in range(n_partial if PARTIAL else n_sample):
            # The first keys, then back from the diagonal.
            at = t if PARTIAL else tl.where(t == 0, 0, n_full - 1 - (t - 1) * SAMPLE)
            x = _tile_scores(
                q_tile, k, nth_tile(tiles, lists, at, PARTIAL), place, h, group, start_q, bounds,
                score, gates, bias, mask, blocks, ranges, D, BLOCK_D, BLOCK_M, BLOCK_N, PARTIAL,
                PRECISION, ACC,
            )  # fmt: skip
            if not PARTIAL:
                known = peak + tl.log2(total) + share
                n_spare += _all_spare(x, known, i < bounds.seqlen_q)
            new_peak = tl.maximum(peak, tl.max(x, 1))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(x - shift[:, None]), 1)
            peak = new_peak
    record = (tl.cast(place.batch, tl.int64) * heads_q + h) * padded + place.row_record + i
    tl.store(level + record, peak + tl.log2(total) + share, mask=i < bounds.seqlen_q)
    tl.store(worthwhile + tl.program_id(0), ((n_spare > 0) & (n_spare * 2 >= n_sample)).to(tl.int32))


@triton.jit(do_not_specialize=_SCALARS)
def screen_tiles_kernel(
    q,
    k,
    kept,
    level,
    worthwhile,
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
    """Note every tile that T1 keeps; grid as the forward's."""
    h = tl.program_id(0) % heads_q
    nth = tl.program_id(0) // heads_q
    nth = nth // tiles_q * tiles_q + (tiles_q - 1 - nth % tiles_q)
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
    screens = tl.load(worthwhile + tl.program_id(0)) != 0
    q_tile = load_tile(
        q, place.batch, h, place.row + start_q, place.row + bounds.seqlen_q, BLOCK_M, D, BLOCK_D,
        True, False,
    )  # fmt: skip
    record = (tl.cast(place.batch, tl.int64) * heads_q + h) * padded + place.row_record + i
    row_level = tl.load(level + record, mask=i < bounds.seqlen_q, other=0.0)
    for PARTIAL in tl.static_range(1, -1, -1):
        n_tiles = n_partial if PARTIAL else n_full
        for t in range(tl.where(screens, n_tiles, 0)):
            tile_k = nth_tile(tiles, lists, t, PARTIAL)
            x = _tile_scores(
                q_tile, k, tile_k, place, h, group, start_q, bounds, score, gates, bias, mask,
                blocks, ranges, D, BLOCK_D, BLOCK_M, BLOCK_N, PARTIAL, PRECISION, ACC,
            )  # fmt: skip
            keeps = _all_spare(x, row_level, i < bounds.seqlen_q) == 0
            _mark_kept(
                kept, blocks, place, h, start_q, tile_k * BLOCK_N, bounds, keeps, BLOCK_M, BLOCK_N
            )
        for t in range(tl.where(screens, 0, n_tiles)):
            start_k = nth_tile(tiles, lists, t, PARTIAL) * BLOCK_N
            _mark_kept(kept, blocks, place, h, start_q, start_k, bounds, True, BLOCK_M, BLOCK_N)


@triton.jit
def _mark_kept(
    kept,
    blocks,
    place,
    h,
    start_q,
    start_k,
    bounds,
    keeps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Note that a tile is kept, if it is, as far as V5 shows its blocks."""
    row = start_q // KEPT_ROWS + tl.arange(0, BLOCK_M // KEPT_ROWS)
    exists = (row * KEPT_ROWS < bounds.seqlen_q) & keeps
    row = place.row_block + row
    word = start_k // (32 * KEPT_KEYS)
    every: tl.constexpr = (tl.constexpr(1) << BLOCK_N // KEPT_KEYS) - 1
    bits = tl.full(row.shape, every, tl.int32) << (start_k // KEPT_KEYS % 32)
    if blocks is not None:
        base = blocks.words + tl.cast(place.batch, tl.int64) * blocks.batch
        base += tl.cast(h // blocks.heads_per_head, tl.int64) * blocks.head + word
        bits &= tl.load(base + row.to(tl.int64) * blocks.row, mask=exists, other=0)
    base = kept.words + tl.cast(place.batch, tl.int64) * kept.batch
    base += tl.cast(h, tl.int64) * kept.head + word
    tl.atomic_or(base + row.to(tl.int64) * kept.row, bits, mask=exists, sem="relaxed")


def screen(
    problem: AttentionProblem, tensors: AttentionTensors, terms: Terms
) -> tuple[torch.Tensor, Terms]:
    """What is kept (T1), int32 `problem.kept_shape`, and the terms under which only that is
    visited.
    """
    kept = tensors.q.new_zeros(problem.kept_shape, dtype=torch.int32)
    tile = tuning.tile("screen_tiles", problem)
    width = arguments.block_width(problem.head_dim)
    tiles = arguments.tile_count(problem, problem.seqlen_q, tile.block_m)
    padded = arguments.record_length(problem, problem.seqlen_q)
    rows = arguments.records(problem) * problem.heads_q
    level = kept.new_empty(rows * padded, dtype=arguments.sum_dtype(problem))
    worthwhile = kept.new_empty(tiles * problem.heads_q)
    operands = (
        arguments.source(tensors.q, tile.block_m, width, tile.tma),
        arguments.source(tensors.k, tile.block_n, width, tile.tma),
    )
    lists = preparation.list_tiles(problem, terms, None, tile)
    places = placed(terms.sequences, tiles, tile.block_m, False)
    common = (*terms._replace(sequences=places).flat(), lists)
    sizes = (
        padded,
        problem.heads_q,
        problem.group,
        tiles // max(arguments.records(problem), 1),
    )
    constants = {
        "D": problem.head_dim,
        "BLOCK_D": width,
        "PRECISION": arguments.precision(problem),
        "ACC": arguments.accumulator(problem),
        **tile.options(),
    }
    grid = (tiles * problem.heads_q,)
    sample_scores_kernel[grid](
        *operands,
        level,
        worthwhile,
        *common,
        problem.softmax_threshold,
        *sizes,
        SAMPLE=SAMPLE,
        **constants,
    )
    screen_tiles_kernel[grid](
        *operands, of_kept(kept), level, worthwhile, *common, *sizes, **constants
    )
    if terms.ranges is None:
        ranges, _live = preparation.key_ranges(problem, tensors, terms.sequences, terms.block)
        terms = terms._replace(ranges=ranges)
    return kept, terms._replace(blocks=of_kept(kept))
