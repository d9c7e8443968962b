"""What the kernels of M5 compile to on each family of GPUs; no GPU need be present."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="compilation is Triton's")

from flash_sparse_attn.backends import triton as backend

from .compiling import SHARED_MEMORY, Kernel, _sass, compiling_only

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
    ),
]

LENGTH = 16384
"""Several segments."""


def compiled(
    arch: int,
    dtype: torch.dtype = torch.float32,
    window_size: int = 1024,
    causal: bool = True,
    packed: bool = False,
) -> dict[str, Kernel]:
    """The kernels of a call, in the order of their launches."""
    scores = torch.zeros(1, LENGTH, 2, dtype=dtype).transpose(1, 2)
    keep = torch.ones(1, 1, LENGTH, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 5000, LENGTH], dtype=torch.int32) if packed else None
    with compiling_only(arch) as launches:
        backend.topk_intervals(scores, LENGTH, window_size, causal, keep, cu_seqlens)
    return {
        name: Kernel(name, kernel.metadata.shared, _sass(kernel.asm["cubin"]))
        for name, kernel in launches
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_causal(arch, dtype, packed):
    """Four launches; every register is kept, and lists are read 16 bytes at a time."""
    kernels = compiled(arch, dtype, packed=packed)
    assert list(kernels) == ["grade_kernel", "inherit_kernel", "cut_kernel", "leave_kernel"]
    for name, kernel in kernels.items():
        assert kernel.shared <= 8192, name
        assert not kernel.count("LDL") + kernel.count("STL"), f"{name} spills registers"
        assert kernel.count(r"LDG\.E\.128"), name


@pytest.mark.parametrize(
    ("window_size", "causal", "launches"), [(1024, False, 2), (LENGTH, True, 1), (LENGTH, False, 1)]
)
def test_launches_are_few(window_size, causal, launches):
    for packed in (False, True):
        kernels = compiled(90, window_size=window_size, causal=causal, packed=packed)
        assert len(kernels) == launches
