"""Kernel times: averages of what a profiler says, and what kernels are for."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from bench import kernels

BACKENDS = Path(__file__).resolve().parents[2] / "backends"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("forward_kernel", kernels.ATTENTION),
        ("key_gradients_kernel", kernels.ATTENTION),
        ("gather_keys_kernel", kernels.PREPARATION),
        ("admit_kernel", kernels.PREPARATION),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", kernels.PREPARATION),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>", kernels.PREPARATION),
        ("Memset (Device)", kernels.PREPARATION),
        ("Memcpy DtoD (Device -> Device)", kernels.PREPARATION),
        ("flash_fwd_kernel", kernels.OTHER),
        ("not_my_forward_kernel", kernels.OTHER),
    ],
)
def test_kind_of_a_kernel(name, kind):
    assert kernels.kind(name) == kind


def test_every_kernel_of_an_attention_call_has_a_kind():
    """Those of the selection are a quantity of their own."""
    names = {
        name
        for file in BACKENDS.glob("triton/kernels/*.py")
        if file.stem != "selection"
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(encoding="utf-8"), re.M)
    }
    assert "forward_kernel" in names
    assert {name for name in names if kernels.kind(name) == kernels.OTHER} == set()


def event(key, us, count, device=DeviceType.CUDA):
    return SimpleNamespace(key=key, self_device_time_total=us, count=count, device_type=device)


def test_averages_over_calls():
    events = [
        event("short", 3.0, 3),
        event("forward_kernel", 30.0, 3),
        event("cudaLaunchKernel", 0.0, 6, DeviceType.CPU),
        event("aten::empty", 5.0, 3, DeviceType.CPU),
        event("x" * kernels.NAME_LENGTH + "a", 60.0, 6),
        event("x" * kernels.NAME_LENGTH + "b", 30.0, 3),
    ]
    found = kernels.per_call(events, 3)
    assert found == {
        "x" * kernels.NAME_LENGTH: {"us": 30.0, "launches": 3.0},
        "forward_kernel": {"us": 10.0, "launches": 1.0},
        "short": {"us": 1.0, "launches": 1.0},
    }
    assert next(iter(found)).startswith("x")
    assert kernels.by_kind(found) == {"attention": 10.0, "preparation": 0.0, "other": 31.0}
