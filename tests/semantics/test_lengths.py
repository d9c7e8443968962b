"""V6: packed and cache forms against a dense call a sequence, and against masks."""

from __future__ import annotations

import math

import pytest
import torch

from flash_sparse_attn import reference

HQ, HKV, DIM, DIM_V = 4, 2, 3, 6
LENGTHS_Q, LENGTHS_K = [3, 0, 4, 2, 1], [5, 2, 2, 0, 1]
SPARE_Q, SPARE_K = 2, 3
TQ, TK = sum(LENGTHS_Q) + SPARE_Q, sum(LENGTHS_K) + SPARE_K


def boundaries(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


CU = {"cu_seqlens_q": boundaries(LENGTHS_Q), "cu_seqlens_k": boundaries(LENGTHS_K)}


def packed_terms(rand, heads: int, keys: int) -> dict:
    start = torch.arange(TK, dtype=torch.int32).remainder(3).expand(1, HKV, TK) - 1
    return {
        "causal": True,
        "softcap": 2.0,
        "bias": rand(1, heads, 1, keys),
        "interval_start": start,
        "interval_end": start + 4,
        "gate_q": rand(TQ, HQ),
        "gate_k": rand(TK, HKV),
        "gate_threshold": 0.3,
    }


def packed_qkv(rand, **kwargs):
    return (
        rand(TQ, HQ, DIM, **kwargs),
        rand(TK, HKV, DIM, **kwargs),
        rand(TK, HKV, DIM_V, **kwargs),
    )


def sequence(terms: dict, b: int) -> tuple[slice, slice, dict]:
    """Rows, keys and terms of sequence b, cut by hand."""
    rows = slice(*CU["cu_seqlens_q"][b : b + 2].tolist())
    keys = slice(*CU["cu_seqlens_k"][b : b + 2].tolist())
    own = dict(terms)
    for name in ("interval_start", "interval_end"):
        own[name] = terms[name][..., keys]
    own["bias"] = terms["bias"].expand(1, -1, 1, TK)[..., keys]
    own["gate_q"], own["gate_k"] = terms["gate_q"][None, rows], terms["gate_k"][None, keys]
    return rows, keys, own


@pytest.mark.parametrize(("heads", "keys"), [(HKV, TK), (HQ, TK), (1, TK), (HQ, 1)])
def test_packed_equals_a_loop_over_sequences(rand, heads, keys):
    q, k, v = packed_qkv(rand)
    terms = packed_terms(rand, heads, keys)
    o, lse = reference.attention_packed(q, k, v, **CU, **terms)
    assert o.shape == (TQ, HQ, DIM_V)
    assert lse.shape == (HQ, TQ)
    for b in range(len(LENGTHS_Q)):
        own_rows, own_keys, own = sequence(terms, b)
        args = q[None, own_rows], k[None, own_keys], v[None, own_keys]
        want_o, want_lse = reference.attention(*args, **own)
        torch.testing.assert_close(o[own_rows], want_o[0])
        torch.testing.assert_close(lse[:, own_rows], want_lse[0])
    assert not o[-SPARE_Q:].any(), "rows past the last boundary are empty"
    assert (lse[:, -SPARE_Q:] == -math.inf).all()


@pytest.mark.parametrize(("heads", "keys"), [(HKV, TK), (HQ, TK), (1, TK), (HQ, 1)])
def test_packed_closed_form_equals_autograd(rand, heads, keys):
    q, k, v = packed_qkv(rand)
    terms = packed_terms(rand, heads, keys)
    do, dlse = rand(TQ, HQ, DIM_V), rand(HQ, TQ)
    inputs = {"q": q, "k": k, "v": v} | {n: terms.pop(n) for n in ("bias", "gate_q", "gate_k")}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    out = reference.attention_packed(**inputs, **CU, **terms)
    want = torch.autograd.grad(out, list(inputs.values()), (do, dlse))
    do[-SPARE_Q:] = math.nan  # rows of no sequence
    got = reference.attention_packed_backward(do, dlse, **inputs, **CU, **terms)
    assert list(got) == list(inputs)
    for name, grad in zip(inputs, want, strict=True):
        torch.testing.assert_close(got[name], grad, rtol=1e-11, atol=1e-12)
    for name in ("k", "v", "gate_k"):
        assert not got[name][-SPARE_K:].any(), "keys past the last boundary have gradient 0"


def test_packed_bias_is_summed_over_sequences_in_float32(rand):
    """As the batched sum: two sequences whose parts differ by less than a bfloat16 step."""
    q, k, v = (rand(2, 1, DIM, dtype=torch.bfloat16) for _ in range(3))
    bias = rand(1, 1, 1, 1, dtype=torch.bfloat16).requires_grad_()
    cu = torch.tensor([0, 1, 2], dtype=torch.int32)
    dlse, do = torch.tensor([[1.003, -1.0]]), torch.zeros(2, 1, DIM, dtype=torch.bfloat16)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "bias": bias}
    _, lse = reference.attention_packed(q, k, v, **options)
    (by_autograd,) = torch.autograd.grad(lse, bias, dlse)
    closed = reference.attention_packed_backward(do, dlse, q, k, v, **options)["bias"]
    want = (dlse[0, 0] - 1).bfloat16().view(1, 1, 1, 1)
    assert torch.equal(by_autograd, want)
    assert torch.equal(closed, want)


