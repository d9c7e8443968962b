"""Packed sequences that each keep their best keys, on a GPU: against every row's own choice, in one
captured graph whose boundaries move, and in memory that follows the tokens that exist.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from flash_sparse_attn.spec import tolerances
from torch import Tensor

from flash_sparse_attn import IntervalMask, flash_sparse_attn_varlen_func

from ..conformance.compare import failures
from .test_cuda_dynamic import HEADS_KV, HEADS_Q, KERNELS, WINDOW, best_keys, textbook

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (1, 700, 3000, 128, 0, 2049, 64, 513)


@dataclass
class Cut:
    """One sequence, as a batch of one: what `textbook` reads."""

    leaves: dict[str, Tensor]
    do: Tensor
    dlse: Tensor


class Inputs:
    """Arguments of one call, and the gradients of its outputs.

    Attributes:
        leaves: q [T, Hq, D], k, v [T, Hkv, D] and the bias [1, Hkv, 1, T], bfloat16.
        scores: [1, Hkv, T], many of them equal.
        cu_seqlens: int32 [sequences + 1].
        start, end: int32 [1, Hkv, T], the choice of every sequence.
        longest: what the call says of the longest sequence.
        do, dlse: of o and lse.
    """

    def __init__(self, lengths: tuple[int, ...], head_dim: int, longest: int | None = None) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device="cuda", generator=generator)

        total = sum(lengths)
        heads = {"q": HEADS_Q, "k": HEADS_KV, "v": HEADS_KV}
        leaves = {name: normal(total, n, head_dim) for name, n in heads.items()}
        leaves["bias"] = normal(1, HEADS_KV, 1, total)
        self.leaves = {name: x.bfloat16().requires_grad_() for name, x in leaves.items()}
        self.scores = (normal(1, HEADS_KV, total) * 100).round() / 100
        self.longest = max(lengths) if longest is None else longest
        self.do = normal(total, HEADS_Q, head_dim).bfloat16()
        self.dlse = normal(HEADS_Q, total)
        self.cu_seqlens, self.start, self.end = self.choice(lengths)

    def choice(self, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Boundaries, and the choice of keys between them."""
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda").int()
        own = (x for x in self.scores.split(lengths, 2) if x.numel())
        masks = [IntervalMask.topk(x, WINDOW) for x in own]
        start, end = (torch.cat([getattr(m, name) for m in masks], 2) for name in ("start", "end"))
        return bounds, start, end

    def run(self, backend: str) -> dict[str, Tensor]:
        """The forward and the backward: o, lse and the gradients."""
        q, k, v, bias = self.leaves.values()
        o, lse = flash_sparse_attn_varlen_func(
            q,
            k,
            v,
            self.cu_seqlens,
            self.cu_seqlens,
            self.longest,
            self.longest,
            IntervalMask(self.start, self.end, keys_per_row=WINDOW),
            bias,
            is_causal=True,
            return_lse=True,
            backend=backend,
        )
        gradients = torch.autograd.grad((o, lse), (q, k, v, bias), (self.do, self.dlse))
        named = zip(self.leaves, gradients, strict=True)
        return {"o": o.detach(), "lse": lse.detach()} | {f"d{name}": x for name, x in named}

    def textbook(self, lengths: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        """The results by dense pairs, sequence by sequence."""
        q, k, v, bias = (x.detach() for x in self.leaves.values())
        found = []
        bounds = itertools.accumulate(lengths, initial=0)
        for start, end in itertools.pairwise(bounds):
            if start == end:
                continue
            own = slice(start, end)
            leaves = {"q": q[None, own], "k": k[None, own], "v": v[None, own]}
            leaves["bias"] = bias[..., own]
            cut = Cut(leaves, self.do[None, own], self.dlse[None, :, own])
            keep = best_keys(self.scores[0, :, own], WINDOW)
            found.append(textbook(cut, keep, dtype))
        joined = {"lse": torch.cat([x["lse"][0] for x in found], 1)}
        joined["dbias"] = torch.cat([x["dbias"] for x in found], 3)
        for name in ("o", "dq", "dk", "dv"):
            joined[name] = torch.cat([x[name][0] for x in found])
        return joined


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", KERNELS)
def test_every_row_has_the_best_keys_of_its_sequence(backend, head_dim):
    """N1: as near to float64 over each row's own choice as the textbook's bfloat16."""
    inputs = Inputs(LENGTHS, head_dim)
    exact = inputs.textbook(LENGTHS, torch.float64)
    eager = inputs.textbook(LENGTHS, torch.bfloat16)
    broken = failures(inputs.run(backend), exact, eager, tolerances()["bfloat16"])
    assert not broken, "; ".join(broken)


@pytest.mark.parametrize("backend", KERNELS)
def test_boundaries_move_under_a_graph(backend):
    """A graph replayed on other data, boundaries and choices is what a call on them gives, to the
    bit (G2).
    """
    inputs = Inputs(LENGTHS, 64, longest=4096)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        inputs.run(backend)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = inputs.run(backend)
    other = tuple(reversed(LENGTHS))
    with torch.no_grad():
        for tensor in (*inputs.leaves.values(), inputs.scores, inputs.do, inputs.dlse):
            tensor.copy_(torch.randn_like(tensor))
        kept = inputs.cu_seqlens, inputs.start, inputs.end
        for tensor, new in zip(kept, inputs.choice(other), strict=True):
            tensor.copy_(new)
    graph.replay()
    got = {name: x.clone() for name, x in captured.items()}
    want = inputs.run(backend)
    different = [name for name, x in got.items() if not torch.equal(x, want[name])]
    assert not different


def peak(backend: str, lengths: tuple[int, ...]) -> int:
    """Bytes of a forward and backward beyond its arguments."""
    inputs = Inputs(lengths, 64)
    inputs.run(backend)  # what is kept from a first call on is not this call's
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    inputs.run(backend)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backend", KERNELS)
def test_memory_follows_the_tokens_that_exist(backend):
    """Not how many sequences there are, times the longest."""
    two = peak(backend, (8192,) * 2)
    assert peak(backend, (8192,) * 4) < 2.2 * two
    assert peak(backend, (8192, *((128,) * 64))) < 2.5 * two
