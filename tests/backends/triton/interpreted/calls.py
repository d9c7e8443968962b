"""One call of the backend through its contract, beside the reference in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from flash_sparse_attn.backends import triton as backend
from torch import Tensor

from flash_sparse_attn import reference
from flash_sparse_attn.problem import AttentionOptions, AttentionProblem
from flash_sparse_attn.tensors import DIFFERENTIABLE, AttentionTensors
from flash_sparse_attn.validation import describe
from tests.conformance.poison import poisoned_memory

from .memory import checked_memory

Results = dict[str, Tensor]

TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-5, torch.float16: 3e-3}
"""Largest error, as a share of one more than the largest magnitude of the quantity."""
LSE_TOLERANCE = 1e-5
"""lse is float32 whatever the inputs, float64 aside."""
PAIR_TERMS = ("mask", "bias", "interval_start", "interval_end")

grad_subsets = [
    subset for size in range(5) for subset in itertools.combinations(("q", "k", "v", "bias"), size)
]
"""Every subset of the gradients that this backend gives."""


@dataclass(frozen=True)
class Draw:
    """Random arguments from one seed."""

    generator: torch.Generator

    @classmethod
    def seeded(cls, seed: int) -> Draw:
        return cls(torch.Generator().manual_seed(seed))

    def normal(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*sizes, generator=self.generator).to(dtype)

    def coin(self, *sizes: int, share: float = 0.5) -> Tensor:
        """True in the given share of places."""
        return torch.rand(*sizes, generator=self.generator) < share

    def integers(self, low: int, high: int, *sizes: int) -> Tensor:
        """int32, low <= x < high."""
        return torch.randint(low, high, sizes, generator=self.generator, dtype=torch.int32)

    def qkv(
        self,
        batch: int = 1,
        seqlen_q: int = 70,
        seqlen_k: int = 100,
        heads: tuple[int, int] = (2, 1),
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v; several tiles of both kinds, none of them whole."""
        heads_q, heads_kv = heads
        return (
            self.normal(batch, seqlen_q, heads_q, dim, dtype=dtype),
            self.normal(batch, seqlen_k, heads_kv, dim, dtype=dtype),
            self.normal(batch, seqlen_k, heads_kv, dim, dtype=dtype),
        )


def run(
    tensors: AttentionTensors,
    options: AttentionOptions,
    do: Tensor,
    dlse: Tensor | None,
    grads: tuple[str, ...],
) -> Results:
    """o, lse and d<name> for every name in `grads`, from memory that held garbage, every access to
    it checked.
    """
    problem = describe(tensors, options, grads)
    against = backend.unsupported(problem)
    assert not against, against
    with poisoned_memory("cpu"), checked_memory():
        o, lse, kept = backend.forward(problem, tensors)
        gradients = backend.backward(problem, tensors, o, lse, kept, do, dlse)
    assert tuple(gradients) == problem.grads
    _require_contract(problem, tensors, o, lse, gradients)
    return {"o": o, "lse": lse} | {f"d{name}": x for name, x in gradients.items()}


def exact(
    tensors: AttentionTensors, options: AttentionOptions, do: Tensor, dlse: Tensor | None
) -> Results:
    """The same from the reference in float64, every gradient."""
    keywords: dict[str, Any] = {
        "softmax_scale": options.softmax_scale,
        "softcap": options.softcap,
        "causal": options.causal,
        "window": (options.window_left, options.window_right),
        "sinks": options.sinks,
    }
    keywords |= {name: x for name, x in tensors.present() if name in PAIR_TERMS}
    if tensors.bias is not None:
        keywords["bias"] = tensors.bias.double()
    qkv = [x.double() for x in (tensors.q, tensors.k, tensors.v)]
    o, lse = reference.attention(*qkv, **keywords)
    dlse = None if dlse is None else dlse.double()
    gradients = reference.attention_backward(do.double(), dlse, *qkv, **keywords)
    return {"o": o, "lse": lse} | {f"d{name}": x for name, x in gradients.items()}


def check(
    tensors: AttentionTensors,
    options: AttentionOptions,
    *,
    seed: int = 0,
    with_dlse: bool = True,
    grads: tuple[str, ...] = DIFFERENTIABLE,
) -> Results:
    """Compare outputs and gradients with the reference; those of the backend are returned.

    Args:
        tensors: of the call.
        options: of the call.
        seed: of do and dlse.
        with_dlse: whether lse takes part in the loss (G1).
        grads: which gradients to ask for; those of tensors that are absent are left out.
    """
    draw = Draw.seeded(seed)
    do = draw.normal(*tensors.q.shape, dtype=tensors.q.dtype)
    batch, seqlen_q, heads_q, _ = tensors.q.shape
    dlse = draw.normal(batch, heads_q, seqlen_q, dtype=_wide(tensors)) if with_dlse else None
    grads = tuple(name for name in grads if getattr(tensors, name) is not None)
    got = run(tensors, options, do, dlse, grads)
    want = exact(tensors, options, do, dlse)
    found = [text for name, x in got.items() for text in _difference(name, x, want[name], tensors)]
    assert not found, f"{describe(tensors, options, grads)}, grads {grads}: " + "; ".join(found)
    return got


def same_bits(x: Tensor, y: Tensor) -> bool:
    """G2: equal in every bit."""
    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.equal(x.view(kind), y.view(kind))


def _wide(tensors: AttentionTensors) -> torch.dtype:
    """The dtype of lse."""
    return torch.promote_types(tensors.q.dtype, torch.float32)


def _require_contract(
    problem: AttentionProblem, tensors: AttentionTensors, o: Tensor, lse: Tensor, grads: Results
) -> None:
    """Shapes, dtypes and layouts that the backend's contract promises."""
    rows = (problem.batch, problem.heads_q, problem.seqlen_q)
    expected = {"o": (tensors.q.shape, problem.dtype), "lse": (rows, _wide(tensors))}
    expected |= {name: (getattr(tensors, name).shape, problem.dtype) for name in grads}
    if "bias" in grads:
        expected["bias"] = (tensors.bias.shape, _wide(tensors))
    for name, x in ({"o": o, "lse": lse} | grads).items():
        assert (x.shape, x.dtype) == expected[name], (name, x.shape, x.dtype)
        assert x.is_contiguous(), name


def _difference(name: str, x: Tensor, y: Tensor, tensors: AttentionTensors) -> list[str]:
    """How x differs from y by more than its tolerance."""
    x, y = x.double(), y.double()
    finite = y.isfinite()
    if not torch.equal(x.isfinite(), finite):
        return [f"{name}: {int((x.isfinite() != finite).sum())} elements inf or nan where not due"]
    if not torch.equal(x[~finite].nan_to_num(math.pi), y[~finite].nan_to_num(math.pi)):
        return [f"{name}: inf and nan are not those of the reference"]
    if not finite.any():
        return []
    tolerance = TOLERANCE[tensors.q.dtype]
    if name == "lse":
        tolerance = min(tolerance, LSE_TOLERANCE)
    error = float((x - y)[finite].abs().max())
    allowed = tolerance * (1 + float(y[finite].abs().max()))
    return [] if error <= allowed else [f"{name}: error {error:.2e} > {allowed:.2e}"]