def test_packed_replays_the_kept_set_of_each_sequence(rand, coin):
    q, k, v = packed_qkv(rand)
    kept = [coin(1, HQ, a, b) for a, b in zip(LENGTHS_Q, LENGTHS_K, strict=True)]
    o, _ = reference.attention_packed(q, k, v, **CU, kept=kept)
    rows, keys = slice(3, 7), slice(7, 9)
    args = q[None, rows], k[None, keys], v[None, keys]
    torch.testing.assert_close(o[rows], reference.attention(*args, mask=kept[2])[0][0])
    do = rand(TQ, HQ, DIM_V)
    got = reference.attention_packed_backward(do, None, q, k, v, **CU, kept=kept)
    want = reference.attention_backward(do[None, rows], None, *args, mask=kept[2])
    torch.testing.assert_close(got["k"][keys], want["k"][0])


@pytest.mark.parametrize("name", ["mask", "block_map", "bias"])
def test_packed_refuses_what_depends_on_row_and_key(rand, name):
    terms = {name: torch.ones(1, 1, 2, 2, dtype=torch.bool)}
    if name == "block_map":
        terms["block_size"] = (9, 9)
    with pytest.raises(ValueError, match=rf"{name}.*E8"):
        reference.attention_packed(*packed_qkv(rand), **CU, **terms)


BATCH, CAPACITY, PAGE = 3, 8, 2
CACHED = torch.tensor([5, 0, 8], dtype=torch.int32)
INDICES = torch.tensor([[0, 4, 4, -1], [7, 1, -1, 3]], dtype=torch.int32)


def cache_terms(rand, coin, heads: int, batch: int) -> dict:
    start = torch.arange(CAPACITY, dtype=torch.int32).remainder(2).expand(batch, HKV, CAPACITY)
    return {
        "causal": True,
        "window": (3, 0),
        "sinks": 1,
        "mask": coin(batch, heads, 3, CAPACITY),
        "bias": rand(1, heads, 1, CAPACITY),
        "interval_start": start,
        "interval_end": start + 2,
        "block_map": coin(batch, 1, 2, 2),
        "block_size": (2, 4),
        "gate_q": rand(BATCH, 3, HQ),
        "gate_k": rand(BATCH, CAPACITY, HKV),
    }


