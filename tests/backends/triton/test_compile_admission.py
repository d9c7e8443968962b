"""What the admission of a token compiles to on each family of GPUs; no GPU need be present."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="compilation is Triton's")

from flash_sparse_attn.backends.triton.kernels import admission

from flash_sparse_attn.streaming import DynamicMaskCache

from .compiling import SHARED_MEMORY, Kernel, _sass, compiling_only

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
    ),
]


def compiled(arch: int, dtype: torch.dtype, window_size: int, padded: bool) -> Kernel:
    """The one kernel that a call launches."""
    cache = DynamicMaskCache(2, window_size, 8, 128, dtype=dtype)
    state = cache.key, cache.value, cache.scores, cache.position, cache._held, cache._seqlen
    new = torch.zeros(2, 1, 8, 128, dtype=dtype)
    keep = torch.ones(2, 1, dtype=torch.bool) if padded else None
    with compiling_only(arch) as launches:
        admission.admit(*state, new, new, torch.zeros(2, 8, 1), keep)
    ((name, kernel),) = launches
    return Kernel(name, kernel.metadata.shared, _sass(kernel.asm["cubin"]))


@pytest.mark.parametrize(
    ("dtype", "window_size", "padded"),
    [
        (torch.bfloat16, 1024, False),
        (torch.bfloat16, 1000, True),
        (torch.float32, 16384, False),
        (torch.float64, 1, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_one_launch_that_keeps_its_registers(arch, dtype, window_size, padded):
    kernel = compiled(arch, dtype, window_size, padded)
    assert kernel.name == "admit_kernel"
    assert kernel.shared <= 1024
    assert not kernel.count("LDL") + kernel.count("STL"), "spills registers"
    # Scores and positions are read 16 bytes at a time where they can be.
    assert window_size % 16 or kernel.count(r"LDG\.E\.128") >= 2
