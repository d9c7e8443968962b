"""Backward: G1 from recomputed scores, without atomics, so that every gradient is bitwise
repeatable (G2).

Three passes, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 2) with the loop over
keys and the loop over queries in kernels of their own: `row_terms_kernel` computes what the others
need of each row, `key_gradients_kernel` owns a key tile and visits the query tiles of all heads of
its group, `query_gradient_kernel` owns a query tile and visits key tiles. Scores are those of the
forward, in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, bias_gradient, preparation, slot_sums, tuning
from .arguments import Bounds, RowTerms, Slots, Terms
from .primitives import LOG2E, load_tile, scores, store_rows, visible
from .sizes import ceil_div
from .slot_sums import part_of_plane
from .tiles import key_tiles, listed_tiles, nth_tile, query_tile_span, slot_tile_span


@triton.jit(do_not_specialize=["seqlen_q", "padded", "heads_q"])
def row_terms_kernel(
    o,
    do,
    lse,
    dlse,
    lse2,
    delta,
    seqlen_q,
    padded,
    heads_q,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Delta of G1 and lse in base 2; grid row blocks * batch * heads.

    Rows that are empty (O2) or do not exist get lse2 = +inf, so that their probabilities come out
    as 0 with no test.
    """
    blocks = padded // BLOCK_M
    start_q = tl.program_id(0) % blocks * BLOCK_M
    head = tl.program_id(0) // blocks
    b = head // heads_q
    h = head % heads_q
    i = start_q + tl.arange(0, BLOCK_M)
    exists = i < seqlen_q
    source = head.to(tl.int64) * seqlen_q + i
    row_lse = tl.load(lse + source, mask=exists, other=float("-inf"))
    o_tile = load_tile(o, b, h, start_q, seqlen_q, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    do_tile = load_tile(do, b, h, start_q, seqlen_q, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    row_delta = tl.sum(o_tile * do_tile, 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + source, mask=exists, other=0.0)
    empty = row_lse == float("-inf")
    target = head.to(tl.int64) * padded + i
    tl.store(lse2 + target, tl.where(empty, float("inf"), row_lse * LOG2E))
    tl.store(delta + target, tl.where(empty, 0.0, row_delta))


@triton.jit
def row_of_record(head, rows):
    """Where a head's row terms start; the hint lets a tile of them be copied in wide pieces."""
    return tl.multiple_of(head * rows.padded, 16)


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_kv", "n_parts"])
def key_gradients_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    dbias,
    slots,
    rows,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    score,
    bias,
    mask,
    ranges,
    lists,
    scale,
    heads_kv,
    n_parts,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
):
    """dk, dv and the column sums of ds, [B, Hq, Sk], each None if not wanted; grid parts * batch *
    kv heads, heads fastest. A part is a key tile or, of slots, a share of one's rows; its sums,
    those of ds as [B, Hkv, parts * BLOCK_N, G], are what `slot_sums` adds up.

    Scores are computed transposed, [keys, rows], so that P^T and ds^T enter the products dv = P^T
    do and dk = ds^T q from registers.
    """
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    n = tl.program_id(0) % heads_kv
    part = tl.program_id(0) // heads_kv % n_parts
    b = tl.program_id(0) // (heads_kv * n_parts)
    tile_k, share, shares = part_of_plane(slots, b, n, part, BLOCK_N)
    if shares == 0:
        return
    start_k = tile_k * BLOCK_N
    j = start_k + tl.arange(0, BLOCK_N)
    target = part * BLOCK_N + tl.arange(0, BLOCK_N)
    n_targets = bounds.seqlen_k if slots is None else n_parts * BLOCK_N
    RAW: tl.constexpr = score.inner is None and bias is None
    unit = score.outer * LOG2E if RAW else LOG2E

    k_tile = load_tile(k, b, n, start_k, bounds.seqlen_k, BLOCK_N, D, BLOCK_D, True)
    v_tile = load_tile(v, b, n, start_k, bounds.seqlen_k, BLOCK_N, D, BLOCK_D, True)
    if dk is not None:
        dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if dv is not None:
        dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if slots is not None:
        span = slot_tile_span(
            slots, ranges, b, n * GROUP, tile_k, bounds.seqlen_q, BLOCK_M, BLOCK_N, SUB
        )
    elif lists is None:
        span = query_tile_span(bounds, start_k, BLOCK_M, BLOCK_N)

    for g in range(GROUP):
        h = n * GROUP + g
        row_base = row_of_record(tl.cast(b, tl.int64) * heads_kv * GROUP + h, rows)
        if dbias is not None:
            dbias_acc = tl.zeros([BLOCK_N], tl.float32)
        if lists is not None:
            tiles, n_full, n_partial = listed_tiles(lists, b, h, tile_k)
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
            for t in range(first, n_tiles):
                start_q = nth_tile(tiles, lists, t, PARTIAL) * BLOCK_M
                i = start_q + tl.arange(0, BLOCK_M)
                q_tile = load_tile(q, b, h, start_q, bounds.seqlen_q, BLOCK_M, D, BLOCK_D, PARTIAL)
                lse2 = tl.load(rows.lse2 + row_base + i)
                if PARTIAL:
                    keep = visible(
                        b, h, start_q, start_k, bounds, mask, ranges, BLOCK_M, BLOCK_N, True
                    )
                x = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
                if RAW:
                    p = tl.exp2(x * unit - lse2[None, :])
                else:
                    s, slope = scores(x, b, h, i[None, :], j[:, None], score, bias, bounds)
                    p = tl.exp2(s * unit - lse2[None, :])
                if PARTIAL:
                    p = tl.where(keep, p, 0.0)  # N2
                do_tile = load_tile(
                    do, b, h, start_q, bounds.seqlen_q, BLOCK_M, D, BLOCK_D, PARTIAL
                )
                if dv is not None:
                    dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
                if dk is not None or dbias is not None:
                    delta = tl.load(rows.delta + row_base + i)
                    dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
                    ds = p * (dp - delta[None, :])
                    if dbias is not None:
                        dbias_acc += tl.sum(ds, 1)
                    if dk is not None:
                        if score.inner is not None:
                            ds = ds * slope
                        dk_acc = tl.dot(
                            ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION
                        )
        if dbias is not None:
            if slots is None:
                column = (tl.cast(b, tl.int64) * heads_kv * GROUP + h) * n_targets + target
            else:  # the heads of a group side by side, as they are added up
                column = (tl.cast(b, tl.int64) * heads_kv + n) * n_targets + target
                column = column * GROUP + g
            tl.store(dbias + column, dbias_acc, mask=target < n_targets)

    if dk is not None:
        store_rows(dk, b, n, target, target < n_targets, dk_acc * scale, D, BLOCK_D)
    if dv is not None:
        store_rows(dv, b, n, target, target < n_targets, dv_acc, D, BLOCK_D)


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_q", "group"])
def query_gradient_kernel(
    q,
    k,
    v,
    do,
    dq,
    rows,
    seqlen_q,
    seqlen_k,
    left,
    right,
    left_sinks,
    right_sinks,
    score,
    bias,
    mask,
    ranges,
    lists,
    scale,
    heads_q,
    group,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq; grid query tiles * batch * heads, in the order of the forward."""
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    tiles_q = tl.cdiv(bounds.seqlen_q, BLOCK_M)
    h = tl.program_id(0) % heads_q
    tile_q = tiles_q - 1 - tl.program_id(0) // heads_q % tiles_q
    b = tl.program_id(0) // (heads_q * tiles_q)
    start_q = tile_q * BLOCK_M
    i = start_q + tl.arange(0, BLOCK_M)
    RAW: tl.constexpr = score.inner is None and bias is None
    unit = score.outer * LOG2E if RAW else LOG2E

    tiles, n_full, n_partial = key_tiles(bounds, lists, b, h, tile_q, BLOCK_M, BLOCK_N)

    q_tile = load_tile(q, b, h, start_q, bounds.seqlen_q, BLOCK_M, D, BLOCK_D, True)
    do_tile = load_tile(do, b, h, start_q, bounds.seqlen_q, BLOCK_M, D, BLOCK_D, True)
    row_base = row_of_record(tl.cast(b, tl.int64) * heads_q + h, rows)
    lse2 = tl.load(rows.lse2 + row_base + i)
    delta = tl.load(rows.delta + row_base + i)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for PARTIAL in tl.static_range(2):
        for t in range(n_partial if PARTIAL else n_full):
            start_k = nth_tile(tiles, lists, t, PARTIAL) * BLOCK_N
            j = start_k + tl.arange(0, BLOCK_N)
            k_tile = load_tile(
                k, b, h // group, start_k, bounds.seqlen_k, BLOCK_N, D, BLOCK_D, PARTIAL
            )
            v_tile = load_tile(
                v, b, h // group, start_k, bounds.seqlen_k, BLOCK_N, D, BLOCK_D, PARTIAL
            )
            if PARTIAL:
                keep = visible(
                    b, h, start_q, start_k, bounds, mask, ranges, BLOCK_M, BLOCK_N, False
                )
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if RAW:
                p = tl.exp2(x * unit - lse2[:, None])
            else:
                s, slope = scores(x, b, h, i[:, None], j[None, :], score, bias, bounds)
                p = tl.exp2(s * unit - lse2[:, None])
            if PARTIAL:
                p = tl.where(keep, p, 0.0)  # N2
            # Here, so that one warp group takes exponentials while another multiplies.
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            if score.inner is not None:
                ds = ds * slope
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_rows(dq, b, h, i, i < bounds.seqlen_q, acc * scale, D, BLOCK_D)


def backward(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
) -> dict[str, Tensor]:
    """The gradients named in `problem.grads`: of q, k and v in their dtype and contiguous, of the
    bias in float32 and its own shape.
    """
    rows = row_terms(problem, o, lse, do, dlse)
    tensors, terms, slots = preparation.prepare(problem, tensors, "backward")
    gradients = {}
    sums = bias_gradient.kind(problem) == bias_gradient.Kind.KEYS
    if problem.needs("k", "v") or sums:
        gradients |= key_gradients(problem, tensors, terms, slots, rows, do)
    if problem.needs("q"):
        gradients["q"] = query_gradient(problem, tensors, terms, slots, rows, do)
    if problem.needs("bias") and not sums:
        gradients["bias"] = bias_gradient.bias_gradient(
            problem, tensors, terms, rows, lse, do, dlse
        )
    return {name: gradients[name] for name in problem.grads}


def row_terms(
    problem: AttentionProblem, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None
) -> RowTerms:
    """lse2 and delta, float32 `[B, Hq, padded]`."""
    padded = arguments.padded(problem.seqlen_q)
    lse2, delta = (lse.new_empty((problem.batch, problem.heads_q, padded)) for _ in range(2))
    row_terms_kernel[(padded // arguments.RECORD_BLOCK * problem.batch * problem.heads_q,)](
        arguments.operand(o),
        arguments.operand(do),
        lse.contiguous(),
        None if dlse is None else dlse.contiguous(),
        lse2,
        delta,
        problem.seqlen_q,
        padded,
        problem.heads_q,
        D=problem.head_dim,
        BLOCK_D=arguments.block_d(problem),
        BLOCK_M=arguments.RECORD_BLOCK,
    )
    return RowTerms(lse2, delta, padded)


def key_gradients(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    terms: Terms,
    slots: Slots | None,
    rows: RowTerms,
    do: Tensor,
) -> dict[str, Tensor]:
    """dk, dv and the gradient of a bias without rows, those of them that are needed."""
    tile = tuning.tile("key_gradients", problem, slots is not None)
    parts, targets, dtype = ceil_div(problem.seqlen_k, tile.block_n), problem.seqlen_k, None
    if slots is not None:
        parts = slot_sums.parts_of_plane(slots, tile.block_n)
        targets, dtype = parts * tile.block_n, torch.float32
    shape = (problem.batch, targets, problem.heads_kv, problem.head_dim)
    dk = tensors.k.new_empty(shape, dtype=dtype) if problem.needs("k") else None
    dv = tensors.v.new_empty(shape, dtype=dtype) if problem.needs("v") else None
    sums = None
    if bias_gradient.kind(problem) == bias_gradient.Kind.KEYS:
        sums = rows.delta.new_empty((problem.batch, problem.heads_q, targets))
    key_gradients_kernel[(parts * problem.batch * problem.heads_kv,)](
        *arguments.sources(problem, tensors, do, tile),
        None if dk is None else arguments.operand(dk),
        None if dv is None else arguments.operand(dv),
        sums,
        slots,
        rows,
        *terms.flat(),
        preparation.list_tiles(problem, terms, slots, tile, transposed=True),
        problem.softmax_scale,
        problem.heads_kv,
        parts,
        D=problem.head_dim,
        BLOCK_D=arguments.block_d(problem),
        PRECISION=arguments.precision(problem),
        GROUP=problem.group,
        SUB=terms.block,
        **tile.options(),
    )
    if slots is not None:
        dk, dv, sums = slot_sums.add_up(problem, slots, tile.block_n, dk, dv, sums)
    gradients = {
        "k": dk,
        "v": dv,
        "bias": None if sums is None else bias_gradient.reduce(problem, sums.unsqueeze(2)),
    }
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def query_gradient(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    terms: Terms,
    slots: Slots | None,
    rows: RowTerms,
    do: Tensor,
) -> Tensor:
    """dq."""
    tile = tuning.tile("query_gradient", problem, slots is not None)
    dq = torch.empty_like(tensors.q, memory_format=torch.contiguous_format)
    grid = (ceil_div(problem.seqlen_q, tile.block_m) * problem.batch * problem.heads_q,)
    query_gradient_kernel[grid](
        *arguments.sources(problem, tensors, do, tile),
        arguments.operand(dq),
        rows,
        *terms.flat(),
        preparation.list_tiles(problem, terms, slots, tile),
        problem.softmax_scale,
        problem.heads_q,
        problem.group,
        D=problem.head_dim,
        BLOCK_D=arguments.block_d(problem),
        PRECISION=arguments.precision(problem),
        **tile.options(),
    )
    return dq
