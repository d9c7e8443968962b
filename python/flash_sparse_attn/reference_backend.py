"""The reference behind the backend contract: any valid call, any device, O(N^2) cost."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
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


def forward(problem: AttentionProblem, tensors: AttentionTensors) -> tuple[Tensor, Tensor]:
    """`(o, lse)` by O1 and O2. T1 lets it keep every block, and it does."""
    return _FORWARD[Form(problem.form)](*_qkv(tensors), **_keywords(problem, tensors))


def backward(
    problem: AttentionProblem,
    tensors: AttentionTensors,
    o: Tensor,
    lse: Tensor,
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
