"""V7 by gathering: which keys get slots, and what stands there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from flash_sparse_attn.backends import triton as backend
from flash_sparse_attn.backends.triton.kernels import arguments, compaction, gates, preparation
from torch import Tensor

from flash_sparse_attn import reference
from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe
from tests.conformance.poison import poisoned_memory

from .calls import Draw
from .memory import checked_memory

CLOSED = -30.0


@dataclass(frozen=True)
class Gated:
    """A call with gates, closed from every eighth key to the next but for its first two."""

    seqlen_q: int = 150
    seqlen_k: int = 150
    gate: str = "logsigmoid"
    scale: float = 1.0
    mask_heads: int | None = None
    threshold: float = 0.1
    options: dict[str, Any] = field(default_factory=lambda: {"causal": True})

    def tensors(self) -> AttentionTensors:
        draw = Draw.seeded(5)
        q, k, v = draw.qkv(2, self.seqlen_q, self.seqlen_k, (4, 2))
        gate_q = draw.normal(2, self.seqlen_q, 4).abs() + 0.5
        closed = torch.arange(self.seqlen_k) % 8 >= 2
        gate_k = draw.normal(2, self.seqlen_k, 2).masked_fill(closed[:, None], CLOSED)
        mask = self.mask_heads and draw.coin(2, self.mask_heads, 1, self.seqlen_k, share=0.7)
        return AttentionTensors(q, k, v, gate_q=gate_q, gate_k=gate_k, mask=mask)

    def attention_options(self) -> AttentionOptions:
        return AttentionOptions(
            softmax_scale=self.scale,
            gate=self.gate,
            gate_threshold=self.threshold,
            **self.options,
        )

    def terms(self, tensors: AttentionTensors) -> dict[str, Any]:
        """Those of the reference, gates in float64."""
        return {
            "softmax_scale": self.scale,
            "gate_q": tensors.gate_q.double(),
            "gate_k": tensors.gate_k.double(),
            "gate": self.gate,
            "gate_threshold": self.threshold,
            "mask": tensors.mask,
            "causal": self.options.get("causal", False),
            "window": (self.options.get("window_left"), None),
            "sinks": self.options.get("sinks", 0),
        }


CALLS = {
    "causal": Gated(),
    "all rows": Gated(options={}),
    "identity": Gated(gate="identity"),
    "falling": Gated(gate="identity", scale=-1.0),
    "more rows": Gated(seqlen_q=220),
    "more keys": Gated(seqlen_q=70, seqlen_k=220),
    "window, sinks": Gated(options={"causal": True, "window_left": 20, "sinks": 3}),
    "key mask": Gated(mask_heads=2),
    "key mask of all heads": Gated(mask_heads=1),
}


def kept(call: Gated, tensors: AttentionTensors) -> Tensor:
    """Which pairs stay under every V rule, [B, Hkv, Sq, Sk], of any head of a group."""
    terms = call.terms(tensors)
    visible = reference.final_probability(tensors.q.double(), tensors.k.double(), **terms)[1]
    return visible.expand(2, 4, -1, -1).unflatten(1, (2, 2)).any(2)


@pytest.fixture(params=CALLS)
def gathered(request):
    """(what stays, tensors, terms and keys of slots, by plane) of a call."""
    call = CALLS[request.param]
    tensors = call.tensors()
    problem = describe(tensors, call.attention_options(), ())
    with poisoned_memory("cpu"), checked_memory():
        _, _, terms, slots = preparation.prepare(problem, tensors, "forward")
    count = slots.count[:4].tolist()
    keys = [slots.key.view(4, -1)[plane, :n].tolist() for plane, n in enumerate(count)]
    return kept(call, tensors).flatten(0, 1), tensors, terms, keys


def test_keys_that_stay_have_a_slot(gathered):
    """Each once and in order: no key is missing that a row of the group keeps."""
    stays, _, _, keys = gathered
    for visible, own in zip(stays, keys, strict=True):
        assert own == sorted(set(own))
        assert set(visible.any(0).nonzero().flatten().tolist()) <= set(own)


def test_keys_that_no_row_keeps_have_none(gathered):
    """But those whose first rows share a block of rows with one that keeps such a key, or that
    later rows, which a window hides them from, would keep."""
    stays, tensors, _, keys = gathered
    for plane, (visible, own) in enumerate(zip(stays, keys, strict=True)):
        dropped = set(range(visible.shape[1])) - set(visible.any(0).nonzero().flatten().tolist())
        closed = tensors.gate_k[plane // 2, :, plane % 2] == CLOSED
        assert sum(bool(closed[j]) for j in set(own) & dropped) <= 16


def test_delta_of_slots(gathered):
    _, tensors, terms, keys = gathered
    delta = terms.gates.delta.flatten(0, 1)
    extrema = terms.gates.extrema.flatten(0, 1)
    for plane, own in enumerate(keys):
        want = tensors.gate_k[plane // 2, own, plane % 2]
        assert torch.equal(delta[plane, : len(own)], want)
        for at, block in enumerate(want.split(terms.block)):
            assert extrema[plane, at].tolist() == [block.min(), block.max()]


def test_nan_lives():
    """V7 drops nothing that is NaN, and nothing from a row whose gates are."""
    tensors = Gated().tensors()
    gate_k = tensors.gate_k.clone()
    gate_k[:, -1] = float("nan")
    options = AttentionOptions(softmax_scale=1.0, gate="identity", gate_threshold=0.5, causal=True)
    tensors = replace(tensors, gate_k=gate_k)
    problem = describe(tensors, options, ())
    _, _, _, slots = preparation.prepare(problem, tensors, "forward")
    for plane, n in enumerate(slots.count[:4].tolist()):
        assert slots.key.view(4, -1)[plane, n - 1] == tensors.gate_k.shape[1] - 1


@pytest.mark.parametrize("name", [*CALLS, "key mask, nothing dropped"])
def test_results(name):
    """o and every gradient, beside the reference in float64."""
    call = CALLS.get(name) or Gated(mask_heads=2, threshold=0.0)
    tensors, leaves = call.tensors(), ("q", "k", "v", "gate_q", "gate_k")
    problem = describe(tensors, call.attention_options(), leaves)
    assert compaction.applies(problem)
    do = Draw.seeded(6).normal(*tensors.q.shape)
    with poisoned_memory("cpu"), checked_memory():
        o, lse, kept = backend.forward(problem, tensors)
        got = backend.backward(problem, tensors, o, lse, kept, do, None)
    qkv = [x.double() for x in (tensors.q, tensors.k, tensors.v)]
    terms = call.terms(tensors)
    want = reference.attention_backward(do.double(), None, *qkv, **terms)
    want["o"], _ = reference.attention(*qkv, **terms)
    for leaf, x in (got | {"o": o}).items():
        torch.testing.assert_close(x.double(), want[leaf], rtol=1e-4, atol=1e-4, msg=leaf)


@pytest.mark.parametrize("chunk", [2, 64])
def test_reach(chunk, monkeypatch):
    """From each block of rows on, over the heads of the group."""
    monkeypatch.setattr(gates, "REACH_CHUNK", chunk)
    call = Gated()
    tensors = call.tensors()
    problem = describe(tensors, call.attention_options(), ())
    limits = Draw.seeded(2).normal(2, 4, 16, 4)
    found = gates.gates(problem, tensors, arguments.score(problem), None, 32)
    found = found._replace(limits=limits)
    with checked_memory():
        reach = gates.gate_reach(problem, found)[:, :, :10]
    grouped = limits.unflatten(1, (2, 2))[:, :, :, :10]
    up = grouped[..., 0].amin(2).flip(-1).cummin(-1).values.flip(-1)
    down = grouped[..., 1].amax(2).flip(-1).cummax(-1).values.flip(-1)
    assert torch.equal(reach, torch.stack((up, down), -1))


@pytest.mark.parametrize(
    ("options", "applies"),
    [
        ({"gate_threshold": 0.1}, True),
        ({"gate_threshold": 0.1, "causal": True, "window_left": 5}, True),
        ({}, False),
        ({"gate_threshold": 0.1, "softmax_threshold": 0.1}, False),
    ],
)
def test_where_keys_are_gathered(options, applies):
    tensors = Gated().tensors()
    problem = describe(tensors, AttentionOptions(softmax_scale=1.0, gate="identity", **options), ())
    assert compaction.applies(problem) is applies
