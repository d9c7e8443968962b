"""Score rules S1 to S4, each on [B, Hq, Sq, Sk].

N2: a pair that is not visible never enters a function with a derivative, where NaN would come back
as a gradient 0 * NaN: the operands of S2 and S3 are 0 there. The sum after them needs no such care.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import heads_first, to_query_heads
from .terms import Terms


def dot(q: Tensor, k: Tensor, scale: float, visible: Tensor) -> Tensor:
    """S1: c <q_i, k_j>, from q [B, Hq, Sq, D] and k [B, Hq, Sk, D]."""
    return torch.where(visible, scale * (q @ k.transpose(2, 3)), 0)


def softcap(s: Tensor, cap: float) -> Tensor:
    """S2: t tanh(s / t) for t > 0."""
    return cap * torch.tanh(s / cap) if cap > 0 else s


def gate_operands(terms: Terms, visible: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S3: alpha_i and delta_j, both [B, Hq, Sq, Sk]."""
    alpha = heads_first(terms.gate_q, dtype).unsqueeze(3)
    delta = to_query_heads(heads_first(terms.gate_k, dtype), visible.shape[1]).unsqueeze(2)
    return torch.where(visible, alpha, 0), torch.where(visible, delta, 0)


def gate_value(x: Tensor, gate: str) -> Tensor:
    """S3: g."""
    return F.logsigmoid(x) if gate == "logsigmoid" else x


def gate_derivative(x: Tensor, gate: str) -> Tensor:
    """S3: g'."""
    return torch.sigmoid(-x) if gate == "logsigmoid" else torch.ones_like(x)


def gate_term(terms: Terms, scale: float, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """S3: c g(alpha_i delta_j)."""
    alpha, delta = gate_operands(terms, visible, dtype)
    return scale * gate_value(alpha * delta, terms.gate)


def bias_term(bias: Tensor, heads_q: int, dtype: torch.dtype) -> Tensor:
    """S4: b_ij, never scaled."""
    return to_query_heads(bias.to(dtype), heads_q)


def score(q: Tensor, k: Tensor, terms: Terms, visible: Tensor) -> Tensor:
    """S1 to S4 in order; what stands where a pair is not visible means nothing."""
    scale = terms.scale(q.shape[3])
    s = softcap(dot(q, k, scale, visible), terms.softcap)
    if terms.gate_q is not None:
        s = s + gate_term(terms, scale, visible, s.dtype)
    if terms.bias is not None:
        s = s + bias_term(terms.bias, q.shape[1], s.dtype)
    return s
