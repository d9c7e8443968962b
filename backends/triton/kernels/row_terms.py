"""What the backward needs of each row: delta of G1 and what its scores are shifted by."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem

from . import arguments
from .arguments import RowTerms, Sequences
from .primitives import LOG2E, load_tile
from .sequences import place_tile


@triton.jit(do_not_specialize=["seqlen_q", "padded", "heads_q"])
def row_terms_kernel(
    o,
    do,
    lse,
    dlse,
    shift,
    delta,
    seqlen_q,
    padded,
    heads_q,
    sequences,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
):
    """One block of both records; grid row blocks * batch * heads.

    Rows that are empty (O2) or do not exist get a shift of +inf, so that their probabilities come
    out as 0 with no test.
    """
    blocks = padded // BLOCK_M
    head = tl.program_id(0) // blocks
    h = head % heads_q
    nth = tl.program_id(0) % blocks
    if sequences is None:
        nth += head // heads_q * blocks
    place, n_q, _, block, _exists = place_tile(
        seqlen_q, seqlen_q, sequences, nth, blocks, BLOCK_M, False
    )
    start_q = block * BLOCK_M
    i = start_q + tl.arange(0, BLOCK_M)
    exists = i < n_q
    first_row = place.row + start_q
    end_row = place.row + n_q
    source = head.to(tl.int64) * seqlen_q + place.row + i
    row_lse = tl.load(lse + source, mask=exists, other=float("-inf"))
    o_tile = load_tile(
        o, place.batch, h, first_row, end_row, BLOCK_M, DV, BLOCK_DV, True, False
    ).to(ACC)
    do_tile = load_tile(
        do, place.batch, h, first_row, end_row, BLOCK_M, DV, BLOCK_DV, True, False
    ).to(ACC)
    row_delta = tl.sum(o_tile * do_tile, 1)
    if dlse is not None:
        row_delta -= tl.load(dlse + source, mask=exists, other=0.0)
    empty = row_lse == float("-inf")
    # A row that is NaN is so by its probabilities, and that where they are visible alone (N2).
    known = ~empty & (row_lse == row_lse)
    target = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Of float64 it is a peak, which is in the base of scores.
    row_shift = row_lse if row_lse.dtype == tl.float64 else row_lse * LOG2E
    tl.store(shift + target, tl.where(empty, float("inf"), row_shift))
    tl.store(delta + target, tl.where(known, row_delta, 0.0))


@triton.jit
def row_of_record(head, rows):
    """Where a head's row terms start; the hint lets a tile of them be copied in wide pieces."""
    return tl.multiple_of(head * rows.padded, 16)


def row_terms(
    problem: AttentionProblem,
    sequences: Sequences | None,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor | None,
) -> RowTerms:
    """shift and delta as records `[B, Hq, padded]`, of o and do `[B, Sq, Hq, Dv]`; in float64, lse
    being the peak of `forward.peaks`, do and dlse divided by its total.
    """
    padded = arguments.record_length(problem, problem.seqlen_q)
    heads = arguments.records(problem) * problem.heads_q
    shape = (arguments.records(problem), problem.heads_q, padded)
    shift, delta = (lse.new_empty(shape) for _ in range(2))
    row_terms_kernel[(padded // arguments.RECORD_BLOCK * heads,)](
        arguments.operand(o),
        arguments.operand(do),
        lse.contiguous(),
        None if dlse is None else dlse.contiguous(),
        shift,
        delta,
        problem.seqlen_q,
        padded,
        problem.heads_q,
        sequences,
        DV=problem.head_dim_v,
        BLOCK_DV=arguments.block_width(problem.head_dim_v),
        BLOCK_M=arguments.RECORD_BLOCK,
        ACC=arguments.accumulator(problem),
    )
    return RowTerms(shift, delta, padded)
