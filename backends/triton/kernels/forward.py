"""Forward: o and lse of O1 and O2, one query tile of one head per program.

The online softmax is that of FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1), in base 2
mostly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, preparation, screening, tuning
from .arguments import Bounds, Slots, Terms
from .primitives import (
    LN2,
    hide_if,
    load_alpha,
    load_bias,
    load_delta,
    load_floor,
    load_tile,
    natural_gate,
    scores,
    store_rows,
    visible,
)
from .sequences import clear_rest, place_tile, placed
from .spans import following_tile, heads_that_drop, key_tiles, nth_of_span, nth_tile, scheduled


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_q", "group", "tiles_q"])
def forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    totals,
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
    DROPS: tl.constexpr,
):
    """Grid query tiles * batch * heads.

    `tiles_q` counts the tiles of a batch element or, packed, all of them. With `totals`, `lse` gets
    peaks (`peaks`). DROPS: of `preparation.launches`.
    """
    h, nth = scheduled(lists, heads_q, group, tiles_q, True)
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
    PACKED: tl.constexpr = sequences is not None
    CUT: tl.constexpr = PACKED and not sequences.gathered
    # Scores that are a rising multiple of the raw products, or of these and the gates, are never
    # formed: the exponential scales them.
    RAW: tl.constexpr = (
        score.inner is None
        and bias is None
        and score.positive
        and (gates is None or not score.natural)  # whose order of sums is the reference's (N1)
    )
    PLAIN: tl.constexpr = RAW and gates is None
    # Products then start from the gates, worked out while those of the values before still run.
    FROM_GATES: tl.constexpr = RAW and not PLAIN

    own = nth if PACKED else tile_q
    if DROPS is not None and (heads_that_drop(lists, place, h, own, 1) > 0) != DROPS:
        return
    if DROPS is not None and not DROPS:
        lists = None
    tiles, n_full, n_partial = key_tiles(bounds, lists, place, h, tile_q, own, BLOCK_M, BLOCK_N)

    q_tile = load_tile(q, place.batch, h, first_row, end_row, BLOCK_M, D, BLOCK_D, True, False)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], float("-inf"), ACC)
    alpha = None
    floor = None
    if gates is not None:
        alpha = load_alpha(gates, place, h, i)[:, None]
        if gates.pruned:
            floor = load_floor(gates, place, h, i)[:, None]
    # A span is short: one loop, which decides in passing whether a tile is full, fills the pipeline
    # once. (Long rows of full tiles are better off without the test.)
    SPAN: tl.constexpr = lists is not None and lists.spans
    LISTED: tl.constexpr = lists is not None and not lists.spans
    # The order of the loops decides whether registers suffice and products stay asynchronous.
    FULL_FIRST: tl.constexpr = not SPAN and (RAW or gates is not None)
    for PARTIAL in tl.static_range(
        0 if FULL_FIRST or SPAN else 1, 2 if FULL_FIRST else -1, 1 if FULL_FIRST else -1
    ):
        n_tiles = n_partial if PARTIAL else n_full
        if SPAN:
            n_tiles = n_full + n_partial
        if LISTED:
            upcoming = nth_tile(tiles, lists, 0, PARTIAL)
        for t in range(n_tiles):
            if SPAN:
                tile_k, hides = nth_of_span(tiles, t)
            elif LISTED:
                tile_k = upcoming
                upcoming = following_tile(tiles, lists, t, n_tiles, PARTIAL)
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
            if FROM_GATES:
                g = natural_gate(gates, alpha * load_delta(gates, place, h, j)[None, :])
                if PARTIAL and gates.pruned:
                    keep = keep & ~(g * score.outer < floor)  # V7
                x = tl.dot(q_tile, tl.trans(k_tile), g, input_precision=PRECISION, out_dtype=ACC)
            else:
                x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
            if not RAW:
                delta = None
                bias_tile = None
                if gates is not None:
                    delta = load_delta(gates, place, h, j)[None, :]
                if bias is not None:
                    bias_tile = load_bias(bias, place, h, i[:, None], j[None, :], bounds)
                x, _, gated, _ = scores(x, score, gates, alpha, delta, bias_tile)
                if PARTIAL and floor is not None:
                    keep = keep & ~(gated < floor)  # V7
            if PARTIAL:
                x = tl.where(keep, x, float("-inf"))  # N2
            if SPAN:
                x = hide_if(hides, x, place, h, start_q, start_k, bounds, ranges, BLOCK_M, BLOCK_N)
            v_tile = load_tile(
                v, place.batch, h // group, first_key, end_key, BLOCK_N, DV, BLOCK_DV, PARTIAL, CUT
            )
            new_peak = tl.maximum(peak, tl.max(x, 1) * (score.outer if RAW else 1.0))
            shift = new_peak
            if PARTIAL or SPAN or not PLAIN:  # a row that has seen nothing has no finite maximum
                shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            s = x * (score.outer if RAW else 1.0) - shift[:, None]
            p = tl.exp(s) if score.natural else tl.exp2(s)
            decay = tl.exp(peak - shift) if score.natural else tl.exp2(peak - shift)
            total = total * decay + tl.sum(p, 1)
            if acc.dtype == tl.float64:  # sums of tiles err less than one chain of all (N1)
                acc = tl.fma(acc, decay[:, None], tl.dot(p, v_tile, out_dtype=ACC))
            else:
                acc = acc * decay[:, None]
                acc = tl.dot(
                    p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION, out_dtype=ACC
                )
            peak = new_peak

    empty = total == 0.0
    acc = acc * (1.0 / tl.where(empty, 1.0, total))[:, None]  # one division a row
    target = place.row + i
    store_rows(o, place.batch, h, target, i < bounds.seqlen_q, acc, DV, BLOCK_DV)
    row = (tl.cast(place.batch, tl.int64) * heads_q + h) * seqlen_q + target
    row_lse = peak + tl.log(total) if score.natural else (peak + tl.log2(total)) * LN2
    row_lse = tl.where(empty, float("-inf"), row_lse)
    if totals is not None:
        known = total > 0.0  # neither empty nor NaN
        tl.store(totals + row, tl.where(known, total, 1.0), mask=i < bounds.seqlen_q)
        row_lse = tl.where(known, peak, row_lse)
    tl.store(lse + row, row_lse, mask=i < bounds.seqlen_q)


def forward(
    problem: AttentionProblem, tensors: AttentionTensors
) -> tuple[Tensor, Tensor, Tensor | None]:
    """O1, O2 and T1: o `[B, Sq, Hq, Dv]` in the dtype of q, lse `[B, Hq, Sq]`, without batch dims
    when packed, both contiguous; and what was kept, None without a threshold.
    """
    shape = tensors.q.shape[:-1]
    lse = _row_values(problem, tensors)
    problem, tensors, terms, slots = preparation.prepare(problem, tensors, "forward")
    kept = None
    if problem.softmax_threshold > 0:
        kept, terms = screening.screen(problem, tensors, terms)
    o = _attend(problem, tensors, terms, slots, lse, None)
    clear_rest(terms.sequences, False, o, lse, -torch.inf)
    return o.view(*shape, problem.head_dim_v), lse.view(*shape[:-2], *lse.shape[1:]), kept


def peaks(
    problem: AttentionProblem, tensors: AttentionTensors, terms: Terms, slots: Slots | None
) -> tuple[Tensor, Tensor]:
    """(peak, total) `[B, Hq, Sq]` of what `prepare` returned for a backward: the greatest score of
    each row, in the base of scores, and the sum of exponentials around it.

    P = exp(s - peak) / total is as exact as the forward's, where exp(s - lse) has the rounding of
    lse, an error that grows with |lse|. A row that is empty or NaN has its lse for peak, and 1 for
    total, as have the tokens of no sequence.
    """
    peak = _row_values(problem, tensors)
    total = torch.ones_like(peak)
    _attend(problem, tensors, terms, slots, peak, total)
    return peak, total


def _row_values(problem: AttentionProblem, tensors: AttentionTensors) -> Tensor:
    """A number for each row, `[B, Hq, Sq]`, B = 1 when packed."""
    shape = (arguments.records(problem), problem.heads_q, problem.seqlen_q)
    return tensors.q.new_empty(shape, dtype=arguments.sum_dtype(problem))


def _attend(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    terms: Terms,
    slots: Slots | None,
    lse: Tensor,
    totals: Tensor | None,
) -> Tensor:
    """o `[B, Sq, Hq, Dv]`, and `lse` or, with `totals`, both of `peaks`, in place."""
    o = tensors.q.new_empty((*tensors.q.shape[:-1], problem.head_dim_v))
    tile = tuning.tile("forward", problem, slots is not None)
    width, width_v = (arguments.block_width(d) for d in (problem.head_dim, problem.head_dim_v))
    tiles = arguments.tile_count(problem, problem.seqlen_q, tile.block_m)
    lists = preparation.list_tiles(problem, terms, slots, tile)
    places = placed(terms.sequences, tiles, tile.block_m, False)
    sources = (
        arguments.source(tensors.q, tile.block_m, width, tile.tma),
        arguments.source(tensors.k, tile.block_n, width, tile.tma),
        arguments.source(tensors.v, tile.block_n, width_v, tile.tma),
    )
    for part, drops in preparation.launches(problem, terms):
        forward_kernel[(tiles * problem.heads_q,)](
            *sources,
            arguments.operand(o),
            lse,
            totals,
            *part._replace(sequences=places).flat(),
            lists,
            problem.heads_q,
            problem.group,
            tiles // max(arguments.records(problem), 1),
            D=problem.head_dim,
            BLOCK_D=width,
            DV=problem.head_dim_v,
            BLOCK_DV=width_v,
            PRECISION=arguments.precision(problem),
            ACC=arguments.accumulator(problem),
            DROPS=drops,
            **tile.options(),
        )
    return o
