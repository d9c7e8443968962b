"""What decoding compiles to; no GPU need be present."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest import mock

import pytest
import torch

from flash_sparse_attn.problem import AttentionOptions, Form
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

pytest.importorskip("triton", reason="compilation is Triton's")

from flash_sparse_attn.backends.triton.kernels import decode as kernels
from flash_sparse_attn.backends.triton.kernels import tuning

from .compiling import MULTIPROCESSORS, SHARED_MEMORY, Kernel, _sass, compiling_only

pytestmark = [
    pytest.mark.compile,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel is not compiled"
    ),
]

BATCH, HEADS_Q, HEADS_KV, SEQLEN = 2, 8, 2, 4096
HOT = ("attend_kernel", "scores_kernel", "kept_kernel")
FORMS = {
    "contiguous": {},
    "pages of 64": {"page": 64},
    "pages of 16": {"page": 16},
    "tested lists": {"listed": 1024},
    "long lists": {"listed": 4096},
}
BY_COPY_ENGINE = {
    ("contiguous", 64),
    ("contiguous", 128),
    ("pages of 64", 64),
    ("pages of 64", 128),
}


def compiled(
    arch: int,
    dtype: torch.dtype,
    dim: int,
    *,
    seqlen_q: int = 1,
    page: int = 0,
    listed: int = 0,
    options: dict | None = None,
    **terms: torch.Tensor,
) -> dict[str, Kernel]:
    """The kernels of a call, by name."""
    q = torch.zeros(BATCH, seqlen_q, HEADS_Q, dim, dtype=dtype)
    places = (BATCH * SEQLEN // page, page) if page else (BATCH, SEQLEN)
    k, v = (torch.zeros(*places, HEADS_KV, dim, dtype=dtype) for _ in range(2))
    terms["cache_seqlens"] = torch.zeros(BATCH, dtype=torch.int32)
    if page:
        terms["page_table"] = torch.zeros(BATCH, SEQLEN // page, dtype=torch.int32)
    if listed:
        terms["key_indices"] = torch.zeros(BATCH, HEADS_KV, listed, dtype=torch.int32)
    tensors = AttentionTensors(q, k, v, **terms)
    given = {"form": Form.CACHE, "softmax_scale": 0.1, "causal": True} | (options or {})
    problem = replace(describe(tensors, AttentionOptions(**given)), device="cuda", arch=arch)
    alike = mock.patch.object(tuning, "_multiprocessors", return_value=MULTIPROCESSORS)
    with alike, compiling_only(arch) as found:
        kernels.decode(problem, tensors)
    return {
        name: Kernel(name, kernel.metadata.shared, _sass(kernel.asm["cubin"]))
        for name, kernel in found
    }


def require_fit(arch: int, found: dict[str, Kernel]) -> None:
    shared = {name: x.shared for name, x in found.items() if x.shared > SHARED_MEMORY[arch]}
    assert not shared, f"of {SHARED_MEMORY[arch]} bytes of shared memory: {shared}"


def require_no_spills(found: dict[str, Kernel]) -> None:
    for name, kernel in found.items():
        if name in HOT:
            assert kernel.hot_loops, f"{name}: no loop with matrix products found"
            assert not any(loop.spills for loop in kernel.hot_loops), f"{name}: {kernel.hot_loops}"


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("form", FORMS)
def test_one_token(form, dim):
    """Shared memory fits, nothing is spilled, keys come by the copy engine or asynchronously."""
    found = compiled(90, torch.bfloat16, dim, **FORMS[form])
    require_fit(90, found)
    require_no_spills(found)
    attend = found["attend_kernel"]
    assert bool(attend.count("UTMALDG")) == ((form, dim) in BY_COPY_ENGINE)
    if form != "tested lists" and (form, dim) not in BY_COPY_ENGINE:
        assert attend.count("LDGSTS")
    assert ("sort_kernel" in found) == (form == "long lists")
    assert all(kernel.count("ACQBULK") for kernel in found.values()), "a kernel that does not wait"


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("seqlen_q", [1, 16])
def test_families(arch, dim, seqlen_q):
    found = compiled(arch, torch.bfloat16, dim, seqlen_q=seqlen_q)
    require_fit(arch, found)
    require_no_spills(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_term(dtype):
    """V7 and T1 with every other term; float64 too, whose products Triton restricts."""
    rows, heads = 4, HEADS_Q
    bound = torch.zeros(BATCH, HEADS_KV, SEQLEN, dtype=torch.int32)
    options = {
        "block_size_q": 16,
        "block_size_k": 64,
        "gate": "logsigmoid",
        "gate_threshold": 0.1,
        "softmax_threshold": 0.1,
        "softcap": 3.0,
        "window_left": 100,
        "sinks": 4,
    }
    found = compiled(
        90,
        dtype,
        64,
        seqlen_q=rows,
        page=16,
        options=options,
        mask=torch.ones(BATCH, heads, rows, SEQLEN, dtype=torch.bool),
        bias=torch.zeros(BATCH, heads, rows, SEQLEN, dtype=dtype),
        interval_start=bound,
        interval_end=bound,
        block_map=torch.ones(BATCH, heads, 1, SEQLEN // 64, dtype=torch.bool),
        gate_q=torch.zeros(BATCH, rows, heads, dtype=dtype),
        gate_k=torch.zeros(BATCH, SEQLEN, HEADS_KV, dtype=dtype),
    )
    assert {"highest_gates_kernel", "scores_kernel", "kept_kernel"} <= found.keys()
    require_fit(90, found)