def cache(rand):
    return (
        rand(BATCH, 3, HQ, DIM),
        rand(BATCH, CAPACITY, HKV, DIM),
        rand(BATCH, CAPACITY, HKV, DIM_V),
    )


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("heads", [1, HKV, HQ])
@pytest.mark.parametrize("indexed", [False, True])
def test_cache_equals_dense_calls_of_each_length(rand, coin, heads, batch, indexed):
    q, k, v = cache(rand)
    terms = cache_terms(rand, coin, heads, batch)
    indices = INDICES.expand(BATCH, -1, -1) if indexed else None
    o, lse = reference.attention_cached(q, k, v, cache_seqlens=CACHED, key_indices=indices, **terms)
    for b, length in enumerate(CACHED.tolist()):
        keys, one = slice(0, length), slice(b, b + 1) if batch > 1 else slice(None)
        own = dict(terms)
        mask = terms["mask"][one, ..., keys].repeat_interleave(HQ // heads, 1)
        if indexed:
            for head, listed in ((0, [0, 4]), (1, [1, 3, 7])):
                unlisted = [j for j in range(length) if j not in listed]
                mask[:, 2 * head : 2 * head + 2, :, unlisted] = False
        own |= {"mask": mask, "bias": terms["bias"][..., keys]}
        own["block_map"] = terms["block_map"][one]
        for name in ("interval_start", "interval_end"):
            own[name] = terms[name][one, :, keys]
        own |= {"gate_q": terms["gate_q"][b : b + 1], "gate_k": terms["gate_k"][b : b + 1, keys]}
        args = q[b : b + 1], k[b : b + 1, keys], v[b : b + 1, keys]
        want_o, want_lse = reference.attention(*args, **own)
        torch.testing.assert_close(o[b], want_o[0])
        torch.testing.assert_close(lse[b], want_lse[0])
    assert not o[1].any(), "a cache without keys gives empty rows"


def test_one_mask_for_the_heads_and_another_list_for_each(rand):
    q, k, v = cache(rand)
    mask = torch.ones(1, 1, 1, CAPACITY, dtype=torch.bool)
    mask[..., 4] = False
    indices = INDICES.expand(BATCH, -1, -1)
    o, _ = reference.attention_cached(q, k, v, key_indices=indices, mask=mask)
    only = torch.zeros(1, HKV, 1, CAPACITY, dtype=torch.bool)
    only[0, 0, 0, [0]] = only[0, 1, 0, [1, 3, 7]] = True
    torch.testing.assert_close(o, reference.attention(q, k, v, mask=only)[0])


def test_pages_equal_the_contiguous_cache_and_hide_the_rest(rand, coin):
    """NaN in unused pages and past the lengths, and unused entries of the table, are never read."""
    q, k, v = cache(rand)
    terms = cache_terms(rand, coin, HKV, BATCH)
    options = {"cache_seqlens": CACHED, "key_indices": INDICES.expand(BATCH, -1, -1), **terms}
    want = reference.attention_cached(q, k, v, **options)

    table = torch.full((BATCH, CAPACITY // PAGE), -(10**6), dtype=torch.int32)
    pages_k = torch.full((20, PAGE, HKV, DIM), math.nan, dtype=torch.float64)
    pages_v = torch.full((20, PAGE, HKV, DIM_V), math.nan, dtype=torch.float64)
    free = iter([17, 3, 11, 0, 8, 19, 5])
    for b, length in enumerate(CACHED.tolist()):
        for j in range(length):
            if j % PAGE == 0:
                table[b, j // PAGE] = next(free)
            pages_k[table[b, j // PAGE], j % PAGE] = k[b, j]
            pages_v[table[b, j // PAGE], j % PAGE] = v[b, j]
    got = reference.attention_cached(q, pages_k, pages_v, page_table=table, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])

    unlisted = [j for j in range(CAPACITY) if j not in (0, 1, 3, 4, 7)]
    k[:, unlisted] = v[:, unlisted] = math.nan
    k[0, 5:] = v[0, 5:] = math.nan
    again = reference.attention_cached(q, k, v, **options)
    assert torch.equal(again[0], want[0])
    assert torch.equal(again[1], want[1])


def test_full_cache_is_plain_attention(rand):
    q, k, v = cache(rand)
    for options in ({}, {"cache_seqlens": torch.full((BATCH,), CAPACITY, dtype=torch.int32)}):
        got = reference.attention_cached(q, k, v, causal=True, **options)
        want = reference.attention(q, k, v, causal=True)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1], want[1])


def test_decoding_step_by_step_equals_one_pass(rand):
    """Each token as one row over a cache that grows sees what its row of a causal call sees."""
    q, k, v = rand(1, 6, HQ, DIM), rand(1, 6, HKV, DIM), rand(1, 6, HKV, DIM_V)
    want, _ = reference.attention(q, k, v, causal=True, window=(3, 0), sinks=1)
    for i in range(6):
        length = torch.tensor([i + 1], dtype=torch.int32)
        step, _ = reference.attention_cached(
            q[:, i : i + 1], k, v, cache_seqlens=length, causal=True, window=(3, 0), sinks=1
        )
        torch.testing.assert_close(step[:, 0], want[:, i])


def test_pages_need_lengths(rand):
    q, k, v = cache(rand)
    with pytest.raises(ValueError, match="E8"):
        reference.attention_cached(q, k, v, page_table=torch.zeros(BATCH, 1, dtype=torch.int32))
