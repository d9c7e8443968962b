"""`compat`: the predecessor's names and conventions on the public API."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flash_sparse_attn import compat, flash_sparse_attn_func, get_available_backends
from flash_sparse_attn.compat import flash_dmattn_func, flash_dmattn_func_auto

B, SQ, SK, HQ, HKV, D = 2, 5, 7, 4, 2, 8


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, SQ, HQ, D), torch.randn(B, SK, HKV, D), torch.randn(B, SK, HKV, D)


def test_scale_is_softmax_scale(qkv) -> None:
    expected = flash_sparse_attn_func(*qkv, softmax_scale=0.3, is_causal=True)
    fn = flash_dmattn_func_auto()
    assert torch.equal(fn(*qkv, scale=0.3, is_causal=True), expected)
    assert torch.equal(fn(*qkv, softmax_scale=0.3, is_causal=True), expected)
    assert torch.equal(fn(*qkv, None, None, 0.3, True), expected)


def test_defaults_are_those_of_the_api(qkv) -> None:
    q, k, v = qkv
    assert torch.equal(flash_dmattn_func(query=q, key=k, value=v), flash_sparse_attn_func(*qkv))
    nones = dict.fromkeys(
        ("attn_mask", "attn_bias", "scale", "is_causal", "softcap", "deterministic")
    )
    assert torch.equal(flash_dmattn_func(*qkv, **nones), flash_sparse_attn_func(*qkv))


def test_softcap_is_passed_on(qkv) -> None:
    expected = flash_sparse_attn_func(*qkv, softcap=0.5)
    assert not torch.equal(expected, flash_sparse_attn_func(*qkv))
    assert torch.equal(flash_dmattn_func(*qkv, softcap=0.5), expected)


@pytest.mark.parametrize(("given", "passed"), [(None, True), (True, True), (False, False)])
def test_the_backward_is_deterministic_unless_told_otherwise(
    qkv, monkeypatch: pytest.MonkeyPatch, given: bool | None, passed: bool
) -> None:
    seen = {}
    monkeypatch.setattr(
        compat, "flash_sparse_attn_func", lambda *_, **options: seen.update(options)
    )
    flash_dmattn_func(*qkv, deterministic=given)
    assert seen["deterministic"] is passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("heads", [1, HKV, HQ])
def test_numbers_attend_where_they_are_not_zero(qkv, heads: int, dtype: torch.dtype) -> None:
    keep = torch.rand(B, heads, SQ, SK) > 0.5
    expected = flash_sparse_attn_func(*qkv, attn_mask=keep)
    assert torch.equal(flash_dmattn_func(*qkv, attn_mask=keep.to(dtype)), expected)
    assert torch.equal(flash_dmattn_func(*qkv, attn_mask=keep), expected)


def test_any_number_but_zero_attends(qkv) -> None:
    mask = torch.tensor([0.0, -0.0, 0.5, -1.0, 2.0, math.inf, 1e-30]).view(1, 1, 1, SK)
    keep = torch.tensor([False, False, True, True, True, True, True]).view(1, 1, 1, SK)
    expected = flash_sparse_attn_func(*qkv, attn_mask=keep)
    assert torch.equal(flash_dmattn_func(*qkv, attn_mask=mask), expected)


@pytest.mark.parametrize("heads", [1, HKV, HQ])
def test_mask_and_bias_may_leave_out_the_row_dim(qkv, heads: int) -> None:
    keep, bias = torch.rand(B, heads, SK) > 0.3, torch.randn(B, heads, SK)
    expected = flash_sparse_attn_func(*qkv, attn_mask=keep[:, :, None], attn_bias=bias[:, :, None])
    assert torch.equal(flash_dmattn_func(*qkv, attn_mask=keep.float(), attn_bias=bias), expected)


def test_gradients_arrive_in_the_shapes_given(qkv) -> None:
    inputs = [x.double().requires_grad_() for x in (*qkv, torch.randn(B, HKV, SK))]
    keep = (torch.rand(B, HKV, SK) > 0.3).double()
    q, k, v, bias = inputs
    got = flash_dmattn_func_auto()(q, k, v, keep, bias, scale=0.4, is_causal=True)
    mask = keep[:, :, None].bool()
    expected = flash_sparse_attn_func(q, k, v, mask, bias[:, :, None], 0.4, True)
    do = torch.randn_like(got)
    gradients = [torch.autograd.grad(o, inputs, do) for o in (got, expected)]
    for x, mine, theirs in zip(inputs, *gradients, strict=True):
        assert mine.shape == x.shape
        assert mine.abs().max() > 0
        assert torch.equal(mine, theirs)


def test_a_named_backend_is_that_one(qkv) -> None:
    expected = flash_sparse_attn_func(*qkv, backend="reference")
    assert torch.equal(flash_dmattn_func_auto("reference")(*qkv), expected)
    assert compat.get_available_backends() == get_available_backends()


def test_the_name_flex_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"'flex'.*E9"):
        flash_dmattn_func_auto(backend="flex")


@pytest.mark.parametrize(
    ("options", "exception", "words"),
    [
        ({"scale": 0.1, "softmax_scale": 0.1}, ValueError, "softmax_scale.*E8"),
        ({"return_attn_probs": True}, NotImplementedError, "return_attn_probs.*return_lse.*E9"),
        ({"attn_mask": [1.0]}, TypeError, "attn_mask.*E1"),
        ({"attn_bias": 1.0}, TypeError, "attn_bias.*E1"),
        ({"attn_mask": torch.ones(B, SK)}, ValueError, "mask.*E2"),
        ({"attn_bias": torch.zeros(B, HQ, SK + 1)}, ValueError, "bias.*E5"),
        ({"attn_bias": torch.zeros(B, HQ, SK).half()}, TypeError, "bias.*float16.*E3"),
    ],
    ids=str,
)
def test_bad_calls_say_what_is_wrong(
    qkv, options: dict, exception: type[Exception], words: str
) -> None:
    with pytest.raises(exception, match=words):
        flash_dmattn_func(*qkv, **options)
