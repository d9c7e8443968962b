"""The operators `flash_sparse_attn::forward` and `::backward`, which carry every call.

Their schemas are derived from the fields of `AttentionTensors` and `AttentionOptions`. Calls are
validated inside the operators, and inside their fakes, so eager calls, `torch.compile` and
`torch.export` meet the same checks before anything is launched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .problem import OPTION_NAMES, AttentionOptions, AttentionProblem, Form
from .tensors import DIFFERENTIABLE, TENSOR_NAMES, AttentionTensors, Layout
from .validation import describe, message

_SCHEMA_TYPES = {
    "str": "str",
    "str | None": "str?",
    "float": "float",
    "bool": "bool",
    "int": "SymInt",
    "int | None": "SymInt?",
}
_TENSORS = ", ".join(f"Tensor{'' if name in 'qkv' else '?'} {name}" for name in TENSOR_NAMES)
_OPTIONS = ", ".join(
    f"{_SCHEMA_TYPES[field.type]} {field.name}" for field in fields(AttentionOptions)
)
_TENSORS_END = len(TENSOR_NAMES)
_OPTIONS_END = _TENSORS_END + len(OPTION_NAMES)

_library = torch.library.Library("flash_sparse_attn", "DEF")
_library.define(
    f"forward({_TENSORS}, {_OPTIONS}, str? backend, str grads) -> "
    "(Tensor o, Tensor lse, Tensor kept)"
)
_library.define(
    f"backward(Tensor do, Tensor? dlse, Tensor o, Tensor lse, Tensor kept, {_TENSORS}, {_OPTIONS}, "
    "str? backend, str grads) -> Tensor[]"
)


def attention(
    tensors: AttentionTensors, options: AttentionOptions, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one call: `(o, lse, kept)`, differentiable in o and lse.

    kept is the set of blocks kept under T1, as bits (`AttentionProblem.kept_shape`); without a
    threshold, empty.

    Args:
        tensors: the tensor arguments.
        options: the scalar arguments.
        backend: name of a backend, or None for the first that serves the call.

    Raises:
        TypeError, ValueError: the call breaks an E rule.
        NotImplementedError, ImportError: E9.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(message("E1", "backend", repr(backend), "a name or None"))
    given = [getattr(tensors, name) for name in TENSOR_NAMES]
    grads = ""
    if torch.is_grad_enabled():
        grads = ",".join(name for name in DIFFERENTIABLE if _requires_grad(getattr(tensors, name)))
    values = [getattr(options, name) for name in OPTION_NAMES]
    return torch.ops.flash_sparse_attn.forward(*given, *values, backend, grads)


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _validate(layouts: Sequence[Layout | None], *scalars: Any) -> AttentionProblem:
    """The problem of a call, checked, from the layouts of its tensors and its other arguments."""
    *options, grads = scalars
    return describe(
        AttentionTensors(*layouts),
        AttentionOptions(**dict(zip(OPTION_NAMES, options, strict=True))),
        grads.split(",") if grads else (),
    )


_validated = functools.lru_cache(maxsize=1024)(_validate)
"""`_validate`, once for all calls that are alike: it is a function of what is hashed, and arguments
of an operator are of the types of its schema. Errors are not kept.
"""


def _described(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What `_validate` takes, from the flat arguments of an operator: all but the backend."""
    layouts = tuple([None if x is None else Layout.of(x) for x in arguments[:_TENSORS_END]])
    return layouts, *arguments[_TENSORS_END:_OPTIONS_END], arguments[-1]


