"""Backward: G1 from recomputed scores, without atomics, so that every gradient is bitwise
repeatable (G2).

Three passes, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 2) with the loop over
keys and the loop over queries in kernels of their own: `row_terms` computes what the others need
of each row, `key_gradients` owns a key tile and visits the query tiles of all heads of its group,
`query_gradients` owns a query tile and visits key tiles. Scores are those of the forward, in its
base. In float64 a pass of the forward comes first: lse, rounded, no longer knows P exactly enough
(N1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors

from . import bias_gradient, preparation
from .arguments import batched
from .forward import peaks
from .key_gradients import key_gradients
from .query_gradients import query_gradients
from .row_terms import row_terms


def backward(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    o: Tensor,
    lse: Tensor,
    kept: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
) -> dict[str, Tensor]:
    """The gradients named in `problem.grads`: of q, k and v in their dtype, of bias and gates in
    that of lse; all in their own shapes.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.present()}
    problem, tensors, terms, slots = preparation.prepare(problem, tensors, "backward", kept)
    do, row_lse, row_dlse = batched(do), lse, dlse
    if problem.dtype == torch.float64:
        row_lse, total = peaks(problem, tensors, terms, slots)
        # All gradients are linear in do and dlse: 1 / total is theirs instead of P's.
        do = do / total.transpose(1, 2).unsqueeze(3)
        row_dlse = None if dlse is None else dlse / total
    rows = row_terms(problem, terms.sequences, batched(o), row_lse, do, row_dlse)
    gradients = {}
    sums = bias_gradient.kind(problem) == bias_gradient.Kind.KEYS
    if problem.needs("k", "v", "gate_k") or sums:
        gradients |= key_gradients(problem, tensors, terms, slots, rows, do)
    if problem.needs("q", "gate_q"):
        gradients |= query_gradients(problem, tensors, terms, slots, rows, do)
    if problem.needs("bias") and not sums:
        gradients["bias"] = bias_gradient.bias_gradient(
            problem, tensors, terms, rows, lse, do, dlse
        )
    return {name: gradients[name].view(shapes[name]) for name in problem.grads}
