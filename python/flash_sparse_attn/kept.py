"""The set kept under T1, from the bits of the operators to the `BlockMap` that users get."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import BlockMap
from .packed_mask import unpack_bits
from .problem import KEPT_BLOCK, AttentionOptions, Form
from .tensors import AttentionTensors


def kept_blocks(kept: Tensor, tensors: AttentionTensors, options: AttentionOptions) -> BlockMap:
    """The blocks of `KEPT_BLOCK` rows and keys that were kept (T1).

    Args:
        kept: int32 of `AttentionProblem.kept_shape`.
        tensors, options: of the call.

    Returns:
        A map `[B, Hq, ceil(Sq / 16), ceil(Sk / 32)]`; packed, B counts sequences, Sq and Sk are the
        maximal lengths, and blocks are counted inside each sequence. Without a threshold all true.
    """
    rows, keys = KEPT_BLOCK
    q = tensors.q
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[-3], tensors.k.shape[-3]
    if options.form == Form.PACKED:
        batch = tensors.cu_seqlens_q.shape[0] - 1
        seqlen_q, seqlen_k = options.max_seqlen_q, options.max_seqlen_k
    elif tensors.page_table is not None:
        seqlen_k *= tensors.page_table.shape[1]
    row_blocks, key_blocks = -(-seqlen_q // rows), -(-seqlen_k // keys)
    if options.softmax_threshold == 0:
        shape = (batch, q.shape[-2], row_blocks, key_blocks)
        return BlockMap(torch.ones(shape, dtype=torch.bool, device=q.device), KEPT_BLOCK)
    if options.form == Form.PACKED:
        first = tensors.cu_seqlens_q[:-1] // rows + torch.arange(batch, device=q.device)
        own = first[:, None] + torch.arange(row_blocks, device=q.device)
        # Past the end of a sequence stands another's, and past the last nothing.
        kept = kept[0][:, own.clamp(max=kept.shape[2] - 1).long()].transpose(0, 1)
    return BlockMap(unpack_bits(kept, key_blocks), KEPT_BLOCK)
