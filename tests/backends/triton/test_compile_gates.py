"""What gates (S3, V7) add to the loops of the attention kernels, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flash_sparse_attn.backends.triton.kernels import tuning

from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

from .compiling import SHARED_MEMORY, compile_call
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
    kernels = compiled(90, dim, gate="logsigmoid", **options)
    for name, kernel in hot(kernels).items():
        for loop in kernel.hot_loops:
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
