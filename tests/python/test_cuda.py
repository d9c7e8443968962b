"""What only a GPU shows: graph capture without synchronisation, compile and opcheck on device."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attn import (
    IntervalMask,
    flash_sparse_attn_func,
    get_available_backends,
    registry,
)
from flash_sparse_attn.problem import OPTION_NAMES, AttentionOptions
from flash_sparse_attn.registry import REFERENCE
from flash_sparse_attn.tensors import TENSOR_NAMES, AttentionTensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS = [name for name in get_available_backends() if name != REFERENCE]


def make(length=300, dtype=torch.bfloat16, grad=True):
    """q, k, v, bias and scores on the GPU."""
    torch.manual_seed(0)
    q = torch.randn(2, length, 4, 64, device="cuda", dtype=dtype, requires_grad=grad)
    k, v = (
        torch.randn(2, length, 2, 64, device="cuda", dtype=dtype, requires_grad=grad)
        for _ in range(2)
    )
    bias = torch.randn(2, 2, 1, length, device="cuda", dtype=dtype, requires_grad=grad)
    return q, k, v, bias, torch.randn(2, 2, length, device="cuda")


def masks(scores):
    """Every form of mask that a kernel may meet, made on the device."""
    length = scores.shape[-1]
    dense = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").tril()
    return {"none": None, "intervals": IntervalMask.topk(scores, 64), "dense": dense}


@pytest.mark.parametrize("kind", ["none", "intervals", "dense"])
@pytest.mark.parametrize("backend", KERNELS)
def test_graph_capture_and_replay(backend, kind):
    q, k, v, bias, scores = make()
    mask = masks(scores)[kind]
    inputs = (q, k, v, bias)

    def step():
        out = flash_sparse_attn_func(q, k, v, mask, bias, is_causal=True, backend=backend)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step()
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    got = [tensor.clone() for tensor in captured]
    for a, b in zip(got, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_selection_is_captured_too(backend):
    q, k, v, bias, scores = make(grad=False)
    side = torch.cuda.Stream()

    def step():
        mask = IntervalMask.topk(scores, 64)
        return flash_sparse_attn_func(q, k, v, mask, bias, is_causal=True, backend=backend)

    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = step()
    scores.copy_(torch.randn_like(scores))
    graph.replay()
    torch.testing.assert_close(out, step(), rtol=0, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_compiled_equals_eager(backend):
    q, k, v, bias, scores = make()

    def step(q, k, v, bias):
        mask = IntervalMask.topk(scores, 64)
        return flash_sparse_attn_func(q, k, v, mask, bias, is_causal=True, backend=backend) * 2

    compiled = torch.compile(step, fullgraph=True)
    out, want = compiled(q, k, v, bias), step(q, k, v, bias)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    inputs = (q, k, v, bias)
    got = torch.autograd.grad(out.float().sum(), inputs)
    for a, b in zip(got, torch.autograd.grad(want.float().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    q, k, v, bias, scores = make(80)
    mask = IntervalMask.topk(scores, 20)
    tensors = AttentionTensors(q, k, v, bias=bias, interval_start=mask.start, interval_end=mask.end)
    options = AttentionOptions(softmax_scale=0.125, causal=True)
    given = [getattr(tensors, name) for name in TENSOR_NAMES]
    values = [getattr(options, name) for name in OPTION_NAMES]
    operator = torch.ops.flash_sparse_attn.forward.default
    results = torch.library.opcheck(operator, [*given, *values, backend, "q,k,v,bias"])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast(backend):
    q, k, v, _, _ = make(dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.float16):
        out = flash_sparse_attn_func(q, k, v, is_causal=True, backend=backend)
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs_are_not_copied(backend):
    q, k, v, _, _ = make(2048, grad=False)
    qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    shared = k[:1].expand(2, -1, -1, -1)
    flash_sparse_attn_func(*qkv, backend=backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = flash_sparse_attn_func(qkv[0], shared, qkv[2], backend=backend)
    lse_bytes = 2 * 4 * 2048 * 4
    assert torch.cuda.max_memory_allocated() - before < out.nbytes + lse_bytes + k.nbytes // 4
    want = flash_sparse_attn_func(q, shared.contiguous(), v, backend=backend)
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_a_problem_that_no_kernel_serves_warns_and_runs_the_reference(monkeypatch):
    for name in KERNELS:
        monkeypatch.setattr(registry.load(name), "unsupported", lambda problem: ["not this one"])
    q, k, v, _, _ = make(length=41, grad=False)
    with pytest.warns(UserWarning, match="not this one"):
        out = flash_sparse_attn_func(q, k, v, softmax_scale=0.127)
    assert out.shape == q.shape
