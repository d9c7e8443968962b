"""Attention over the best keys of every row, on a GPU: against every row's own choice, in one
captured graph with the choice of keys, and in memory that grows with the length.
"""

from __future__ import annotations

import math

import pytest
import torch
from flash_sparse_attn.spec import tolerances
from torch import Tensor

from flash_sparse_attn import IntervalMask, flash_sparse_attn_func, get_available_backends
from flash_sparse_attn.registry import REFERENCE

from ..conformance.compare import failures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS = [name for name in get_available_backends() if name != REFERENCE]
HEADS_Q, HEADS_KV = 4, 2
GROUP = HEADS_Q // HEADS_KV
WINDOW = 256
ROWS = 256
"""Rows of which the choice is made at a time."""


class Inputs:
    """Arguments of one call, and the gradients of its outputs.

    Attributes:
        leaves: q [1, S, Hq, D], k, v [1, S, Hkv, D] and the bias [1, Hkv, 1, S], bfloat16.
        scores: [1, Hkv, S], many of them equal.
        do, dlse: of o and lse.
    """

    def __init__(self, seqlen: int, head_dim: int, device: str = "cuda") -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, device=device, generator=generator)

        heads = {"q": HEADS_Q, "k": HEADS_KV, "v": HEADS_KV}
        leaves = {name: normal(1, seqlen, n, head_dim) for name, n in heads.items()}
        leaves["bias"] = normal(1, HEADS_KV, 1, seqlen)
        self.leaves = {name: x.bfloat16().requires_grad_() for name, x in leaves.items()}
        self.scores = (normal(1, HEADS_KV, seqlen) * 100).round() / 100
        self.do = normal(1, seqlen, HEADS_Q, head_dim).bfloat16()
        self.dlse = normal(1, HEADS_Q, seqlen)

    def run(self, backend: str, window: int = WINDOW) -> dict[str, Tensor]:
        """The choice of keys, the forward and the backward: o, lse and the gradients."""
        q, k, v, bias = self.leaves.values()
        o, lse = flash_sparse_attn_func(
            q,
            k,
            v,
            IntervalMask.topk(self.scores, window),
            bias,
            is_causal=True,
            return_lse=True,
            backend=backend,
        )
        gradients = torch.autograd.grad((o, lse), (q, k, v, bias), (self.do, self.dlse))
        named = zip(self.leaves, gradients, strict=True)
        return {"o": o.detach(), "lse": lse.detach()} | {f"d{name}": x for name, x in named}


def best_keys(scores: Tensor, window: int) -> Tensor:
    """M5, row by row: the best of the keys up to the row, the more recent of equal ones first.

    scores [Hkv, S]; bool [Hkv, S, S].
    """
    seqlen = scores.shape[-1]
    keep = torch.zeros(*scores.shape, seqlen, dtype=torch.bool, device=scores.device)
    j = torch.arange(seqlen, device=scores.device)
    for row in range(0, seqlen, ROWS):
        i = torch.arange(row, min(row + ROWS, seqlen), device=scores.device)[:, None]
        ranked = scores[:, None].masked_fill(j > i, -math.inf).flip(-1)
        best = seqlen - 1 - ranked.argsort(stable=True, dim=-1, descending=True)[..., :window]
        keep[:, i.flatten()] = keep[:, i.flatten()].scatter(-1, best, True) & (j <= i)
    return keep


def textbook(inputs: Inputs, keep: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The results of a call by dense pairs, a head at a time, in a dtype."""
    q, k, v, bias = (x.detach().to(dtype) for x in inputs.leaves.values())
    wide = torch.promote_types(dtype, torch.float32)
    results = {"o": torch.empty_like(q), "lse": torch.empty_like(inputs.dlse, dtype=wide)}
    sums = {f"d{name}": torch.zeros_like(x, dtype=wide) for name, x in inputs.leaves.items()}
    for h in range(HEADS_Q):
        n = h // GROUP
        leaves = [x.clone().requires_grad_() for x in (q[0, :, h], k[0, :, n], v[0, :, n])]
        leaves.append(bias[0, n].clone().requires_grad_())
        q_h, k_h, v_h, bias_h = leaves
        s = q_h @ k_h.T * q.shape[-1] ** -0.5 + bias_h
        s = s.masked_fill(~keep[n], -math.inf).to(wide)
        o = s.softmax(-1).to(dtype) @ v_h
        lse = s.logsumexp(-1)
        grads = inputs.do[0, :, h].to(dtype), inputs.dlse[0, h].to(wide)
        dq, dk, dv, dbias = torch.autograd.grad((o, lse), leaves, grads)
        results["o"][0, :, h], results["lse"][0, h] = o.detach(), lse.detach()
        sums["dq"][0, :, h] += dq
        sums["dk"][0, :, n] += dk
        sums["dv"][0, :, n] += dv
        sums["dbias"][0, n] += dbias
    return results | {name: x.to(dtype) for name, x in sums.items()}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("backend", KERNELS)
def test_every_row_has_its_own_best_keys(backend, head_dim):
    """N1: as near to float64 over each row's own choice as the textbook's bfloat16."""
    inputs = Inputs(8192, head_dim)
    keep = best_keys(inputs.scores[0], WINDOW)
    exact = textbook(inputs, keep, torch.float64)
    eager = textbook(inputs, keep, torch.bfloat16)
    broken = failures(inputs.run(backend), exact, eager, tolerances()["bfloat16"])
    assert not broken, "; ".join(broken)


@pytest.mark.parametrize("backend", KERNELS)
def test_choice_and_gradients_in_one_graph(backend):
    """A graph of everything, replayed on other data, is what a call on that data gives."""
    inputs = Inputs(2048, 64)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        inputs.run(backend, 64)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = inputs.run(backend, 64)
    with torch.no_grad():
        for tensor in (*inputs.leaves.values(), inputs.scores, inputs.do, inputs.dlse):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    got = {name: x.clone() for name, x in captured.items()}
    want = inputs.run(backend, 64)
    different = [name for name, x in got.items() if not torch.equal(x, want[name])]
    assert not different


@pytest.mark.parametrize("backend", KERNELS)
def test_memory_grows_with_the_length(backend):
    """Twice the length, twice the memory of a forward and backward."""
    peaks = []
    for seqlen in (16384, 32768):
        inputs = Inputs(seqlen, 64)
        inputs.run(backend)  # what is kept from a first call on is not this call's
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        inputs.run(backend)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] / peaks[0] < 2.2
