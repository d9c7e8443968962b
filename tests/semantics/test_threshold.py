"""T1: what may be dropped, what dropping it costs, and that the kept set replays."""

from __future__ import annotations

import math

import pytest
import torch

from flash_sparse_attn import reference

SHARP = {"softmax_scale": 3.0, "causal": True}


def dropped_map(q, k, threshold, block_size, **terms):
    """P, the visible pairs, and the largest map of blocks that T1 lets drop."""
    p, visible = reference.final_probability(q, k, **terms)
    return p, visible, reference.droppable(p, visible, threshold, block_size)


def test_final_probability_is_that_of_the_full_softmax(qkv, coin):
    q, k, v = qkv()
    terms = {**SHARP, "mask": coin(2, 2, 5, 7)}
    p, visible = reference.final_probability(q, k, **terms, kept=torch.zeros(1, 1, 1, 1).bool())
    assert torch.equal(p > 0, visible)
    o, _ = reference.attention(q, k, v, **terms)
    want = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(2, 2))
    torch.testing.assert_close(o, want)


@pytest.mark.parametrize("threshold", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("block_size", [(1, 1), (2, 3), (4, 2), (16, 16)])
def test_droppable_is_the_rule_block_by_block(qkv, coin, threshold, block_size):
    q, k, _ = qkv(seqlen_q=5, seqlen_k=7)
    terms = {**SHARP, "mask": coin(2, 1, 5, 7)}
    p, visible, got = dropped_map(q, k, threshold, block_size, **terms)
    rows, keys = block_size
    assert got.shape == (2, 4, -(-5 // rows), -(-7 // keys))
    for b, h, m, n in torch.cartesian_prod(*(torch.arange(size) for size in got.shape)):
        want = True
        for i in range(m * rows, min(5, (m + 1) * rows)):
            for j in range(n * keys, min(7, (n + 1) * keys)):
                if visible[b, h, i, j]:
                    want &= bool(p[b, h, i, j] < threshold / visible[b, h, i].sum())
        assert got[b, h, m, n] == want


@pytest.mark.parametrize("threshold", [1e-3, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("block_size", [(1, 1), (8, 4), (16, 16)])
def test_dropping_all_that_may_go_loses_less_than_the_threshold(qkv, threshold, block_size):
    q, k, v = qkv(seqlen_q=48, seqlen_k=64)
    p, visible, gone = dropped_map(q, k, threshold, block_size, **SHARP)
    kept = reference.expand_kept(~gone, block_size, 48, 64)
    assert reference.check_kept(kept, p, visible, threshold).all()
    lost = torch.where(visible & ~kept, p, 0).sum(3)
    assert (lost < threshold).all()
    if block_size == (1, 1) and threshold >= 0.1:
        assert lost.any(), "the case drops something"

    o, lse = reference.attention(q, k, v, **SHARP)
    kept_o, kept_lse = reference.attention(q, k, v, **SHARP, kept=kept)
    torch.testing.assert_close(kept_lse, lse + torch.log1p(-lost))
    bound = 2 * lost.transpose(1, 2).unsqueeze(3) * v.abs().max()
    assert ((kept_o - o).abs() <= bound + 1e-12).all()


def test_a_threshold_of_one_always_keeps_the_largest_of_a_row(qkv):
    """Not every P_ij can be below 1 / n_i: their sum is 1."""
    q, k, _ = qkv(seqlen_q=9, seqlen_k=9)
    _, visible, gone = dropped_map(q, k, 1.0, (1, 1), **SHARP)
    assert (visible & ~gone).any(3).all()


def test_kept_set_is_replayed_as_a_mask_is(qkv, rand, coin):
    q, k, v = qkv()
    kept, do, dlse = coin(2, 4, 3, 2), rand(2, 5, 4, 6), rand(2, 4, 5)
    elements = reference.expand_kept(kept, (2, 4), 5, 7)
    assert torch.equal(elements, kept.repeat_interleave(2, 2).repeat_interleave(4, 3)[..., :5, :7])
    terms = {"causal": True, "bias": rand(1, 4, 1, 7)}
    got = reference.attention(q, k, v, kept=elements, **terms)
    want = reference.attention(q, k, v, mask=elements, **terms)
    assert torch.equal(got[0], want[0])
    got = reference.attention_backward(do, dlse, q, k, v, kept=elements, **terms)
    want = reference.attention_backward(do, dlse, q, k, v, mask=elements, **terms)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_kept_set_does_not_move_the_gate_threshold(qkv, rand):
    """V7 compares with the best gate of the visible keys, kept or not."""
    q, k, v = qkv(batch=1, heads_q=1, heads_kv=1)
    gate_k = torch.tensor([5.0, 1, 1, 1, 1, 1, 1], dtype=torch.float64).view(1, 7, 1)
    gates = {"gate_q": torch.ones(1, 5, 1).double(), "gate_k": gate_k, "gate": "identity"}
    kept = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    kept[..., 0] = False
    options = {"softmax_scale": 1.0, "gate_threshold": 0.5, **gates}
    _, lse = reference.attention(q, k, v, kept=kept, **options)
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("fault", ["too much", "nothing"])
def test_check_tells_a_wrong_drop(fault):
    p = torch.tensor([0.7, 0.2, 0.06, 0.04]).view(1, 1, 1, 4)
    visible = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    kept = torch.tensor([True, fault == "nothing", True, False]).view(1, 1, 1, 4)
    got = reference.check_kept(kept, p, visible, 0.4)
    assert got.item() == (fault == "nothing")


def test_check_allows_for_the_error_of_the_probabilities():
    p, visible = torch.tensor([0.9, 0.1001]).view(1, 1, 1, 2), torch.ones(1, 1, 1, 2).bool()
    kept = torch.tensor([True, False]).view(1, 1, 1, 2)
    assert not reference.check_kept(kept, p, visible, 0.2).item()
    assert reference.check_kept(kept, p, visible, 0.2, rtol=0.01).item()


def test_dropping_what_is_not_visible_is_no_fault(qkv):
    q, k, _ = qkv()
    p, visible = reference.final_probability(q, k, causal=True)
    assert reference.check_kept(visible, p, visible, 0.1).all()
