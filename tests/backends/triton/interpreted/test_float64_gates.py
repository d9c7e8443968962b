"""Gates (S3, V7) of float64 calls, whose scores round as the reference's do (N1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from flash_sparse_attn.backends import triton as backend
from flash_sparse_attn.backends.triton.kernels import gates, preparation

from flash_sparse_attn import reference
from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe
from tests.conformance.poison import poisoned_memory

from .calls import Draw
from .memory import checked_memory

FLOAT64 = torch.float64
SQ, SK = 70, 100
GATED = ("q", "k", "v", "gate_q", "gate_k")
TOLERANCE = 1e-14
"""Largest error, as a share of the largest magnitude."""


@dataclass(frozen=True)
class Gated:
    """A call whose q and k are quarters: their products are exact in every order of sums."""

    gate: str = "logsigmoid"
    scale: float = 1.3
    threshold: float = 0.0
    options: dict[str, Any] | None = None
    bias: bool = False

    def tensors(self, seqlen_k: int = SK) -> AttentionTensors:
        draw = Draw.seeded(4)
        q, k, v = draw.qkv(dtype=FLOAT64, seqlen_k=seqlen_k)
        q, k = ((4 * x).round() / 4 for x in (q, k))
        gate_q, gate_k = draw.normal(1, SQ, 2).double(), draw.normal(1, seqlen_k, 1).double()
        given = {"gate_q": gate_q.exp() + 1 / 3, "gate_k": 2 * gate_k}
        bias = draw.normal(1, 2, SQ, seqlen_k, dtype=FLOAT64) if self.bias else None
        return AttentionTensors(q, k, v, bias=bias, **given)

    def attention_options(self, **options: Any) -> AttentionOptions:
        options |= {"softmax_scale": self.scale, "gate": self.gate} | (self.options or {})
        return AttentionOptions(gate_threshold=self.threshold, **options)

    def terms(self, tensors: AttentionTensors) -> dict[str, Any]:
        """The keywords of the reference."""
        return {
            "softmax_scale": self.scale,
            "gate_q": tensors.gate_q,
            "gate_k": tensors.gate_k,
            "gate": self.gate,
            "gate_threshold": self.threshold,
            "bias": tensors.bias,
        } | (self.options or {})


CALLS = {
    "logsigmoid": Gated(),
    "identity": Gated("identity", 0.3),
    "falling": Gated(scale=-0.3),
    "causal": Gated(options={"causal": True}),
    "softcap": Gated(options={"softcap": 1.5}),
    "bias": Gated(bias=True),
    "scale of one, bias": Gated("identity", 1.0, bias=True),
    "V7": Gated(threshold=1e-4),
    "V7, identity": Gated("identity", -0.1, 0.01),
    "V7, causal": Gated(threshold=0.3, options={"causal": True}),
}


@pytest.mark.parametrize("gate", ["logsigmoid", "identity"])
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_have_the_bits_of_the_reference(gate, scale, bias):
    """One key: lse is its score. So near to 0 sigma is rounded to an exponential, whatever the way
    in which its logarithm is taken.
    """
    call = Gated(gate, scale, bias=bias)
    tensors = call.tensors(seqlen_k=1)
    tensors = replace(tensors, gate_k=torch.full_like(tensors.gate_k, -200 / 3))
    problem = describe(tensors, call.attention_options(), ())
    with poisoned_memory("cpu"), checked_memory():
        _, lse, _ = backend.forward(problem, tensors)
    _, want = reference.attention(tensors.q, tensors.k, tensors.v, **call.terms(tensors))
    assert torch.equal(lse, want)


@pytest.mark.parametrize("name", CALLS)
def test_results(name):
    """o, lse and every gradient."""
    call = CALLS[name]
    tensors = call.tensors()
    leaves = GATED + (("bias",) if call.bias else ())
    problem = describe(tensors, call.attention_options(), leaves)
    do = Draw.seeded(6).normal(*tensors.q.shape, dtype=FLOAT64)
    with poisoned_memory("cpu"), checked_memory():
        o, lse, kept = backend.forward(problem, tensors)
        got = backend.backward(problem, tensors, o, lse, kept, do, None)
    got = {f"d{leaf}": x for leaf, x in got.items()} | {"o": o, "lse": lse}
    terms = call.terms(tensors)
    qkv = (tensors.q, tensors.k, tensors.v)
    want = reference.attention_backward(do, None, *qkv, **terms)
    want = {f"d{leaf}": x for leaf, x in want.items()}
    want["o"], want["lse"] = reference.attention(*qkv, **terms)
    for quantity, x in got.items():
        error = (x - want[quantity]).abs().max() / want[quantity].abs().max().clamp(min=1)
        assert error <= TOLERANCE, f"{quantity}: {float(error):.2e}"


@pytest.mark.parametrize("name", ["V7", "V7, identity"])
def test_base_of_screening(name):
    """T1 compares in base 2: its alpha and floors are those of a float32 call, all in that base."""
    call = CALLS[name]
    found = []
    for dtype in (FLOAT64, torch.float32):
        tensors = {name: x.to(dtype) for name, x in call.tensors().present()}
        tensors = AttentionTensors(**tensors)
        problem = describe(tensors, call.attention_options(softmax_threshold=0.1), ())
        with checked_memory():
            _, _, terms, _ = preparation.prepare(problem, tensors, "forward")
            found.append(gates.extrema(problem, terms))
    for record in ("alpha", "floor"):
        wide, single = (getattr(x, record) for x in found)
        rows = slice(0, SQ)
        torch.testing.assert_close(wide[..., rows].float(), single[..., rows], rtol=1e-4, atol=1e-3)
