"""dq, and the sums of ds over keys that the gates of rows take (G1)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, preparation, tuning
from .arguments import Bounds, RowTerms, Slots, Terms
from .primitives import (
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
from .spans import following_tile, heads_that_drop, key_tiles, nth_tile, scheduled


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_q", "group", "tiles_q"])
def query_gradients_kernel(
    q,
    k,
    v,
    do,
    dq,
    dalpha,
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
    """dq and dalpha, [B, Hq, Sq], each None if not wanted; grid query tiles * batch * heads, in the
    order of the forward. DROPS: of `preparation.launches`.
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
    RAW: tl.constexpr = score.inner is None and gates is None and bias is None

    own = nth if PACKED else tile_q
    if DROPS is not None and (heads_that_drop(lists, place, h, own, 1) > 0) != DROPS:
        return
    if DROPS is not None and not DROPS:
        lists = None
    tiles, n_full, n_partial = key_tiles(bounds, lists, place, h, tile_q, own, BLOCK_M, BLOCK_N)

    q_tile = load_tile(q, place.batch, h, first_row, end_row, BLOCK_M, D, BLOCK_D, True, False)
    do_tile = load_tile(do, place.batch, h, first_row, end_row, BLOCK_M, DV, BLOCK_DV, True, False)
    row_base = row_of_record(tl.cast(place.batch, tl.int64) * heads_q + h, rows) + place.row_record
    shift = tl.load(rows.shift + row_base + i)
    row_delta = tl.load(rows.delta + row_base + i)
    alpha = None
    if gates is not None:
        alpha = load_alpha(gates, place, h, i)[:, None]
    LISTED: tl.constexpr = lists is not None and not lists.spans
    if dq is not None:
        acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if dalpha is not None:
        dalpha_acc = tl.zeros([BLOCK_M], ACC)
    for PARTIAL in tl.static_range(1, -1, -1):
        n_tiles = n_partial if PARTIAL else n_full
        if LISTED:
            upcoming = nth_tile(tiles, lists, 0, PARTIAL)
        for t in range(n_tiles):
            if LISTED:
                tile_k = upcoming
                upcoming = following_tile(tiles, lists, t, n_tiles, PARTIAL)
            else:
                tile_k = nth_tile(tiles, lists, t, PARTIAL)
            start_k = tile_k * BLOCK_N
            first_key = place.key + start_k
            j = start_k + tl.arange(0, BLOCK_N)
            k_tile = load_tile(
                k, place.batch, h // group, first_key, end_key, BLOCK_N, D, BLOCK_D, PARTIAL, CUT
            )
            v_tile = load_tile(
                v, place.batch, h // group, first_key, end_key, BLOCK_N, DV, BLOCK_DV, PARTIAL, CUT
            )
            if PARTIAL:
                keep = visible(
                    place, h, start_q, start_k, bounds, mask, blocks, ranges,
                    BLOCK_M, BLOCK_N, False,
                )  # fmt: skip
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
            if RAW:
                s = x * score.outer
            else:
                delta = None
                bias_tile = None
                if gates is not None:
                    delta = load_delta(gates, place, h, j)[None, :]
                if bias is not None:
                    bias_tile = load_bias(bias, place, h, i[:, None], j[None, :], bounds)
                s, slope, gated, gate_slope = scores(x, score, gates, alpha, delta, bias_tile)
                if PARTIAL and gates is not None:
                    keep = unpruned(keep, gated, gates, place, h, i[:, None])
            s = s - shift[:, None]
            p = tl.exp(s) if score.natural else tl.exp2(s)
            if PARTIAL:
                p = tl.where(keep, p, 0.0)  # N2
            # Here, so that one warp group takes exponentials while another multiplies.
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC)
            ds = p * (dp - row_delta[:, None])
            if dalpha is not None:
                dalpha_acc += tl.sum(ds * (gate_slope * delta), 1)
            if dq is not None:
                if score.inner is not None:
                    ds = ds * slope
                acc = tl.dot(
                    ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION, out_dtype=ACC
                )
    target = place.row + i
    if dq is not None:
        store_rows(dq, place.batch, h, target, i < bounds.seqlen_q, acc * scale, D, BLOCK_D)
    if dalpha is not None:
        row = (tl.cast(place.batch, tl.int64) * heads_q + h) * seqlen_q + target
        tl.store(dalpha + row, dalpha_acc * scale, mask=i < bounds.seqlen_q)


def query_gradients(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    terms: Terms,
    slots: Slots | None,
    rows: RowTerms,
    do: Tensor,
) -> dict[str, Tensor]:
    """dq and dalpha, those of them that are needed."""
    tile = tuning.tile("query_gradients", problem, slots is not None)
    dq, dalpha = None, None
    if problem.needs("q"):
        dq = tensors.q.new_empty(tensors.q.shape)
    if problem.needs("gate_q"):
        shape = (arguments.records(problem), problem.heads_q, problem.seqlen_q)
        dalpha = rows.delta.new_empty(shape)
    tiles = arguments.tile_count(problem, problem.seqlen_q, tile.block_m)
    lists = preparation.list_tiles(problem, terms, slots, tile)
    places = placed(terms.sequences, tiles, tile.block_m, False)
    sources = arguments.sources(problem, tensors, do, tile)
    for part, drops in preparation.launches(problem, terms):
        query_gradients_kernel[(tiles * problem.heads_q,)](
            *sources,
            None if dq is None else arguments.operand(dq),
            dalpha,
            rows,
            *part._replace(sequences=places).flat(),
            lists,
            arguments.number(problem, problem.softmax_scale),
            problem.heads_q,
            problem.group,
            tiles // max(arguments.records(problem), 1),
            D=problem.head_dim,
            BLOCK_D=arguments.block_width(problem.head_dim),
            DV=problem.head_dim_v,
            BLOCK_DV=arguments.block_width(problem.head_dim_v),
            PRECISION=arguments.precision(problem),
            ACC=arguments.accumulator(problem),
            DROPS=drops,
            **tile.options(),
        )
    gradients = {}
    if dq is not None:
        clear_rest(terms.sequences, False, dq)
        gradients["q"] = dq
    if dalpha is not None:
        clear_rest(terms.sequences, False, None, dalpha)
        gradients["gate_q"] = dalpha.transpose(1, 2).contiguous()
    return gradients
