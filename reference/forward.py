"""Output rules O1 and O2, and the operator itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import compute_dtype, heads_first, to_query_heads
from .score import score
from .terms import Terms
from .visibility import visible_pairs


def read(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, Hq, Sq, D], k [B, Hq, Sk, D], v [B, Hq, Sk, Dv] in the dtype of the computation.

    N2: rows that see no key and keys that no row sees become 0, so that whatever they hold, NaN
    included, never meets a matrix product.
    """
    dtype = compute_dtype(q.dtype)
    heads_q = q.shape[2]
    rows = visible.any(3).unsqueeze(3)
    keys = visible.any(2).unsqueeze(3)
    q = torch.where(rows, heads_first(q, dtype), 0)
    k = torch.where(keys, to_query_heads(heads_first(k, dtype), heads_q), 0)
    v = torch.where(keys, to_query_heads(heads_first(v, dtype), heads_q), 0)
    return q, k, v


def softmax(s: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """O1, O2: P [B, Hq, Sq, Sk] over the visible keys and lse [B, Hq, Sq], natural logarithm.

    A row is empty when its sum is 0: no visible key, or every visible score -inf. Then P is 0 and
    lse is -inf, and neither has a gradient.
    """
    masked = torch.where(visible, s, -math.inf).detach()
    # The padding column lets the maximum exist when Sk is 0.
    largest = F.pad(masked, (0, 1), value=-math.inf).amax(3, keepdim=True)
    largest = torch.where(largest == -math.inf, 0, largest)
    e = torch.where(visible, s - largest, -math.inf).exp()
    total = e.sum(3, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    # A row that is NaN is 0 at the keys it does not see, and so is its part in their gradients.
    p = torch.where(visible, e / total, 0)
    lse = torch.where(empty, -math.inf, largest + total.log()).squeeze(3)
    return p, lse


def output(p: Tensor, lse: Tensor, v: Tensor) -> Tensor:
    """O1, O2: sum_j P_ij v_j [B, Hq, Sq, Dv]; 0 in an empty row, which passes no gradient on."""
    return torch.where((lse == -math.inf).unsqueeze(3), 0, p @ v)


def attend(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """`attention` with its terms already in one object."""
    with torch.autocast(q.device.type, enabled=False):
        visible = visible_pairs(q, k, terms)
        qh, kh, vh = read(q, k, v, visible)
        p, lse = softmax(score(qh, kh, terms, visible), visible)
        o = output(p, lse, vh)
    return o.transpose(1, 2).contiguous().to(q.dtype), lse


def attention(q: Tensor, k: Tensor, v: Tensor, **terms: Any) -> tuple[Tensor, Tensor]:
    """The operator: S1 to S4, V1 to V5, V7, O1, O2. Its autograd is G1.

    Args:
        q: [B, Sq, Hq, D], float64, float32, float16 or bfloat16, any strides, any device.
        k: [B, Sk, Hkv, D], Hq a multiple of Hkv.
        v: [B, Sk, Hkv, Dv].
        **terms: the attributes of `Terms`.

    Returns:
        o [B, Sq, Hq, Dv] in the dtype of q, contiguous, and lse [B, Hq, Sq], natural logarithm,
        float32 (float64 for float64 arguments). Below float32 everything is computed in float32,
        and o and each gradient are rounded once, at the end. Differentiable in q, k, v, bias,
        gate_q and gate_k, through o and lse.

    Raises:
        TypeError: a term of another name.
        ValueError: see `Terms`.
    """
    return attend(q, k, v, Terms(**terms))
