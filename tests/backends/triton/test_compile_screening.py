"""What the screening of T1 compiles to on each family of GPUs; no GPU need be present."""

from __future__ import annotations

import os

import pytest
import torch

from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors

pytest.importorskip("triton", reason="compilation is Triton's")

from .compiling import SHARED_MEMORY, Kernel, compile_call
from .test_compile import LARGEST_SPILL

pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
    ),
]

SEQLEN = 2048
PRODUCTS = {80: "IMMA", 90: "IGMMA", 100: "UTC\\w*MMA|IMMA", 120: "IMMA"}
"""Instructions of products of 8-bit integers, by family."""
BARRIERS = 4
"""Of a loop on sm_90: two of the pipeline, and two of the vote, where a word of bits ends."""


def compiled(arch: int, dtype: torch.dtype, dim: int) -> dict[str, Kernel]:
    """The kernels of a causal forward with a threshold."""
    q, k, v = (torch.zeros(1, SEQLEN, heads, dim, dtype=dtype) for heads in (4, 2, 2))
    options = AttentionOptions(softmax_scale=dim**-0.5, causal=True, softmax_threshold=0.01)
    return compile_call(arch, AttentionTensors(q, k, v), options, ())


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float32, 256)])
def test_products_of_integers(arch, dtype, dim):
    """They are the tensor cores', whatever the dtype; loops over tiles hardly spill."""
    kernel = compiled(arch, dtype, dim)["screen_kernel"]
    assert kernel.shared <= SHARED_MEMORY[arch]
    assert kernel.count(f"(?:{PRODUCTS[arch]})")
    assert kernel.hot_loops
    for loop in kernel.hot_loops:
        assert loop.spills <= LARGEST_SPILL * loop.instructions, loop
        assert arch != 90 or loop.barriers <= BARRIERS, loop
