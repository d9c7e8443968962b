"""Forward: o and lse of O1 and O2, one query tile of one head per program.

The online softmax is that of FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1) in base 2.

Under a softmax threshold (T1) a tile is dropped when every score of it is below what the threshold
allows against the sum so far, which is a lower bound of the final one. Its product with V and its
exponentials are then saved, and in the backward all of it. Tiles that are likely to hold much are
visited first: the first keys and those on the diagonal, then back from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, preparation, tuning
from .arguments import Bounds
from .blocks import of_kept
from .primitives import (
    KEPT_KEYS,
    KEPT_ROWS,
    LN2,
    hide_if,
    load_alpha,
    load_bias,
    load_delta,
    load_tile,
    scores,
    store_rows,
    unpruned,
    visible,
)
from .sequences import clear_rest, place_tile
from .spans import key_tiles, nth_of_span, nth_tile


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_q", "group", "tiles_q"])
def forward_kernel(
    q,
    k,
    v,
    o,
    lse,
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
    threshold,
    heads_q,
    group,
    tiles_q,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Grid query tiles * batch * heads: heads fastest, so that a group shares its keys in cache.

    Last tiles first, as they are the longest under V1. `tiles_q` counts those of a batch element
    or, packed, all of them.
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
    first_row = place.row + start_q
    end_row = place.row + bounds.seqlen_q
    end_key = place.key + bounds.seqlen_k
    CUT: tl.constexpr = sequences is not None
    DROPS: tl.constexpr = kept is not None
    # Scores that are a rising multiple of the raw products are never formed: exp2 scales them.
    RAW: tl.constexpr = score.inner is None and gates is None and bias is None and score.positive

    own = nth if CUT else tile_q
    tiles, n_full, n_partial = key_tiles(bounds, lists, place, h, tile_q, own, BLOCK_M, BLOCK_N)

    q_tile = load_tile(q, place.batch, h, first_row, end_row, BLOCK_M, D, BLOCK_D, True, False)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], float("-inf"), ACC)
    alpha = None
    if gates is not None:
        alpha = load_alpha(gates, place, h, i)[:, None]
    if DROPS:  # T1: the keys of the tiles visited are no fewer than those that a row sees
        n = tl.minimum((n_full + n_partial) * BLOCK_N, bounds.seqlen_k)
        share = tl.log2(threshold / tl.maximum(n, 1).to(tl.float32))
    # A span is short: one loop, which decides in passing whether a tile is full, fills the pipeline
    # once. (Long rows of full tiles are better off without the test.)
    SPAN: tl.constexpr = lists is not None and lists.spans
    for PARTIAL in tl.static_range(
        1 if DROPS else 0, -1 if DROPS else (1 if SPAN else 2), -1 if DROPS else 1
    ):
        n_tiles = n_partial if PARTIAL else n_full
        if SPAN:
            n_tiles = n_full + n_partial
        for t in range(n_tiles):
            if SPAN:
                tile_k, hides = nth_of_span(tiles, t)
            elif DROPS:
                tile_k = nth_tile(tiles, lists, tl.where(t == 0, 0, n_tiles - t), PARTIAL)
            else:
                tile_k = nth_tile(tiles, lists, t, PARTIAL)
            start_k = tile_k * BLOCK_N
            first_key = place.key + start_k
            j = start_k + tl.arange(0, BLOCK_N)
            k_tile = load_tile(
                k, place.batch, h // group, first_key, end_key, BLOCK_N, D, BLOCK_D, PARTIAL, False
            )
            if PARTIAL:
                keep = visible(
                    place, h, start_q, start_k, bounds, mask, blocks, ranges,
                    BLOCK_M, BLOCK_N, False,
                )  # fmt: skip
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
            if not RAW:
                delta = None
                bias_tile = None
                if gates is not None:
                    delta = load_delta(gates, place, h, j)[None, :]
                if bias is not None:
                    bias_tile = load_bias(bias, place, h, i[:, None], j[None, :], bounds)
                x, _, gated, _ = scores(x, score, gates, alpha, delta, bias_tile)
                if PARTIAL and gates is not None:
                    keep = unpruned(keep, gated, gates, place, h, i[:, None])
            if PARTIAL:
                x = tl.where(keep, x, float("-inf"))  # N2
            if SPAN:
                x = hide_if(hides, x, place, h, start_q, start_k, bounds, ranges, BLOCK_M, BLOCK_N)
            v_tile = load_tile(
                v, place.batch, h // group, first_key, end_key, BLOCK_N, DV, BLOCK_DV, PARTIAL, CUT
            )
            MAY_BE_EMPTY: tl.constexpr = PARTIAL or SPAN or not RAW
            if DROPS:
                largest = tl.reduce(x, 1, _maximum) * (score.outer if RAW else 1.0)
                # Rows that see nothing here, or do not exist, have no say.
                spare = (largest < peak + tl.log2(total) + share) | (largest == float("-inf"))
                if tl.min((spare | (i >= bounds.seqlen_q)).to(tl.int32), 0) == 0:
                    acc, total, peak = _accumulate(
                        x,
                        score.outer if RAW else 1.0,
                        v_tile,
                        acc,
                        total,
                        peak,
                        MAY_BE_EMPTY,
                        PRECISION,
                    )
                    _mark_kept(kept, blocks, place, h, start_q, start_k, bounds, BLOCK_M, BLOCK_N)
            else:
                acc, total, peak = _accumulate(
                    x,
                    score.outer if RAW else 1.0,
                    v_tile,
                    acc,
                    total,
                    peak,
                    MAY_BE_EMPTY,
                    PRECISION,
                )

    empty = total == 0.0
    acc = acc * (1.0 / tl.where(empty, 1.0, total))[:, None]  # one division a row
    target = place.row + i
    store_rows(o, place.batch, h, target, i < bounds.seqlen_q, acc, DV, BLOCK_DV)
    row = (tl.cast(place.batch, tl.int64) * heads_q + h) * seqlen_q + target
    tl.store(
        lse + row,
        tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2),
        mask=i < bounds.seqlen_q,
    )


@triton.jit
def _maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _accumulate(
    x, unit, v_tile, acc, total, peak, MAY_BE_EMPTY: tl.constexpr, PRECISION: tl.constexpr
):
    """One step of the online softmax over scores x * unit in base 2."""
    new_peak = tl.maximum(peak, tl.max(x, 1) * unit)
    shift = new_peak
    if MAY_BE_EMPTY:  # a row that has seen nothing has no finite maximum
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(x * unit - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, total, new_peak


@triton.jit
def _mark_kept(
    kept,
    blocks,
    place,
    h,
    start_q,
    start_k,
    bounds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Note that a tile was kept (T1), as far as V5 shows its blocks."""
    row = start_q // KEPT_ROWS + tl.arange(0, BLOCK_M // KEPT_ROWS)
    exists = row * KEPT_ROWS < bounds.seqlen_q
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


