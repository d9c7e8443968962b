"""Rule G1 in closed form: the gradients that autograd finds for `attention`.

With r the score after S1 and x_ij = alpha_i delta_j:

    dP_ij = <do_i, v_j>
    ds_ij = P_ij (dP_ij - sum_j' P_ij' dP_ij' + dlse_i)
    dr_ij = ds_ij (1 - tanh(r_ij / t)^2)                        without a softcap dr = ds
    dq_i = c sum_j dr_ij k_j        dk_j = c sum_i dr_ij q_i        dv_j = sum_i P_ij do_i
    db = ds, summed over the dimensions in which b is broadcast
    dx_ij = c ds_ij g'(x_ij)
    dalpha_i = sum_j dx_ij delta_j  ddelta_j = sum_i dx_ij alpha_i

Sums over i that end at a kv head also run over the G query heads of its group. The first inner sum
equals <do_i, o_i>; written as here it does not depend on the rounding of o.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .forward import read, softmax
from .layout import from_query_heads, heads_first, reduce_to
from .score import dot, gate_derivative, gate_operands, score
from .terms import Terms
from .visibility import visible_pairs


def score_gradient(p: Tensor, dp: Tensor, dlse: Tensor | None) -> Tensor:
    """G1: ds from P, dP and dlse [B, Hq, Sq]."""
    ds = dp - (p * dp).sum(3, keepdim=True)
    if dlse is not None:
        ds = ds + dlse.unsqueeze(3)
    return p * ds


def softcap_gradient(ds: Tensor, r: Tensor, cap: float) -> Tensor:
    """G1: dr, the gradient of the score after S1."""
    return ds * (1 - torch.tanh(r / cap) ** 2) if cap > 0 else ds


def gate_gradients(ds: Tensor, terms: Terms, scale: float, visible: Tensor) -> dict[str, Tensor]:
    """G1: dalpha [B, Sq, Hq] and ddelta [B, Sk, Hkv]."""
    alpha, delta = gate_operands(terms, visible, ds.dtype)
    dx = scale * ds * gate_derivative(alpha * delta, terms.gate)
    dalpha = (dx * delta).sum(3)
    ddelta = from_query_heads((dx * alpha).sum(2), terms.gate_k.shape[2])
    return {"gate_q": dalpha.transpose(1, 2), "gate_k": ddelta.transpose(1, 2)}


def arguments(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> dict[str, Tensor]:
    """The differentiable arguments that are given, by name."""
    every = {"q": q, "k": k, "v": v}
    every |= {"bias": terms.bias, "gate_q": terms.gate_q, "gate_k": terms.gate_k}
    return {name: x for name, x in every.items() if x is not None}


@torch.no_grad()
def gradients(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, terms: Terms
) -> dict[str, Tensor]:
    """`attention_backward`, not yet rounded to the dtypes of the arguments."""
    with torch.autocast(q.device.type, enabled=False):
        visible = visible_pairs(q, k, terms)
        qh, kh, vh = read(q, k, v, visible)
        scale = terms.scale(q.shape[3])
        p, lse = softmax(score(qh, kh, terms, visible), visible)

        empty = lse == -math.inf  # O2
        if do is None:
            do = vh.new_zeros(*qh.shape[:3], vh.shape[3])
        else:
            do = torch.where(empty.unsqueeze(3), 0, heads_first(do, p.dtype))
        if dlse is not None:
            dlse = torch.where(empty, 0, dlse.to(p.dtype))

        ds = torch.where(visible, score_gradient(p, do @ vh.transpose(2, 3), dlse), 0)
        dr = softcap_gradient(ds, dot(qh, kh, scale, visible), terms.softcap)

        heads_kv = k.shape[2]
        grads = {
            "q": scale * (dr @ kh),
            "k": from_query_heads(scale * (dr.transpose(2, 3) @ qh), heads_kv),
            "v": from_query_heads(p.transpose(2, 3) @ do, heads_kv),
        }
        grads = {name: grad.transpose(1, 2) for name, grad in grads.items()}
        if terms.bias is not None:
            grads["bias"] = reduce_to(ds, terms.bias.shape)
        if terms.gate_q is not None:
            grads |= gate_gradients(ds, terms, scale, visible)
    return grads


def rounded(grads: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each gradient in the dtype of its argument, contiguous."""
    return {name: grad.to(given[name].dtype).contiguous() for name, grad in grads.items()}


def attention_backward(
    do: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, **terms: Any
) -> dict[str, Tensor]:
    """Gradients of `attention` for the output gradients `do` and `dlse`, in closed form (G1).

    Args:
        do: [B, Sq, Hq, Dv], or None for 0.
        dlse: [B, Hq, Sq], or None for 0.
        q, k, v, **terms: as for `attention`.

    Returns:
        "q", "k", "v", and "bias", "gate_q", "gate_k" where given, each in its argument's shape and
        dtype, summed in the dtype of the computation and rounded once. An empty row adds 0 to every
        gradient, whatever `do` and `dlse` hold there (O2).

    Raises:
        TypeError, ValueError: as `attention`.
    """
    terms = Terms(**terms)
    return rounded(gradients(do, dlse, q, k, v, terms), arguments(q, k, v, terms))
