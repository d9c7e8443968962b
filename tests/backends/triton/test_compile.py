"""What the tuned tiles compile to on each family of GPUs; no GPU need be present."""

from __future__ import annotations

import os

import pytest
import torch

from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors

pytest.importorskip("triton", reason="compilation is Triton's")

from .compiling import SHARED_MEMORY, Kernel, compile_call

pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
    ),
]

SEQLEN = 2048
"""A multiple of every tile: loads are as wide, and as much of them is buffered, as it gets. Several
segments of rows where each sees few keys.
"""
KEYS_PER_ROW = 128
HOT = ("forward_kernel", "key_gradients_kernel", "query_gradients_kernel", "bias_gradient_kernel")

LARGEST_SPILL = 0.08
"""Share of a hot loop's instructions that may move spilled registers; more of them show in time."""
MOST_WAITS = 8
"""Of a warp group around the asynchronous products of a hot loop on Hopper: two a product or fewer.
Where ptxas serialises them there is one an instruction, 48 at D 128.
"""


def pair_mask() -> torch.Tensor:
    return torch.ones(1, 1, SEQLEN, SEQLEN, dtype=torch.bool)


def pair_bias() -> torch.Tensor:
    """float32, which takes the most shared memory: it is buffered with the operands."""
    return torch.zeros(1, 1, SEQLEN, SEQLEN)


def key_bias() -> torch.Tensor:
    return torch.zeros(1, 4, 1, SEQLEN)


def key_mask() -> torch.Tensor:
    return torch.ones(1, 2, 1, SEQLEN, dtype=torch.bool)


def intervals() -> dict[str, torch.Tensor]:
    bound = torch.zeros(1, 2, SEQLEN, dtype=torch.int32)
    return {"interval_start": bound, "interval_end": bound}


CALLS = {
    "causal": ({}, {"causal": True}),
    "pair bias": ({"bias": pair_bias()}, {}),
    "everything": (
        {"mask": pair_mask(), "bias": pair_bias()},
        {"causal": True, "softcap": 3.0, "window_left": 200, "sinks": 4},
    ),
    "gathered, several segments": (
        {**intervals(), "bias": key_bias()},
        {"causal": True, "keys_per_row": KEYS_PER_ROW},
    ),
    "gathered, one segment": ({"mask": key_mask(), "bias": key_bias()}, {"causal": True}),
}
ONE_FAMILY = "gathered, one segment"
"""What differs from several segments is outside the hot loops."""
POINTS = [
    (arch, dim, terms)
    for arch in SHARED_MEMORY
    for dim in (64, 128, 256)
    for terms in CALLS
    if (arch, terms) != (120, "everything")  # the tiles of 80, whose shared memory is the same
    and (arch == 90 or terms != ONE_FAMILY)
]


def compiled(
    arch: int, dtype: torch.dtype, dim: int, terms: str, contiguous: bool = True
) -> dict[str, Kernel]:
    """The kernels of a call with these terms.

    With `contiguous`, the copy engine can read its operands; without, nothing but pointers can.
    """
    tensors, options = CALLS[terms]
    q, k, v = (
        torch.zeros(1, SEQLEN, heads, dim if contiguous else dim + 1, dtype=dtype)[..., :dim]
        for heads in (4, 2, 2)
    )
    grads = ("q", "k", "v") + (("bias",) if "bias" in tensors else ())
    options = AttentionOptions(softmax_scale=dim**-0.5, **options)
    return compile_call(arch, AttentionTensors(q, k, v, **tensors), options, grads)


def hot(kernels: dict[str, Kernel]) -> dict[str, Kernel]:
    """Those of `HOT` that were compiled."""
    return {name: kernel for name, kernel in kernels.items() if name in HOT}


def require_fit(arch: int, kernels: dict[str, Kernel]) -> None:
    shared = {name: x.shared for name, x in kernels.items() if x.shared > SHARED_MEMORY[arch]}
    assert not shared, f"of {SHARED_MEMORY[arch]} bytes of shared memory: {shared}"


def require_few_spills(kernels: dict[str, Kernel]) -> None:
    for name, kernel in hot(kernels).items():
        assert kernel.hot_loops, f"{name}: no loop with matrix products found"
        for loop in kernel.hot_loops:
            assert loop.spills <= LARGEST_SPILL * loop.instructions, f"{name}: {loop}"
            assert loop.waits <= MOST_WAITS, f"{name}: {loop}"


@pytest.mark.parametrize(("arch", "dim", "terms"), POINTS)
def test_half_precision(arch, dim, terms):
    """Shared memory fits, hot loops keep their registers, Hopper uses wgmma and does not wait for
    each.
    """
    kernels = compiled(arch, torch.bfloat16, dim, terms)
    require_fit(arch, kernels)
    require_few_spills(kernels)
    product = {90: "HGMMA", 100: "UTC\\w*MMA"}.get(arch, "HMMA")
    for name, kernel in hot(kernels).items():
        assert kernel.count(product), f"{name}: no {product}"


def test_kernels_of_gathered_keys():
    """What compiles are the kernels of the form that the names of the calls say."""
    several = compiled(90, torch.bfloat16, 64, "gathered, several segments")
    one = compiled(90, torch.bfloat16, 64, "gathered, one segment")
    gathering = {"live_keys_kernel", "gather_keys_kernel", "sum_slots_kernel"}
    assert gathering <= several.keys() & one.keys()
    assert "segment_keys_kernel" in several
    assert "segment_keys_kernel" not in one


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_operands_that_the_copy_engine_cannot_read(dim):
    """Tiles chosen for the copy engine must also fit where pointers are used instead."""
    kernels = compiled(90, torch.float16, dim, "pair bias", contiguous=False)
    require_fit(90, kernels)
    assert not any(kernel.count("UTMALDG") for kernel in kernels.values())


@pytest.mark.parametrize("dim", [64, 256])
def test_single_precision(dim):
    """One table for all families, so the smallest shared memory and the oldest GPU decide."""
    kernels = compiled(80, torch.float32, dim, "pair bias")
    require_fit(80, kernels)
    require_few_spills(kernels)
    for name, kernel in hot(kernels).items():
        assert kernel.count("FFMA"), name
        assert not kernel.count("HMMA"), f"{name}: products are rounded to tf32"
