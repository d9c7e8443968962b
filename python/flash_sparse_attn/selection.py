"""The operator `flash_sparse_attn::topk_intervals`: the choice of keys M5, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, registry

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels of backends rank: scores that float32 holds exactly."""

_library = torch.library.Library("flash_sparse_attn", "FRAGMENT")
_library.define(
    "topk_intervals(Tensor scores, SymInt seqlen_q, SymInt window_size, bool causal, "
    "Tensor? key_padding_mask, Tensor? cu_seqlens=None) -> (Tensor start, Tensor end)"
)


def topk_intervals(
    scores: Tensor,
    seqlen_q: int,
    window_size: int,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows at which each key is among the w best (M5).

    CUDA tensors of `KERNEL_DTYPES` go to the first available backend that has a kernel for it, all
    others (float64 too) to the operations of the reference; the results are the same integers.

    Args:
        scores: floating `[{B,1}, {Hkv,1}, Sk]`, any strides; of packed sequences,
            `[1, {Hkv,1}, Tk]`.
        seqlen_q: Sq; means nothing of packed sequences, which have as many rows as keys.
        window_size: w >= 1.
        causal: row i chooses among the keys j <= p_i; otherwise among all.
        key_padding_mask: bool, broadcastable with `scores`; keys that are False take no part.
        cu_seqlens: int32 `[sequences + 1]`, boundaries of packed sequences (V6), each of which
            chooses by itself; rows are counted inside it.

    Returns:
        (start, end), int32, contiguous, of the broadcast shape; end = start where no row sees the
        key, 0 of tokens in no sequence. Not differentiable.
    """
    return torch.ops.flash_sparse_attn.topk_intervals(
        scores, seqlen_q, window_size, causal, key_padding_mask, cu_seqlens
    )


def _topk_intervals(
    scores: Tensor,
    seqlen_q: int,
    window_size: int,
    causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if scores.is_cuda and scores.dtype in KERNEL_DTYPES:
        implementation = registry.first_with("topk_intervals") or _by_reference
    else:
        implementation = _by_reference
    packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens.contiguous()}
    return implementation(scores, seqlen_q, window_size, causal, key_padding_mask, **packed)


def _topk_intervals_fake(
    scores: Tensor,
    seqlen_q: int,
    window_size: int,
    causal: bool,
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shape = scores.shape
    if key_padding_mask is not None:
        shape = torch.broadcast_shapes(shape, key_padding_mask.shape)
    start, end = (scores.new_empty(shape, dtype=torch.int32) for _ in range(2))
    return start, end


def _by_reference(*arguments: object, **packed: Tensor) -> tuple[Tensor, Tensor]:
    start, end = reference.topk_intervals(*arguments, **packed)
    return start.contiguous(), end.contiguous()


_library.impl("topk_intervals", _topk_intervals, "CompositeExplicitAutograd")
torch.library.register_fake("flash_sparse_attn::topk_intervals", _topk_intervals_fake, lib=_library)
