"""Forward: o and lse of O1 and O2, one query tile of one head per program.

The online softmax is that of FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 1) in base 2.
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
from .primitives import LN2, LOG2E, hide_if, load_tile, scores, store_rows, visible
from .sizes import ceil_div
from .tiles import key_tiles, nth_of_span, nth_tile


@triton.jit(do_not_specialize=[*Bounds._fields, "heads_q", "group"])
def forward_kernel(
    q,
    k,
    v,
    o,
    lse,
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
    heads_q,
    group,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid query tiles * batch * heads: heads fastest, so that a group shares its keys in cache.

    Last tiles first, as they are the longest under V1.
    """
    bounds = Bounds(seqlen_q, seqlen_k, left, right, left_sinks, right_sinks)
    tiles_q = tl.cdiv(bounds.seqlen_q, BLOCK_M)
    h = tl.program_id(0) % heads_q
    tile_q = tiles_q - 1 - tl.program_id(0) // heads_q % tiles_q
    b = tl.program_id(0) // (heads_q * tiles_q)
    start_q = tile_q * BLOCK_M
    i = start_q + tl.arange(0, BLOCK_M)
    # Scores that are a rising multiple of the raw products are never formed: exp2 scales them.
    RAW: tl.constexpr = score.inner is None and bias is None and score.positive
    unit = score.outer * LOG2E if RAW else LOG2E

    tiles, n_full, n_partial = key_tiles(bounds, lists, b, h, tile_q, BLOCK_M, BLOCK_N)

    q_tile = load_tile(q, b, h, start_q, bounds.seqlen_q, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # A span is short: one loop, which decides in passing whether a tile is full, fills the pipeline
    # once. (Long rows of full tiles are better off without the test.)
    SPAN: tl.constexpr = lists is not None and lists.spans
    for PARTIAL in tl.static_range(1 if SPAN else 2):
        n_tiles = n_partial if PARTIAL else n_full
        if SPAN:
            n_tiles = n_full + n_partial
        for t in range(n_tiles):
            if SPAN:
                tile_k, hides = nth_of_span(tiles, t)
            else:
                tile_k = nth_tile(tiles, lists, t, PARTIAL)
            start_k = tile_k * BLOCK_N
            j = start_k + tl.arange(0, BLOCK_N)
            k_tile = load_tile(
                k, b, h // group, start_k, bounds.seqlen_k, BLOCK_N, D, BLOCK_D, PARTIAL
            )
            if PARTIAL:
                keep = visible(
                    b, h, start_q, start_k, bounds, mask, ranges, BLOCK_M, BLOCK_N, False
                )
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            if not RAW:
                x, _ = scores(x, b, h, i[:, None], j[None, :], score, bias, bounds)
            if PARTIAL:
                x = tl.where(keep, x, float("-inf"))  # N2
            if SPAN:
                x = hide_if(hides, x, b, h, start_q, start_k, bounds, ranges, BLOCK_M, BLOCK_N)
            new_peak = tl.maximum(peak, tl.max(x, 1) * unit)
            shift = new_peak
            if PARTIAL or SPAN or not RAW:  # a row that has seen nothing has no finite maximum
                shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            p = tl.exp2(x * unit - shift[:, None])
            decay = tl.exp2(peak - shift)
            total = total * decay + tl.sum(p, 1)
            acc = acc * decay[:, None]
            v_tile = load_tile(
                v, b, h // group, start_k, bounds.seqlen_k, BLOCK_N, D, BLOCK_D, PARTIAL
            )
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
            peak = new_peak

    empty = total == 0.0
    acc = acc * (1.0 / tl.where(empty, 1.0, total))[:, None]  # one division a row
    store_rows(o, b, h, i, i < bounds.seqlen_q, acc, D, BLOCK_D)
    row = (tl.cast(b, tl.int64) * heads_q + h) * bounds.seqlen_q + i
    tl.store(
        lse + row,
        tl.where(empty, float("-inf"), (peak + tl.log2(total)) * LN2),
        mask=i < bounds.seqlen_q,
    )


def forward(problem: AttentionProblem, tensors: AttentionTensors) -> tuple[Tensor, Tensor]:
    """O1 and O2: o `[B, Sq, Hq, D]` in the dtype of q and lse float32 `[B, Hq, Sq]`, both
    contiguous.
    """
    q = tensors.q
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((problem.batch, problem.heads_q, problem.seqlen_q), dtype=torch.float32)
    width = arguments.block_d(problem)
    tensors, terms, slots = preparation.prepare(problem, tensors, "forward")
    tile = tuning.tile("forward", problem, slots is not None)
    grid = (ceil_div(problem.seqlen_q, tile.block_m) * problem.batch * problem.heads_q,)
    forward_kernel[grid](
        arguments.source(q, tile.block_m, width, tile.tma),
        arguments.source(tensors.k, tile.block_n, width, tile.tma),
        arguments.source(tensors.v, tile.block_n, width, tile.tma),
        arguments.operand(o),
        lse,
        *terms.flat(),
        preparation.list_tiles(problem, terms, slots, tile),
        problem.heads_q,
        problem.group,
        D=problem.head_dim,
        BLOCK_D=width,
        PRECISION=arguments.precision(problem),
        **tile.options(),
    )
    return o, lse
