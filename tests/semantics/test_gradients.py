"""G1 and O2: autograd of the reference by finite differences, its closed form by autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flash_sparse_attn import reference

SQ, SK, HQ, HKV = 3, 5, 4, 2
NAMES = ("q", "k", "v", "bias", "gate_q", "gate_k")


def terms_by_name(rand, coin) -> dict[str, dict]:
    """One set of arguments for every optional term and every kind of broadcast."""
    gates = {"gate_q": rand(2, SQ, HQ), "gate_k": rand(2, SK, HKV)}
    kept = coin(2, HQ, SQ, SK)
    start = torch.arange(SK, dtype=torch.int32).remainder(3).expand(2, HKV, SK)
    return {
        "causal": {"causal": True},
        "window": {"window": (2, 1), "sinks": 1},
        "scale": {"softmax_scale": 0.9},
        "softcap": {"softcap": 1.3},
        "mask": {"mask": coin(2, HKV, SQ, SK)},
        "key_mask": {"mask": coin(1, 1, 1, SK)},
        "intervals": {"interval_start": start, "interval_end": start + 2},
        "blocks": {"block_map": coin(1, HQ, 2, 3), "block_size": (2, 2)},
        "bias": {"bias": rand(2, HQ, SQ, SK)},
        "key_bias": {"bias": rand(1, HKV, 1, SK)},
        "row_bias": {"bias": rand(2, 1, SQ, 1)},
        "one_bias": {"bias": rand(1, 1, 1, 1)},
        "gate": gates,
        "gate_identity": {**gates, "gate": "identity"},
        "gate_threshold": {**gates, "gate_threshold": 0.6},
        "kept": {"kept": kept},
    }


TERMS = tuple(terms_by_name(lambda *s: torch.zeros(s), lambda *s: torch.ones(s).bool()))
CASES = [*((name,) for name in TERMS), *itertools.combinations(TERMS, 2), ()]


def differentiable(q, k, v, terms) -> dict[str, torch.Tensor]:
    every = {"q": q, "k": k, "v": v, **terms}
    return {name: every[name] for name in NAMES if every.get(name) is not None}


def by_autograd(do, dlse, q, k, v, terms, only=NAMES) -> dict[str, torch.Tensor]:
    """Gradients of the reference by autograd, with only the inputs named requiring one."""
    inputs = differentiable(q, k, v, terms)
    inputs = {n: x.detach().clone().requires_grad_(n in only) for n, x in inputs.items()}
    rest = {name: x for name, x in terms.items() if name not in inputs}
    o, lse = reference.attention(**inputs, **rest)
    wanted = [name for name in inputs if name in only]
    pairs = [(out, grad) for out, grad in ((o, do), (lse, dlse)) if out.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)  # v has no part in lse
    grads = torch.autograd.grad(outputs, [inputs[name] for name in wanted], cotangents)
    return dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("case", CASES, ids="+".join)
def test_closed_form_equals_autograd(qkv, rand, coin, case):
    terms = {}
    available = terms_by_name(rand, coin)
    for name in case:
        terms |= available[name]
    q, k, v = qkv(seqlen_q=SQ, seqlen_k=SK)
    do, dlse = rand(2, SQ, HQ, 6), rand(2, HQ, SQ)
    want = by_autograd(do, dlse, q, k, v, terms)
    got = reference.attention_backward(do, dlse, q, k, v, **terms)
    assert list(got) == list(want)
    for name in want:
        assert got[name].shape == want[name].shape
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("seqlens", [(5, 3), (4, 4), (1, 6)])
def test_closed_form_equals_autograd_in_other_shapes(qkv, rand, seqlens):
    seqlen_q, seqlen_k = seqlens
    q, k, v = qkv(seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads_q=3, heads_kv=1, dim_v=2)
    terms = {"causal": True, "bias": rand(2, 3, 1, seqlen_k), "softcap": 2.0}
    do, dlse = rand(2, seqlen_q, 3, 2), rand(2, 3, seqlen_q)
    want = by_autograd(do, dlse, q, k, v, terms)
    got = reference.attention_backward(do, dlse, q, k, v, **terms)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-12)


def test_absent_output_gradients_are_zero(qkv, rand):
    q, k, v = qkv()
    do, dlse = rand(2, 5, 4, 6), rand(2, 4, 5)
    both = reference.attention_backward(do, dlse, q, k, v)
    o_alone = reference.attention_backward(do, None, q, k, v)
    lse_alone = reference.attention_backward(None, dlse, q, k, v)
    for name in both:
        torch.testing.assert_close(both[name], o_alone[name] + lse_alone[name])
    assert not lse_alone["v"].any()


@pytest.mark.parametrize(
    "case",
    [
        (),
        ("causal", "bias"),
        ("key_bias", "softcap", "key_mask"),
        ("gate", "scale", "softcap"),
        ("gate_identity", "row_bias", "mask"),
        ("gate_threshold", "intervals"),
        ("kept", "one_bias", "window"),
    ],
    ids="+".join,
)
def test_finite_differences(rand, coin, case):
    terms = {}
    for name in case:
        terms |= terms_by_name(rand, coin)[name]
    batch = 2
    q, k, v = rand(batch, SQ, HQ, 2), rand(batch, SK, HKV, 2), rand(batch, SK, HKV, 1)
    inputs = differentiable(q, k, v, terms)
    rest = {name: x for name, x in terms.items() if name not in inputs}

    def function(*values):
        o, lse = reference.attention(**dict(zip(inputs, values, strict=True)), **rest)
        return o, torch.where(lse == -math.inf, 0, lse)

    values = tuple(x.clone().requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_finite_differences_twice(rand):
    """The reference may be differentiated again: it is torch throughout."""
    values = tuple(rand(1, 2, 1, 2).requires_grad_() for _ in range(3))
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: reference.attention(q, k, v, causal=True, softcap=2.0),
        values,
        fast_mode=True,
    )


@pytest.mark.parametrize("only", NAMES)
def test_each_gradient_exists_on_its_own(qkv, rand, only):
    q, k, v = qkv()
    terms = {"bias": rand(1, 2, 1, 7), "gate_q": rand(2, 5, 4), "gate_k": rand(2, 7, 2)}
    do, dlse = rand(2, 5, 4, 6), rand(2, 4, 5)
    every = by_autograd(do, dlse, q, k, v, terms)
    alone = by_autograd(do, dlse, q, k, v, terms, only=(only,))
    assert list(alone) == [only]
    torch.testing.assert_close(alone[only], every[only])


def test_bias_gradient_of_one_row_sums_to_the_gradient_of_lse(qkv, rand):
    """sum_j ds_ij = dlse_i: a constant added to a row moves lse by as much and o not at all."""
    q, k, v = qkv()
    do, dlse, bias = rand(2, 5, 4, 6), rand(2, 4, 5), rand(2, 4, 5, 1)
    grad = reference.attention_backward(do, dlse, q, k, v, bias=bias)["bias"]
    torch.testing.assert_close(grad.squeeze(3), dlse)


def test_value_gradient_of_equal_scores_is_the_mean(qkv, rand):
    q, k, v = qkv(heads_kv=4)
    do = rand(2, 5, 4, 6)
    dv = reference.attention_backward(do, None, torch.zeros_like(q), k, v)["v"]
    torch.testing.assert_close(dv, (do.sum(1, keepdim=True) / 7).expand_as(dv))


@pytest.mark.parametrize("why", ["mask", "bias"])
def test_empty_rows_pass_no_gradient(qkv, rand, why):
    """O2, whether nothing is visible or every visible score is -inf, and through lse too."""
    q, k, v = qkv()
    bias, mask = rand(2, 4, 5, 7), torch.ones(2, 4, 5, 7, dtype=torch.bool)
    do, dlse = rand(2, 5, 4, 6), rand(2, 4, 5)
    full = {"bias": bias, "mask": mask, "gate_q": rand(2, 5, 4), "gate_k": rand(2, 7, 2)}
    empty = {name: x.clone() for name, x in full.items()}
    if why == "mask":
        empty["mask"][0, :, 2] = False
    else:
        empty["bias"][0, :, 2] = -math.inf
    do[0, 2], dlse[0, :, 2] = math.inf, math.nan
    for grads in (
        by_autograd(do, dlse, q, k, v, empty),
        reference.attention_backward(do, dlse, q, k, v, **empty),
    ):
        assert all(grad.isfinite().all() for grad in grads.values())
        assert not grads["q"][0, 2].any()
        assert not grads["bias"][0, :, 2].any()
        assert not grads["gate_q"][0, 2].any()
    do[0, 2], dlse[0, :, 2] = 0, 0
    without = reference.attention_backward(do, dlse, q, k, v, **full)
    for name in ("k", "v", "gate_k"):
        torch.testing.assert_close(grads[name][1], without[name][1])
        torch.testing.assert_close(grads[name][0], without[name][0])


def test_shared_bias_is_summed_in_float32(qkv, rand):
    """1024 (1.003 - 1) is 3.072; were ds bfloat16 before the sum, 1.003 would be 1 and this 0."""
    q, k, v = qkv(batch=1, seqlen_q=2048, seqlen_k=1, heads_q=1, heads_kv=1, dtype=torch.bfloat16)
    terms = {"bias": rand(1, 1, 1, 1, dtype=torch.bfloat16)}
    dlse = torch.tensor([1.003, -1.0]).repeat(1024).view(1, 1, 2048)
    do = torch.zeros(1, 2048, 1, 6, dtype=torch.bfloat16)
    want = torch.tensor(3.072).bfloat16().view(1, 1, 1, 1)
    for grads in (
        by_autograd(do, dlse, q, k, v, terms),
        reference.attention_backward(do, dlse, q, k, v, **terms),
    ):
        assert torch.equal(grads["bias"], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_dtype_of_their_argument(qkv, rand, dtype):
    q, k, v = qkv(dtype=dtype)
    terms = {
        "bias": rand(1, 2, 1, 7, dtype=torch.float32),
        "gate_q": rand(2, 5, 4, dtype=dtype),
        "gate_k": rand(2, 7, 2, dtype=torch.float32),
    }
    do, dlse = rand(2, 5, 4, 6, dtype=dtype), rand(2, 4, 5, dtype=torch.float32)
    want = by_autograd(do, dlse, q, k, v, terms)
    got = reference.attention_backward(do, dlse, q, k, v, **terms)
    for name, x in differentiable(q, k, v, terms).items():
        assert got[name].dtype == want[name].dtype == x.dtype
        torch.testing.assert_close(got[name], want[name])


def test_one_tensor_as_q_k_and_v(rand):
    x = rand(1, 4, 2, 3).requires_grad_()
    o, lse = reference.attention(x, x, x, causal=True)
    do, dlse = rand(1, 4, 2, 3), rand(1, 2, 4)
    (got,) = torch.autograd.grad((o, lse), x, (do, dlse))
    parts = reference.attention_backward(do, dlse, x, x, x, causal=True)
    torch.testing.assert_close(got, parts["q"] + parts["k"] + parts["v"])
