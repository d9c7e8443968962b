"""The yardstick of N1: attention as a PyTorch user would write it, in the dtype of the inputs.

Matrix products in that dtype with float32 accumulation, softmax in float32, gradients by autograd.
Apart from the reference in every line: dense pairs, einsum, one axis for packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from flash_sparse_attn.spec.schema import Case
from torch import Tensor

from . import pairs
from .inputs import Inputs
from .leaves import Leaves

Results = dict[str, Tensor]


def run(case: Case, inputs: Inputs, dtype: torch.dtype | None = None) -> Results:
    """o, lse and the gradients of a case.

    Args:
        case: the case.
        inputs: its inputs.
        dtype: dtype of the computation, default that of the inputs.
    """
    leaves = Leaves(case, inputs, dtype, inputs.clean)
    with _float32_accumulation():
        o, lse = attention(case, leaves.tensors, inputs.visible)
        if case.packed:
            o, lse = o.squeeze(0), lse.squeeze(0)
        return leaves.results(o, lse)


def attention(case: Case, tensors: dict[str, Tensor], visible: Tensor) -> tuple[Tensor, Tensor]:
    """o `[B, Sq, Hq, Dv]` and lse `[B, Hq, Sq]`; B = 1 for packed sequences."""
    v = pairs.with_batch(case, tensors["v"]).repeat_interleave(_group(case), 2)
    s = scores(case, tensors, visible)
    empty = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0).to(torch.promote_types(v.dtype, torch.float32))
    p = s.softmax(-1).masked_fill(empty | ~visible, 0)
    lse = s.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", p.to(v.dtype), v), lse


def scores(case: Case, tensors: dict[str, Tensor], visible: Tensor) -> Tensor:
    """S1 to S4 `[B, Hq, Sq, Sk]`, −∞ where not visible."""
    options = case.options
    q, k = (pairs.with_batch(case, tensors[name]) for name in "qk")
    scale = options.softmax_scale
    scale = case.sizes.head_dim**-0.5 if scale is None else scale
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(_group(case), 2)) * scale
    if options.softcap:
        s = options.softcap * torch.tanh(s / options.softcap)
    if case.gates:
        alpha, delta = (pairs.with_batch(case, tensors[x]) for x in ("gate_q", "gate_k"))
        s = s + scale * pairs.gate_values(case, alpha, delta)
    if case.bias:
        s = s + pairs.heads(tensors["bias"], case).masked_fill(~visible, 0)
    return s.masked_fill(~visible, -math.inf)


def _group(case: Case) -> int:
    return case.sizes.heads_q // case.sizes.heads_kv


@contextmanager
def _float32_accumulation() -> Iterator[None]:
    """No TensorFloat-32 and no sums in half precision."""
    matmul = torch.backends.cuda.matmul
    names = (
        "allow_tf32",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
    )
    before = {name: getattr(matmul, name) for name in names}
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
