"""Calls that break an E rule: the exception, its message, and that nothing is launched."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attn import (
    BlockMap,
    IntervalMask,
    dispatch,
    flash_sparse_attn_func,
    flash_sparse_attn_func_auto,
    flash_sparse_attn_varlen_func,
    flash_sparse_attn_with_kvcache_func,
)


def qkv(d=8, dtype=torch.float32, device="cpu"):
    """Small valid arguments."""
    sizes = ((1, 6, 4, d), (1, 7, 2, d), (1, 7, 2, d))
    return [torch.zeros(size, dtype=dtype, device=device) for size in sizes]


@pytest.fixture(autouse=True)
def _nothing_is_launched(monkeypatch):
    def launch(problem, name):
        raise AssertionError(f"{problem} reached a backend")

    monkeypatch.setattr(dispatch, "select", launch)


def ones(*shape):
    """A bool mask."""
    return torch.ones(shape, dtype=torch.bool)


OPTIONS = {
    "scale NaN": ({"softmax_scale": float("nan")}, ValueError, "E6"),
    "scale text": ({"softmax_scale": "1"}, TypeError, "E1"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "E6"),
    "softcap infinite": ({"softcap": float("inf")}, ValueError, "E6"),
    "causal int": ({"is_causal": 1}, TypeError, "E1"),
    "window negative": ({"window": (-1, 0)}, ValueError, "E6"),
    "window float": ({"window": (1.5, 0)}, TypeError, "E1"),
    "window int": ({"window": 5}, TypeError, "E1"),
    "sinks negative": ({"sinks": -2}, ValueError, "E6"),
    "mask short": ({"attn_mask": ones(1, 1, 6, 5)}, ValueError, "E5"),
    "mask heads": ({"attn_mask": ones(1, 3, 6, 7)}, ValueError, "E5"),
    "mask rank": ({"attn_mask": ones(6, 7)}, ValueError, "E2"),
    "mask float": ({"attn_mask": torch.ones(1, 1, 6, 7)}, TypeError, "E3"),
    "mask list": ({"attn_mask": "causal"}, TypeError, "E1"),
    "two masks": ({"attn_mask": (ones(1, 1, 6, 7), ones(1, 1, 6, 7))}, ValueError, "E8"),
    "intervals long": ({"attn_mask": IntervalMask.causal(6, 8)}, ValueError, "E5"),
    "map size": ({"attn_mask": BlockMap(ones(1, 1, 2, 2), (4, 2))}, ValueError, "E5"),
    "map block": ({"attn_mask": BlockMap(ones(1, 1, 2, 2), (0, 2))}, ValueError, "E5"),
    "bias dtype": ({"attn_bias": torch.zeros(1, 1, 1, 7).double()}, TypeError, "E3"),
    "bias shape": ({"attn_bias": torch.zeros(2, 1, 1, 7)}, ValueError, "E5"),
    "bias meta": ({"attn_bias": torch.zeros(1, 1, 1, 7, device="meta")}, ValueError, "E4"),
    "gates one": ({"gates": (torch.zeros(1, 6, 4),)}, TypeError, "E1"),
    "gates shape": ({"gates": (torch.zeros(1, 6, 2), torch.zeros(1, 7, 2))}, ValueError, "E2"),
    "gate name": (
        {"gates": (torch.zeros(1, 6, 4), torch.zeros(1, 7, 2)), "gate": "relu"},
        ValueError,
        "E6",
    ),
    "gate threshold alone": ({"gate_threshold": 0.5}, ValueError, "E8"),
    "threshold above 1": ({"softmax_threshold": 1.5}, ValueError, "E6"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name):
    keywords, error, rule = OPTIONS[name]
    with pytest.raises(error, match=rf"got .*expected .*\[rule {rule}\]"):
        flash_sparse_attn_func(*qkv(), **keywords)


def tensor_errors():
    """(label, q, k, v, error, rule)."""
    q, k, v = qkv()
    yield "not tensors", q.numpy(), k, v, TypeError, "E1"
    yield "rank", q[0], k, v, ValueError, "E2"
    yield "batch", q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), ValueError, "E2"
    yield "keys of v", q, k, v[:, :5], ValueError, "E2"
    yield "heads", q[:, :, :3], k, v, ValueError, "E2"
    yield "head dim", q[..., :4], k, v, ValueError, "E2"
    yield "integers", q.int(), k.int(), v.int(), TypeError, "E3"
    yield "mixed dtypes", q, k.half(), v, TypeError, "E3"
    yield "mixed devices", q, k.to("meta"), v, ValueError, "E4"
    yield "head dim 257", *qkv(257), ValueError, "E7"
    yield "head dim 0", *qkv(0), ValueError, "E2"


@pytest.mark.parametrize("case", list(tensor_errors()), ids=lambda case: case[0])
def test_tensors(case):
    _, q, k, v, error, rule = case
    with pytest.raises(error, match=rf"got .*expected .*\[rule {rule}\]"):
        flash_sparse_attn_func(q, k, v)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cpu_and_gpu_mixed():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"\[rule E4\]"):
        flash_sparse_attn_func(q.cuda(), k, v)


def test_packed_call_takes_no_query_dependent_bias():
    q, k, v = (x[0] for x in qkv())
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (6, 7))
    bias = torch.zeros(1, 1, 6, 7)
    with pytest.raises(ValueError, match=r"\[rule E8\]"):
        flash_sparse_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7, attn_bias=bias)
    with pytest.raises(TypeError, match=r"\[rule E3\]"):
        flash_sparse_attn_varlen_func(q, k, v, cu_q.long(), cu_k, 6, 7)
    with pytest.raises(ValueError, match=r"\[rule E2\]"):
        flash_sparse_attn_varlen_func(q, k, v, cu_q, torch.cat([cu_k, cu_k]), 6, 7)


def test_pages_need_lengths():
    q, k, v = qkv()
    table = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[rule E8\]"):
        flash_sparse_attn_with_kvcache_func(q, k, v, page_table=table)


def test_unknown_and_unavailable_backends():
    with pytest.raises(ValueError, match=r"E9"):
        flash_sparse_attn_func_auto(backend="metal")
    with pytest.raises(ImportError, match=r"'cuda' is unavailable: .*\[rule E9\]"):
        flash_sparse_attn_func_auto(backend="cuda")


@pytest.mark.parametrize("window_size", [0, -3])
def test_topk_window_size(window_size):
    with pytest.raises(ValueError, match=r"\[rule E6\]"):
        IntervalMask.topk(torch.randn(1, 1, 8), window_size)


def test_mask_constructors():
    with pytest.raises(TypeError, match=r"\[rule E3\]"):
        IntervalMask(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match=r"\[rule E5\]"):
        IntervalMask(torch.zeros(4).int(), torch.zeros(4).int())
    with pytest.raises(TypeError, match=r"\[rule E3\]"):
        IntervalMask.keys(torch.ones(1, 4), 4)
    with pytest.raises(TypeError, match=r"\[rule E3\]"):
        BlockMap(torch.ones(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"\[rule E6\]"):
        IntervalMask.window(4, 4, -1)
