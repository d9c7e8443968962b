"""What gates (S3, V7) add to the loops of the attention kernels, without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from flash_sparse_attn.backends import triton as backend
from flash_sparse_attn.backends.triton.kernels import tuning

from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

from .compiling import SHARED_MEMORY, compile_call, compiling_only
from .test_compile import HOT, MOST_WAITS, hot, require_fit

SEQLEN = 2048
MOST_A_PAIR = 8
"""Instructions of a warp for the gates of 32 pairs: six multiply-adds or the like, a minimum and an
exponential. A unary minus or a score that is scaled before its maximum is one more."""


def call(dim: int, **options: object) -> tuple[AttentionTensors, AttentionOptions]:
    q, k, v = (torch.zeros(1, SEQLEN, heads, dim, dtype=torch.bfloat16) for heads in (4, 2, 2))
    gates = {}
    if "gate" in options:
        gates = {"gate_q": torch.zeros(1, SEQLEN, 4), "gate_k": torch.zeros(1, SEQLEN, 2)}
    options = AttentionOptions(softmax_scale=dim**-0.5, causal=True, **options)
    return AttentionTensors(q, k, v, **gates), options


def compiled(arch: int, dim: int, **options: object):
    tensors, options = call(dim, **options)
    grads = ("q", "k", "v") + (("gate_q", "gate_k") if options.gate else ())
    return compile_call(arch, tensors, options, grads)


@pytest.mark.parametrize("options", [{}, {"gate_threshold": 0.1}], ids=["all", "V7"])
@pytest.mark.parametrize("dim", [64, 128])
def test_products_stay_asynchronous(dim, options):
    """Or, in the forward under V7, 16 warps share a multiprocessor and cover what ptxas puts in
    turn, with next to no register spilled.
    """
    kernels = compiled(90, dim, gate="logsigmoid", **options)
    for name, kernel in hot(kernels).items():
        for loop in kernel.hot_loops:
            if options and name == "forward_kernel":
                assert kernel.registers <= 128
                assert loop.spills <= 2, loop
            else:
                assert loop.waits <= MOST_WAITS, f"{name}: {loop}"


def test_instructions_a_pair():
    """Of the forward's full tiles: what is added to those of a call without gates."""
    tensors, options = call(128, gate="logsigmoid")
    tile = tuning.tile("forward", replace(describe(tensors, options, ()), arch=90))
    added = [
        min(loop.instructions for loop in kernels["forward_kernel"].hot_loops)
        for kernels in (compiled(90, 128, gate="logsigmoid"), compiled(90, 128))
    ]
    pairs = tile.block_m * tile.block_n // (32 * tile.warps)
    assert added[0] - added[1] <= MOST_A_PAIR * pairs


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_shared_memory(arch):
    kernels = compiled(arch, 128, gate="logsigmoid", gate_threshold=0.1)
    assert set(HOT[:3]) <= kernels.keys()
    assert "gather_keys_kernel" in kernels
    require_fit(arch, kernels)


@pytest.mark.parametrize("gate", ["logsigmoid", "identity"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_float64_rounds_as_the_reference(gate, softcap):
    """N1: no product starts from what the scores add to it, none is fused with a sum. The scale
    that is 1 is the one that vanishes from between them.
    """
    q, k, v = (torch.zeros(1, 256, heads, 16, dtype=torch.float64) for heads in (2, 1, 1))
    gates = {"gate_q": torch.zeros(1, 256, 2), "gate_k": torch.zeros(1, 256, 1)}
    tensors = AttentionTensors(q, k, v, bias=torch.zeros(1, 1, 256, 256), **gates)
    options = AttentionOptions(softmax_scale=1.0, softcap=softcap, gate=gate, gate_threshold=0.1)
    grads = ("q", "k", "v", "bias", "gate_q", "gate_k")
    problem = replace(describe(tensors, options, grads), device="cuda", arch=90)
    with compiling_only(90) as compiled:
        o, lse, kept = backend.forward(problem, tensors)
        backend.backward(problem, tensors, o, lse, kept, q, None)
    found = {name: kernel.asm for name, kernel in compiled}
    for name in HOT:
        starts = re.findall(r"tt\.dot %\w+, %\w+, %(\w+)", found[name]["ttir"])
        assert starts, name
        assert all(start.startswith("cst") or "acc" in start for start in starts), (name, starts)
        assert not re.search(r"\b(mul|add|sub)\.f64", found[name]["ptx"]), name