def forward(
    problem: AttentionProblem, tensors: AttentionTensors
) -> tuple[Tensor, Tensor, Tensor | None]:
    """O1, O2 and T1: o `[B, Sq, Hq, Dv]` in the dtype of q, lse `[B, Hq, Sq]`, without batch dims
    when packed, both contiguous; and what was kept, None without a threshold.
    """
    q = tensors.q
    o = q.new_empty((*q.shape[:-1], problem.head_dim_v))
    rows = (problem.heads_q, problem.seqlen_q)
    lse = q.new_empty((arguments.records(problem), *rows), dtype=arguments.sum_dtype(problem))
    kept = None
    if problem.softmax_threshold > 0:
        kept = q.new_zeros(problem.kept_shape, dtype=torch.int32)
    problem, tensors, terms, slots = preparation.prepare(problem, tensors, "forward")
    tile = tuning.tile("forward", problem, slots is not None)
    width, width_v = (arguments.block_width(d) for d in (problem.head_dim, problem.head_dim_v))
    tiles = arguments.tile_count(problem, problem.seqlen_q, tile.block_m)
    o_rows = arguments.batched(o)
    forward_kernel[(tiles * problem.heads_q,)](
        arguments.source(tensors.q, tile.block_m, width, tile.tma),
        arguments.source(tensors.k, tile.block_n, width, tile.tma),
        arguments.source(tensors.v, tile.block_n, width_v, tile.tma),
        arguments.operand(o_rows),
        lse,
        None if kept is None else of_kept(kept),
        *terms.flat(),
        preparation.list_tiles(problem, terms, slots, tile),
        problem.softmax_threshold,
        problem.heads_q,
        problem.group,
        tiles // max(arguments.records(problem), 1),
        D=problem.head_dim,
        BLOCK_D=width,
        DV=problem.head_dim_v,
        BLOCK_DV=width_v,
        PRECISION=arguments.precision(problem),
        ACC=arguments.accumulator(problem),
        **tile.options(),
    )
    clear_rest(terms.sequences, False, o_rows, lse, -torch.inf)
    return o, lse.view(*q.shape[:-3], *rows), kept
