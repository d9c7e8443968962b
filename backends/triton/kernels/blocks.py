"""Block maps (V5) as bits: one for every `KEPT_BLOCK` of rows and keys, in which form what is kept
under T1 is stored too.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from flash_sparse_attn.packed_mask import with_dense_mask
from flash_sparse_attn.problem import KEPT_BLOCK, AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import arguments
from .arguments import Blocks, broadcast_strides
from .primitives import KEPT_KEYS, KEPT_ROWS
from .sizes import ceil_div

WORDS = 8
"""Words that one program makes."""


@triton.jit(do_not_specialize=["heads", "n_rows", "n_words", "rows", "keys"])
def block_words_kernel(
    block_map,
    batch,
    head,
    row,
    column,
    words,
    heads,
    n_rows,
    n_words,
    rows,
    keys,
    seqlen_q,
    seqlen_k,
    WORDS: tl.constexpr,
):
    """WORDS words of one row of bits, from a map of blocks of `rows` and `keys`; grid batch * heads
    * n_rows * chunks. Bits of what does not exist are 0.
    """
    chunks = tl.cdiv(n_words, WORDS)
    chunk = tl.program_id(0) % chunks
    nth_row = tl.program_id(0) // chunks % n_rows
    plane = tl.program_id(0) // (chunks * n_rows)
    word = chunk * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    i = nth_row * KEPT_ROWS
    j = (word[:, None] * 32 + bit[None, :]) * KEPT_KEYS
    base = (
        block_map
        + tl.cast(plane // heads, tl.int64) * batch
        + tl.cast(plane % heads, tl.int64) * head
        + tl.cast(i // rows, tl.int64) * row
    )
    exists = (i < seqlen_q) & (j < seqlen_k)
    active = tl.load(base + (j // keys).to(tl.int64) * column, mask=exists, other=0)
    value = tl.sum((active != 0).to(tl.int32) << bit[None, :], 1)
    target = (tl.cast(plane, tl.int64) * n_rows + nth_row) * n_words + word
    tl.store(words + target, value, mask=word < n_words)


def fit(problem: AttentionProblem) -> bool:
    """Whether the blocks of the map are made of whole `KEPT_BLOCK`s."""
    rows, keys = KEPT_BLOCK
    return problem.block_size_q % rows == 0 and problem.block_size_k % keys == 0


def from_map(problem: AttentionProblem, block_map: torch.Tensor) -> Blocks:
    """V5 of a map whose blocks `fit`."""
    batch, heads = block_map.shape[:2]
    n_rows = arguments.padded(problem.seqlen_q) // KEPT_BLOCK[0]
    n_words = ceil_div(problem.seqlen_k, 32 * KEPT_BLOCK[1])
    words = block_map.new_empty((batch, heads, n_rows, n_words), dtype=torch.int32)
    block_words_kernel[(batch * heads * n_rows * ceil_div(n_words, WORDS),)](
        block_map.view(torch.int8),
        *block_map.stride(),
        words,
        heads,
        n_rows,
        n_words,
        problem.block_size_q,
        problem.block_size_k,
        problem.seqlen_q,
        problem.seqlen_k,
        WORDS=WORDS,
    )
    return Blocks(words, *broadcast_strides(words)[:2], n_words, problem.heads_q // heads)


def as_mask(
    problem: AttentionProblem, tensors: AttentionTensors
) -> tuple[AttentionProblem, AttentionTensors]:
    """The call with a map that does not fit as a dense mask (V3), which it then costs."""
    problem, tensors = with_dense_mask(problem, tensors)
    i = torch.arange(problem.seqlen_q, device=tensors.q.device) // problem.block_size_q
    j = torch.arange(problem.seqlen_k, device=tensors.q.device) // problem.block_size_k
    mask = tensors.block_map[:, :, i[:, None], j]
    if tensors.mask is not None:
        given = tensors.mask
        heads = max(mask.shape[1], given.shape[1])
        mask, given = (
            x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)
            for x in (mask, given)
        )
        mask = mask & given
    problem = replace(
        problem, mask=tuple(mask.shape), block_map=None, block_size_q=0, block_size_k=0
    )
    return problem, replace(tensors, mask=mask, block_map=None)


def of_kept(kept: torch.Tensor) -> Blocks:
    """T1: the set kept, as the forward writes and the backward reads it."""
    return Blocks(kept, *broadcast_strides(kept)[:2], kept.shape[3], 1)