def _read(arguments: Sequence[Any]) -> tuple[AttentionTensors, AttentionProblem, str | None]:
    """The flat arguments of an operator, validated."""
    problem = _validated(*_described(arguments))
    return AttentionTensors(*arguments[:_TENSORS_END]), problem, arguments[_OPTIONS_END]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, problem, backend = _read(arguments)
    o, lse, kept = dispatch.select(problem, backend).forward(problem, tensors)
    return o, lse, lse.new_empty(problem.kept_shape, dtype=torch.int32) if kept is None else kept


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = _validate(*_described(arguments))  # sizes may be symbolic
    q = arguments[0]
    rows = (problem.heads_q, problem.seqlen_q)
    lse_shape = rows if problem.form == Form.PACKED else (problem.batch, *rows)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty((*q.shape[:-1], problem.head_dim_v)),
        q.new_empty(lse_shape, dtype=lse_dtype),
        q.new_empty(problem.kept_shape, dtype=torch.int32),
    )


def _backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, kept: Tensor, *arguments: Any
) -> list[Tensor]:
    tensors, problem, backend = _read(arguments)
    gradients = dispatch.select(problem, backend).backward(
        problem, tensors, o, lse, kept if problem.softmax_threshold > 0 else None, do, dlse
    )
    # Backends sum in float32 (G1); autograd wants the dtype of the input.
    return [gradients[name].to(getattr(tensors, name).dtype).contiguous() for name in problem.grads]


def _backward_fake(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, kept: Tensor, *arguments: Any
) -> list[Tensor]:
    problem = _validate(*_described(arguments))  # sizes may be symbolic
    inputs = [arguments[TENSOR_NAMES.index(name)] for name in problem.grads]
    return [tensor.new_empty(tensor.shape) for tensor in inputs]


class _Differentiable(torch.autograd.Function):
    """The operator `forward`, whose derivative is the operator `backward`."""

    @staticmethod
    def forward(ctx: Any, keys: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _below_autograd(keys, arguments)
        ctx.save_for_backward(*arguments[:_TENSORS_END], *output)
        ctx.arguments = arguments[_TENSORS_END:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        *given, o, lse, kept = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        gradients = torch.ops.flash_sparse_attn.backward(
            do, dlse, o, lse, kept, *given, *ctx.arguments
        )
        *_, grads = ctx.arguments
        named = dict(zip(grads.split(","), gradients, strict=True))
        return None, *(named.get(name) for name in TENSOR_NAMES), *(None for _ in ctx.arguments)


def _below_autograd(keys: Any, arguments: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `forward` of dispatch keys `keys`, without those of autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        keys = keys & torch._C._after_autograd_keyset
        return torch.ops.flash_sparse_attn.forward.default.redispatch(keys, *arguments)


def _forward_autograd(keys: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator under autograd: recorded where an input needs a gradient.

    `torch.library.register_autograd` does the same in a time that grows with the square of the
    number of arguments, 0.5 ms for ours.
    """
    if torch.is_grad_enabled() and any(map(_requires_grad, arguments[:_TENSORS_END])):
        return _Differentiable.apply(keys, *arguments)
    return _below_autograd(keys, arguments)


def _count(arguments: Sequence[Any], products: int) -> int:
    """FLOPs of `products` matrix products over the pairs that sizes and causality leave.

    Masks whose data is not known here count as full: an upper bound.
    """
    q, k, v = arguments[:3]
    causal = arguments[_TENSORS_END + OPTION_NAMES.index("causal")]
    batch, (heads, head_dim), head_dim_v = q[0] if len(q) == 4 else 1, q[-2:], v[-1]
    rows, keys = q[-3], k[-3]
    pairs = rows * keys
    if causal:
        first = max(0, rows - keys)  # rows that see nothing
        seen = rows - first
        pairs = seen * (keys - rows + first) + seen * (seen + 1) // 2
    return batch * heads * pairs * (head_dim + head_dim_v) * products


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("flash_sparse_attn::forward", _forward_fake, lib=_library)
torch.library.register_fake("flash_sparse_attn::backward", _backward_fake, lib=_library)
_library.impl("forward", _forward_autograd, "Autograd", with_keyset=True)


@register_flop_formula(torch.ops.flash_sparse_attn.forward)
def _forward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return _count(shapes, 2)


@register_flop_formula(torch.ops.flash_sparse_attn.backward)
def _backward_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return _count(shapes[5:], 5)
