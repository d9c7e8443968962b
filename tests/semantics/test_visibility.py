"""V1 to V5 and V7 against the rules' sentences evaluated pair by pair, and M1 to M4 against V."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from flash_sparse_attn.reference import visibility

from flash_sparse_attn import reference

SIZES = [(5, 5), (3, 7), (7, 3), (1, 6), (6, 1)]


def pairs(seqlen_q: int, seqlen_k: int, sees) -> torch.Tensor:
    """bool [Sq, Sk] of sees(i, j, p_i)."""
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    for i, j in itertools.product(range(seqlen_q), range(seqlen_k)):
        mask[i, j] = sees(i, j, i + seqlen_k - seqlen_q)
    return mask


def visible(seqlen_q: int, seqlen_k: int, **terms) -> torch.Tensor:
    """bool [Sq, Sk] of the reference, for one head."""
    q, k = torch.zeros(1, seqlen_q, 1, 2), torch.zeros(1, seqlen_k, 1, 2)
    return visibility.visible_pairs(q, k, reference.Terms(**terms))[0, 0]


def dense(intervals: tuple[torch.Tensor, torch.Tensor], seqlen_q: int) -> torch.Tensor:
    for x in intervals:
        assert x.dtype == torch.int32
    return visibility.intervals(*intervals, seqlen_q)


def in_window(left: int | None, right: int | None, sinks: int):
    def sees(i, j, p):
        if j < sinks:
            return True
        return (left is None or j >= p - left) and (right is None or j <= p + right)

    return sees


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
def test_causal(seqlen_q, seqlen_k):
    want = pairs(seqlen_q, seqlen_k, lambda i, j, p: j <= p)
    assert torch.equal(visible(seqlen_q, seqlen_k, causal=True), want)
    intervals = reference.causal_intervals(seqlen_q, seqlen_k)
    assert torch.equal(dense(intervals, seqlen_q)[0, 0], want)
    assert want[-1].all(), "the last row is aligned with the last key"


@pytest.mark.parametrize("sinks", [0, 1, 2])
@pytest.mark.parametrize("right", [None, 0, 1, 9])
@pytest.mark.parametrize("left", [None, 0, 2, 9])
def test_window_and_its_intervals(left, right, sinks):
    for seqlen_q, seqlen_k in SIZES:
        if (left, right) == (None, None):
            want = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
        else:
            want = pairs(seqlen_q, seqlen_k, in_window(left, right, sinks))
        got = visible(seqlen_q, seqlen_k, window=(left, right), sinks=sinks)
        assert torch.equal(got, want)
        intervals = reference.window_intervals(seqlen_q, seqlen_k, left, right, sinks)
        assert torch.equal(dense(intervals, seqlen_q)[0, 0], want)


def test_sinks_do_not_break_causality():
    want = pairs(6, 6, lambda i, j, p: j <= p and in_window(1, 0, 3)(i, j, p))
    assert torch.equal(visible(6, 6, causal=True, window=(1, 0), sinks=3), want)


def test_intervals_mean_what_the_inequality_says():
    start = torch.tensor([0, -3, 2, 4, 1, 9], dtype=torch.int32)
    end = torch.tensor([5, 2, 9, 3, 1, 12], dtype=torch.int32)
    want = pairs(5, 6, lambda i, j, p: start[j] <= i < end[j])
    got = visible(5, 6, interval_start=start[None, None], interval_end=end[None, None])
    assert torch.equal(got, want)


@pytest.mark.parametrize("block_size", [(1, 1), (2, 3), (4, 2), (9, 9)])
def test_block_map(coin, block_size):
    rows, keys = block_size
    block_map = coin(1, 1, -(-5 // rows), -(-7 // keys))
    want = pairs(5, 7, lambda i, j, p: block_map[0, 0, i // rows, j // keys])
    assert torch.equal(visible(5, 7, block_map=block_map, block_size=block_size), want)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_conjunction_over_batch_and_heads(coin, batch, heads):
    """V1, V3, V4 and V5 together, each shared over batch and heads or not."""
    mask, block_map = coin(batch, heads, 5, 1), coin(1, heads, 3, 3)
    kv = min(heads, 2)
    start = torch.randint(0, 3, (batch, kv, 7), dtype=torch.int32)
    end = torch.randint(2, 6, (batch, kv, 7), dtype=torch.int32)
    terms = reference.Terms(
        causal=True,
        mask=mask,
        block_map=block_map,
        block_size=(2, 3),
        interval_start=start,
        interval_end=end,
    )
    got = visibility.visible_pairs(torch.zeros(2, 5, 4, 2), torch.zeros(2, 7, 2, 2), terms)
    for b, h in itertools.product(range(2), range(4)):
        own, own_b, own_kv = h * heads // 4, b % batch, h * kv // 4

        def sees(i, j, p, own=own, own_b=own_b, own_kv=own_kv):
            return (
                j <= p
                and mask[own_b, own, i, 0]
                and block_map[0, own, i // 2, j // 3]
                and start[own_b, own_kv, j] <= i < end[own_b, own_kv, j]
            )

        assert torch.equal(got[b, h], pairs(5, 7, sees))


@pytest.mark.parametrize("gate", ["logsigmoid", "identity"])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("sign", ["both", "negative"])
def test_gate_threshold(rand, coin, gate, threshold, sign):
    """V7: relative to the best gate among the keys that the other rules leave visible."""
    gate_q, gate_k, mask, scale = rand(1, 5, 1), rand(1, 7, 1), coin(1, 1, 5, 7), 0.8
    if sign == "negative":  # the gates of hidden keys, were they read as 0, would be the best
        gate_q, gate_k = gate_q.abs(), -gate_k.abs()
    value = torch.nn.functional.logsigmoid if gate == "logsigmoid" else torch.clone
    g = scale * value(gate_q[0] * gate_k[0].T)
    q, k = torch.zeros(1, 5, 1, 2).double(), torch.zeros(1, 7, 1, 2).double()
    terms = reference.Terms(
        softmax_scale=scale,
        mask=mask,
        gate_q=gate_q,
        gate_k=gate_k,
        gate=gate,
        gate_threshold=threshold,
    )
    got = visibility.visible_pairs(q, k, terms)[0, 0]

    def sees(i, j, p):
        seen = mask[0, 0, i]
        return seen[j] and g[i, j] >= g[i][seen].max() + math.log(threshold)

    assert torch.equal(got, pairs(5, 7, sees))
    assert torch.equal(got.any(1), mask[0, 0].any(1)), "the best gate of a row always stays"
    if threshold == 1:
        assert torch.equal(got.sum(1), mask[0, 0].any(1).long())


def test_documents_are_block_diagonal():
    bounds = [0, 3, 3, 4, 9]
    document = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3, 3])
    want = document[:, None] == document[None, :]
    intervals = reference.document_intervals(torch.tensor(bounds, dtype=torch.int32), 9)
    assert torch.equal(dense(intervals, 9)[0, 0], want)


def test_documents_equal_packed_sequences(qkv):
    q, k, v = qkv(batch=1, seqlen_q=9, seqlen_k=9)
    bounds = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)
    start, end = reference.document_intervals(bounds, 9)
    o, lse = reference.attention(q, k, v, causal=True, interval_start=start, interval_end=end)
    packed = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    want_o, want_lse = reference.attention_packed(q[0], k[0], v[0], causal=True, **packed)
    torch.testing.assert_close(o[0], want_o)
    torch.testing.assert_close(lse[0], want_lse)


def test_key_intervals_are_a_key_mask(coin):
    keep = coin(2, 3, 7)
    got = dense(reference.key_intervals(keep, 5), 5)
    assert torch.equal(got, keep.unsqueeze(2).expand(-1, -1, 5, -1))


def test_intersection_is_the_conjunction(coin):
    parts = [
        reference.causal_intervals(5, 7),
        reference.window_intervals(5, 7, 2, 1, 1),
        reference.key_intervals(coin(2, 3, 7), 5),
    ]
    for a, b in itertools.product(parts, parts):
        want = dense(a, 5) & dense(b, 5)
        assert torch.equal(dense(reference.intersect(a, b), 5), want)


def test_sparse_equals_dense_when_everything_is_visible(qkv):
    q, k, v = qkv()
    want = reference.attention(q, k, v)
    every = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    start, end = reference.key_intervals(torch.ones(1, 1, 7, dtype=torch.bool), 5)
    for terms in (
        {"window": (9, 9)},
        {"mask": every},
        {"interval_start": start, "interval_end": end},
        {"block_map": every, "block_size": (5, 7)},
        {"kept": every},
    ):
        got = reference.attention(q, k, v, **terms)
        assert torch.equal(got[0], want[0]), terms
        assert torch.equal(got[1], want[1]), terms


def test_gate_threshold_that_keeps_all_is_no_threshold(qkv, rand):
    q, k, v = qkv()
    gates = {"gate_q": rand(2, 5, 4), "gate_k": rand(2, 7, 2)}
    want = reference.attention(q, k, v, **gates)
    got = reference.attention(q, k, v, gate_threshold=1e-30, **gates)
    assert torch.equal(got[0], want[0])
