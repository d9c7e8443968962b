"""The gradient of the bias (S4, G1): ds summed in float32 over every dim in which the bias is
broadcast.

A bias without keys takes row sums, which have a closed form. One with keys alone takes column sums,
which `key_gradients_kernel` has at hand. A bias with both has one element per pair:
`bias_gradient_kernel` owns a tile of it and visits the batch elements and heads that share it.
"""

from __future__ import annotations

from enum import Enum

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem, Form
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments, preparation, tuning
from .arguments import Bounds, Place, RowTerms, Terms
from .primitives import (
    load_alpha,
    load_bias,
    load_delta,
    load_tile,
    scores,
    unpruned,
    visible,
)
from .sizes import ceil_div
from .tiles import block_classes, classify


class Kind(Enum):
    """Which sums of ds the gradient of the bias is made of."""

    NONE = "none"
    KEYS = "keys"
    ROWS = "rows"
    PAIRS = "pairs"


def kind(problem: AttentionProblem) -> Kind:
    """The kind of the bias gradient that the problem asks for."""
    if not problem.needs("bias"):
        return Kind.NONE
    _, _, rows, keys = problem.bias
    if keys == 1:
        return Kind.ROWS
    return Kind.KEYS if rows == 1 else Kind.PAIRS


def reduce(problem: AttentionProblem, sums: Tensor) -> Tensor:
    """Sum `[B, Hq, {Sq,1}, {Sk,1}]` over heads that share a bias head and over the dims of size 1
    in the bias.
    """
    batch, heads, rows, keys = problem.bias
    if heads < problem.heads_q:
        sums = sums.unflatten(1, (heads, problem.heads_q // heads)).sum(2)
    shared = [dim for dim, size in ((0, batch), (2, rows), (3, keys)) if size == 1]
    return sums.sum(shared, keepdim=True)


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_q", "group", "bias_heads", "shared_batches"])
def bias_gradient_kernel(
    q,
    k,
    v,
    do,
    dbias,
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
    heads_q,
    group,
    bias_heads,
    shared_batches,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile of a `[{B,1}, {Hq,Hkv,1}, Sq, Sk]` gradient.

    Grid key tiles * query tiles * bias heads * bias batches, key tiles fastest.
    """
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    tiles_q = tl.cdiv(bounds.seqlen_q, BLOCK_M)
    tiles_k = tl.cdiv(bounds.seqlen_k, BLOCK_N)
    tile_k = tl.program_id(0) % tiles_k
    tile_q = tl.program_id(0) // tiles_k % tiles_q
    plane_of_bias = tl.program_id(0) // (tiles_k * tiles_q)
    bias_h = plane_of_bias % bias_heads
    bias_b = plane_of_bias // bias_heads
    start_q = tile_q * BLOCK_M
    start_k = tile_k * BLOCK_N
    i = start_q + tl.arange(0, BLOCK_M)
    j = start_k + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for shared in range(shared_batches * bias.heads_per_head):
        b = bias_b + shared // bias.heads_per_head
        h = bias_h * bias.heads_per_head + shared % bias.heads_per_head
        place = Place(b, 0, 0, 0, 0, 0)
        some, _whole = classify(
            tile_q, tile_k, place, h, bounds, mask, ranges, BLOCK_M, BLOCK_N, SUB
        )
        if blocks is not None:
            any_, _every = block_classes(tile_q, tile_k, place, h, bounds, blocks, BLOCK_M, BLOCK_N)
            some = some & any_
        if some:
            n = h // group
            end_q = bounds.seqlen_q
            end_k = bounds.seqlen_k
            q_tile = load_tile(q, b, h, start_q, end_q, BLOCK_M, D, BLOCK_D, True, False)
            do_tile = load_tile(do, b, h, start_q, end_q, BLOCK_M, DV, BLOCK_DV, True, False)
            k_tile = load_tile(k, b, n, start_k, end_k, BLOCK_N, D, BLOCK_D, True, False)
            v_tile = load_tile(v, b, n, start_k, end_k, BLOCK_N, DV, BLOCK_DV, True, False)
            row = (tl.cast(b, tl.int64) * heads_q + h) * rows.padded + i
            alpha = None
            delta = None
            if gates is not None:
                alpha = load_alpha(gates, place, h, i)[:, None]
                delta = load_delta(gates, place, h, j)[None, :]
            bias_tile = load_bias(bias, place, h, i[:, None], j[None, :], bounds)
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC)
            s, _, gated, _ = scores(x, score, gates, alpha, delta, bias_tile)
            s = s - tl.load(rows.shift + row)[:, None]
            p = tl.exp(s) if score.natural else tl.exp2(s)
            keep = visible(
                place, h, start_q, start_k, bounds, mask, blocks, ranges, BLOCK_M, BLOCK_N, False
            )
            if gates is not None:
                keep = unpruned(keep, gated, gates, place, h, i[:, None])
            p = tl.where(keep, p, 0.0)  # N2
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC)
            acc += p * (dp - tl.load(rows.delta + row)[:, None])
    at = (tl.cast(plane_of_bias, tl.int64) * bounds.seqlen_q + i[:, None]) * bounds.seqlen_k + j[
        None, :
    ]
    tl.store(dbias + at, acc, mask=(i < bounds.seqlen_q)[:, None] & (j < bounds.seqlen_k)[None, :])


def bias_gradient(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    terms: Terms,
    rows: RowTerms,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
) -> Tensor:
    """The gradient of a bias that is not of one key each, float32 in the bias's own shape."""
    if kind(problem) == Kind.ROWS:
        return _row_sums(problem, rows, lse, dlse)
    if terms.ranges is None:  # the kernel looks up which tiles are empty
        ranges, _live = preparation.key_ranges(problem, tensors, None, terms.block)
        terms = terms._replace(ranges=ranges)
    batch, heads, _, _ = problem.bias
    dbias = rows.delta.new_empty(problem.bias)
    tile = tuning.tile("bias_gradient", problem)
    tiles = ceil_div(problem.seqlen_q, tile.block_m) * ceil_div(problem.seqlen_k, tile.block_n)
    bias_gradient_kernel[(tiles * heads * batch,)](
        *arguments.sources(problem, tensors, do, tile),
        dbias,
        rows,
        *terms.flat(),
        problem.heads_q,
        problem.group,
        heads,
        problem.batch // batch if batch else 0,
        D=problem.head_dim,
        BLOCK_D=arguments.block_width(problem.head_dim),
        DV=problem.head_dim_v,
        BLOCK_DV=arguments.block_width(problem.head_dim_v),
        SUB=terms.block,
        PRECISION=arguments.precision(problem),
        ACC=arguments.accumulator(problem),
        **tile.options(),
    )
    return dbias


def _row_sums(
    problem: AttentionProblem, rows: RowTerms, lse: Tensor, dlse: Tensor | None
) -> Tensor:
    """sum_j ds_ij = sum_j P_ij dP_ij - Delta_i sum_j P_ij = <do_i, o_i> - Delta_i = dlse_i, and 0
    in an empty row (O2).
    """
    sums = torch.zeros_like(lse) if dlse is None else torch.where(lse == -torch.inf, 0.0, dlse)
    # A NaN of the row is one of its gradients, too.
    if problem.form == Form.PACKED:  # where the bias has one row
        sums = (sums.sum(-1) + 0.0 * rows.delta.sum(-1))[..., None]
    else:
        sums = sums + 0.0 * rows.delta[..., : problem.seqlen_q]
    return reduce(problem, sums.unsqueeze(3))
