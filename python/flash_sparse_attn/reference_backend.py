"""The reference behind the backend contract: any valid call, any device, O(N^2) cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .packed_mask import with_dense_mask
from .problem import AttentionProblem, Form
from .tensors import DIFFERENTIABLE, AttentionTensors

_FORWARD = {
    Form.BATCHED: reference.attention,
    Form.PACKED: reference.attention_packed,
    Form.CACHE: reference.attention_cached,
}
_BACKWARD = {
    Form.BATCHED: reference.attention_backward,
    Form.PACKED: reference.attention_packed_backward,
}


def availability() -> list[str]:
    """Nothing ever stands against the reference."""
    return []


def unsupported(problem: AttentionProblem) -> list[str]:
    """The one reason there can be: gradients through a cache, which the rules do not define."""
    if problem.grads and problem.form == Form.CACHE:
        return [f"gradients of {', '.join(problem.grads)} are not defined in the cache form"]
    return []


def forward(
    problem: AttentionProblem, tensors: AttentionTensors
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(o, lse, kept)` by O1 and O2. T1 lets it keep every block, and it does."""
    o, lse = _FORWARD[Form(problem.form)](*_qkv(tensors), **_keywords(problem, tensors))
    every = None
    if problem.softmax_threshold > 0:
        every = tensors.q.new_full(problem.kept_shape, -1, dtype=torch.int32)
    return o, lse, every


def backward(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    o: Tensor,
    lse: Tensor,
    kept: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
) -> dict[str, Tensor]:
    """The gradients named in `problem.grads`, by the closed forms of G1."""
    gradients = _BACKWARD[Form(problem.form)](
        do, dlse, *_qkv(tensors), **_keywords(problem, tensors)
    )
    return {name: gradients[name] for name in problem.grads}


def info() -> dict[str, Any]:
    """What `python -m flash_sparse_attn info` prints."""
    return {"devices": "any", "cost": "O(N^2) time and memory", "gradients": list(DIFFERENTIABLE)}


def _qkv(tensors: AttentionTensors) -> tuple[Tensor, Tensor, Tensor]:
    return tensors.q, tensors.k, tensors.v


def _keywords(problem: AttentionProblem, tensors: AttentionTensors) -> dict[str, Any]:
    problem, tensors = with_dense_mask(problem, tensors)
    keywords: dict[str, Any] = {
        name: tensor for name, tensor in tensors.present() if name not in ("q", "k", "v")
    }
    for name in ("softmax_scale", "softcap", "causal", "window", "sinks", "gate_threshold"):
        keywords[name] = getattr(problem, name)
    if problem.block_map is not None:
        keywords["block_size"] = (problem.block_size_q, problem.block_size_k)
    if problem.gate is not None:
        keywords["gate"] = problem.gate
    return keywords
