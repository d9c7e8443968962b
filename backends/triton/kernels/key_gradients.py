"""dk, dv, and the sums of ds over rows that bias and gates of keys take (G1)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, bias_gradient, preparation, slot_sums, tuning
from .arguments import Bounds, RowTerms, Slots, Terms
from .primitives import (
    LN2,
    load_alpha,
    load_bias,
    load_delta,
    load_tile,
    scores,
    store_rows,
    unpruned,
    visible,
)
from .row_terms import row_of_record
from .sequences import clear_rest, place_tile, placed
from .slot_sums import part_of_plane
from .spans import (
    following_tile,
    heads_that_drop,
    listed_tiles,
    nth_tile,
    query_tile_span,
    scheduled,
    slot_tile_span,
)


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_kv", "n_parts"])
def key_gradients_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    dbias,
    ddelta,
    slots,
    rows,
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
    scale,
    heads_kv,
    n_parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    DROPS: tl.constexpr,
):
    """dk, dv, the column sums of ds, [B, Hq, Sk], and ddelta, [B, Hkv, Sk], each None if not
    wanted; grid parts * batch * kv heads. A part is a key tile or, of slots, a share of one's rows;
    its sums, those of ds as [B, Hkv, parts * BLOCK_N, G], are what `slot_sums` adds up.

    Scores are computed transposed, [keys, rows], so that P^T and ds^T enter the products dv = P^T
    do and dk = ds^T q from registers. DROPS: of `preparation.launches`.
    """
    n, part = scheduled(lists, heads_kv, 1, n_parts, False)
    if slots is None:
        place, n_q, n_k, tile_k, exists = place_tile(
            seqlen_q, seqlen_k, sequences, part, n_parts, BLOCK_N, True
        )
        if not exists:
            return
    else:
        n_k = seqlen_k
        place, n_q, segment_q, tile_k, share, shares = part_of_plane(
            slots, sequences, part // n_parts, n, part % n_parts, seqlen_q, seqlen_k, BLOCK_N
        )
        if shares == 0:
            return
    bounds = Bounds(
        n_q, n_k, left, right, tl.minimum(left_sinks, n_k), tl.minimum(right_sinks, n_k)
    )
    own = part if sequences is not None else tile_k
    if DROPS is not None and (heads_that_drop(lists, place, n * GROUP, own, GROUP) > 0) != DROPS:
        return
    if DROPS is not None and not DROPS:
        lists = None
    start_k = tile_k * BLOCK_N
    first_key = place.key + start_k
    end_key = place.key + bounds.seqlen_k
    end_row = place.row + bounds.seqlen_q
    j = start_k + tl.arange(0, BLOCK_N)
    if slots is None:
        target = place.key + j
        stored = j < bounds.seqlen_k
        n_targets = seqlen_k
    else:
        target = part % n_parts * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = target >= 0
        n_targets = n_parts * BLOCK_N
    RAW: tl.constexpr = score.inner is None and gates is None and bias is None

    k_tile = load_tile(k, place.batch, n, first_key, end_key, BLOCK_N, D, BLOCK_D, True, False)
    v_tile = load_tile(v, place.batch, n, first_key, end_key, BLOCK_N, DV, BLOCK_DV, True, False)
    delta = None
    if gates is not None:
        delta = load_delta(gates, place, n * GROUP, j)[:, None]
    if dk is not None:
        dk_acc = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    if dv is not None:
        dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], ACC)
    if ddelta is not None:
        ddelta_acc = tl.zeros([BLOCK_N], ACC)
    if slots is not None and lists is None:
        span = slot_tile_span(
            slots, ranges, place, n * GROUP, tile_k, segment_q, bounds.seqlen_q,
            BLOCK_M, BLOCK_N, SUB,
        )  # fmt: skip
    elif lists is None:
        span = query_tile_span(bounds, start_k, BLOCK_M, BLOCK_N)

    LISTED: tl.constexpr = lists is not None
    for g in range(GROUP):
        h = n * GROUP + g
        row_base = row_of_record(tl.cast(place.batch, tl.int64) * heads_kv * GROUP + h, rows)
        row_base += place.row_record
        if dbias is not None:
            dbias_acc = tl.zeros([BLOCK_N], ACC)
        if lists is not None:
            tiles, n_full, n_partial = listed_tiles(lists, place, h, own)
        else:
            low, full_low, full_high, high = span
            tiles = (0, low, full_low, full_high, high)
            n_full = full_high - full_low
            n_partial = (full_low - low) + (high - full_high)
        # Full tiles last: with another loop behind theirs, ptxas serialises its matrix products.
        for PARTIAL in tl.static_range(1, -1, -1):
            n_tiles = n_partial if PARTIAL else n_full
            first = 0
            if slots is not None:
                first = n_tiles * share // shares
                n_tiles = n_tiles * (share + 1) // shares
            if LISTED:
                upcoming = nth_tile(tiles, lists, first, PARTIAL)
            for t in range(first, n_tiles):
                if LISTED:
                    tile_q = upcoming
                    upcoming = following_tile(tiles, lists, t, n_tiles, PARTIAL)
                else:
                    tile_q = nth_tile(tiles, lists, t, PARTIAL)
                start_q = tile_q * BLOCK_M
                first_row = place.row + start_q
                i = start_q + tl.arange(0, BLOCK_M)
                q_tile = load_tile(
                    q, place.batch, h, first_row, end_row, BLOCK_M, D, BLOCK_D, PARTIAL, False
                )
                shift = tl.load(rows.shift + row_base + i)
                if PARTIAL:
                    keep = visible(
                        place, h, start_q, start_k, bounds, mask, blocks, ranges,
                        BLOCK_M, BLOCK_N, True,
                    )  # fmt: skip
                x = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC)
                if RAW:
                    s = x * score.outer
                else:
                    alpha = None
                    bias_tile = None
                    if gates is not None:
                        alpha = load_alpha(gates, place, h, i)[None, :]
                    if bias is not None:
                        bias_tile = load_bias(bias, place, h, i[None, :], j[:, None], bounds)
                    s, slope, gated, gate_slope = scores(x, score, gates, alpha, delta, bias_tile)
                    if PARTIAL and gates is not None:
                        keep = unpruned(keep, gated, gates, place, h, i[None, :])
                s = s - shift[None, :]
                p = tl.exp(s) if score.natural else tl.exp2(s)
                if PARTIAL:
                    p = tl.where(keep, p, 0.0)  # N2
                do_tile = load_tile(
                    do, place.batch, h, first_row, end_row, BLOCK_M, DV, BLOCK_DV, PARTIAL, False
                )
                if dv is not None:
                    dv_acc = tl.dot(
                        p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION,
                        out_dtype=ACC,
                    )  # fmt: skip
                if dk is not None or dbias is not None or ddelta is not None:
                    row_delta = tl.load(rows.delta + row_base + i)
                    dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION, out_dtype=ACC)
                    ds = p * (dp - row_delta[None, :])
                    if dbias is not None:
                        dbias_acc += tl.sum(ds, 1)
                    if ddelta is not None:
                        ddelta_acc += tl.sum(ds * (gate_slope * alpha), 1)
                    if dk is not None:
                        if score.inner is not None:
                            ds = ds * slope
                        dk_acc = tl.dot(
                            ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION,
                            out_dtype=ACC,
                        )  # fmt: skip
        if dbias is not None:
            if slots is None:
                column = (
                    tl.cast(place.batch, tl.int64) * heads_kv * GROUP + h
                ) * n_targets + target
            else:  # the heads of a group side by side, as they are added up
                column = (tl.cast(place.batch, tl.int64) * heads_kv + n) * n_targets + target
                column = column * GROUP + g
            tl.store(dbias + column, dbias_acc, mask=stored)

    if dk is not None:
        store_rows(dk, place.batch, n, target, stored, dk_acc * scale, D, BLOCK_D)
    if dv is not None:
        store_rows(dv, place.batch, n, target, stored, dv_acc, DV, BLOCK_DV)
    if ddelta is not None:
        column = (tl.cast(place.batch, tl.int64) * heads_kv + n) * n_targets + target
        unit = 1.0 if score.natural else LN2  # of alpha
        tl.store(ddelta + column, ddelta_acc * scale * unit, mask=stored)


def key_gradients(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    terms: Terms,
    slots: Slots | None,
    rows: RowTerms,
    do: Tensor,
) -> dict[str, Tensor]:
    """dk, dv, ddelta and the gradient of a bias without rows, those of them that are needed."""
    tile = tuning.tile("key_gradients", problem, slots is not None)
    batch, sums_as = arguments.records(problem), rows.delta.dtype
    parts = arguments.rows_of_tiles(problem, problem.seqlen_k, tile.block_n)
    targets, dtype = problem.seqlen_k, problem.dtype
    if slots is not None:
        parts = slot_sums.parts_of_plane(slots, tile.block_n)
        targets, dtype = parts * tile.block_n, torch.float32
    shape = (batch, targets, problem.heads_kv)
    dk = tensors.k.new_empty((*shape, problem.head_dim), dtype=dtype)
    dv = tensors.v.new_empty((*shape, problem.head_dim_v), dtype=dtype)
    dk = dk if problem.needs("k") else None
    dv = dv if problem.needs("v") else None
    sums, ddelta = None, None
    if bias_gradient.kind(problem) == bias_gradient.Kind.KEYS:
        sums = rows.delta.new_empty((batch, problem.heads_q, targets))
    if problem.needs("gate_k"):
        ddelta = rows.delta.new_empty((batch, problem.heads_kv, targets), dtype=sums_as)
    lists = preparation.list_tiles(problem, terms, slots, tile, transposed=True)
    places = terms.sequences
    if slots is None:
        places = placed(places, parts, tile.block_n, True)
    sources = arguments.sources(problem, tensors, do, tile)
    for part, drops in preparation.launches(problem, terms):
        key_gradients_kernel[(parts * batch * problem.heads_kv,)](
            *sources,
            None if dk is None else arguments.operand(dk),
            None if dv is None else arguments.operand(dv),
            sums,
            ddelta,
            slots,
            rows,
            *part._replace(sequences=places).flat(),
            lists,
            arguments.number(problem, problem.softmax_scale),
            problem.heads_kv,
            parts,
            D=problem.head_dim,
            BLOCK_D=arguments.block_width(problem.head_dim),
            DV=problem.head_dim_v,
            BLOCK_DV=arguments.block_width(problem.head_dim_v),
            PRECISION=arguments.precision(problem),
            ACC=arguments.accumulator(problem),
            GROUP=problem.group,
            SUB=terms.block,
            DROPS=drops,
            **tile.options(),
        )
    if slots is not None:
        dk, dv, sums, ddelta = slot_sums.add_up(
            problem, slots, terms.sequences, tile.block_n, dk, dv, sums, ddelta
        )
    for x in (dk, dv):
        if x is not None:
            clear_rest(terms.sequences, True, x)
    for vector in (sums, ddelta):
        if vector is not None:
            clear_rest(terms.sequences, True, None, vector)
    gradients = {
        "k": dk,
        "v": dv,
        "gate_k": None if ddelta is None else ddelta.transpose(1, 2).contiguous(),
        "bias": None if sums is None else bias_gradient.reduce(problem, sums.unsqueeze(2)),
    }
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}
