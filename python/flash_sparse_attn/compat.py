"""Names of the predecessor `flash_dmattn`, mapped onto the public API.

    - from flash_dmattn import flash_dmattn_func_auto
    + from flash_sparse_attn.compat import flash_dmattn_func_auto

Here the scale is called `scale`, masks may be numbers, and mask and bias may leave out the row dim.
All else is the API's: one causal alignment (V1), one meaning of every term, in every backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .api import flash_sparse_attn_func
from .dispatch import require_available
from .registry import get_available_backends
from .validation import message, require_tensor

__all__ = ["flash_dmattn_func", "flash_dmattn_func_auto", "get_available_backends"]


def flash_dmattn_func_auto(backend: str | None = None) -> Callable[..., Tensor]:
    """`flash_dmattn_func` with the backend settled; hold the result and call it.

    Args:
        backend: as in `flash_sparse_attn_func_auto`. The predecessor's "flex" is not among them.

    Raises:
        ValueError, ImportError: as `flash_sparse_attn_func_auto` (E9).
    """
    if backend is not None:
        require_available(backend)
    return functools.partial(flash_dmattn_func, backend=backend)


def flash_dmattn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sparse attention under the predecessor's argument names, in the order of its CUDA function.

    Args:
        query: `[B, Sq, Hq, D]`.
        key: `[B, Sk, Hkv, D]`.
        value: `[B, Sk, Hkv, D]`.
        attn_mask: `[{B,1}, {Hq,Hkv,1}, {Sq,1}, {Sk,1}]`, or the same for every row,
            `[{B,1}, {Hq,Hkv,1}, {Sk,1}]`. Bool, True = attend (V3), or numbers, *nonzero* = attend.
            An additive mask (0 = attend, -inf = not) would be read the wrong way round: it is an
            `attn_bias`.
        attn_bias: same shapes, dtype of query or float32 (S4); differentiable.
        scale: c of S1; None = D ** -0.5.
        is_causal: V1; None = False.
        softcap: t of S2; None = 0, no cap.
        deterministic: G2; None = True, the predecessor's default.
        return_attn_probs: None or False.
        softmax_scale: the later name of `scale`; one of the two at most.
        backend: as in `flash_sparse_attn_func`.

    Returns:
        o `[B, Sq, Hq, D]` in the dtype of query, 0 in rows that see nothing (O2).

    Raises:
        ValueError: both `scale` and `softmax_scale` are given (E8).
        NotImplementedError: `return_attn_probs`: the Sq x Sk probabilities are never formed (E9).
        TypeError, ValueError, NotImplementedError, ImportError: as in `flash_sparse_attn_func`.
    """
    if return_attn_probs:
        raise NotImplementedError(
            "return_attn_probs: the Sq x Sk probabilities are never formed; "
            "flash_sparse_attn_func has return_lse [rule E9]"
        )
    if scale is not None and softmax_scale is not None:
        both = f"{scale} and {softmax_scale}"
        raise ValueError(message("E8", "scale and softmax_scale", both, "one of them"))
    return flash_sparse_attn_func(
        query,
        key,
        value,
        attn_mask=_nonzero(_four_dims("attn_mask", attn_mask)),
        attn_bias=_four_dims("attn_bias", attn_bias),
        softmax_scale=softmax_scale if scale is None else scale,
        is_causal=False if is_causal is None else is_causal,
        softcap=0.0 if softcap is None else softcap,
        deterministic=True if deterministic is None else deterministic,
        backend=backend,
    )


def _four_dims(name: str, term: Tensor | None) -> Tensor | None:
    """A term for every row alike, `[B, H, Sk]`, as `[B, H, 1, Sk]`."""
    require_tensor(name, term, optional=True)
    return term[:, :, None, :] if term is not None and term.dim() == 3 else term


def _nonzero(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype == torch.bool else mask != 0
