"""Mask objects: constructors against element rules, BlockMask against its own dense form."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from flash_sparse_attn import (
    BlockMap,
    IntervalMask,
    flash_sparse_attn_func,
    flash_sparse_attn_varlen_func,
)
from flash_sparse_attn.masks import from_block_mask


def positions(sq, sk):
    """(p_i as a column, j as a row)."""
    return torch.arange(sq)[:, None] + sk - sq, torch.arange(sk)[None, :]


@pytest.mark.parametrize(("sq", "sk"), [(7, 7), (4, 9), (9, 4), (1, 5)])
def test_causal_and_window(sq, sk):
    p, j = positions(sq, sk)
    assert torch.equal(IntervalMask.causal(sq, sk).to_dense(sq)[0, 0], j <= p)
    mask = IntervalMask.window(sq, sk, 2, 1).to_dense(sq)[0, 0]
    assert torch.equal(mask, (j >= p - 2) & (j <= p + 1))
    sinks = IntervalMask.window(sq, sk, 1, 0, sinks=2).to_dense(sq)[0, 0]
    assert torch.equal(sinks, ((j >= p - 1) & (j <= p)) | (j < 2))


def test_documents_and_keys_and_intersection():
    cu = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    document = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    same = document[:, None] == document[None, :]
    documents = IntervalMask.documents(cu, 9)
    assert torch.equal(documents.to_dense(9)[0, 0], same)
    keep = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    both = documents & IntervalMask.keys(keep, 9) & IntervalMask.causal(9, 9)
    p, j = positions(9, 9)
    assert torch.equal(both.to_dense(9)[:, 0], same & keep[:, None, :] & (j <= p))


def test_topk_takes_padding_and_other_query_lengths():
    scores = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 8:] = False
    dense = IntervalMask.topk(scores, 4, key_padding_mask=real, seqlen_q=5).to_dense(5)
    p, j = positions(5, 12)
    seen = (real[:, None, None, :] & (j <= p)).expand(2, 3, 5, 12)
    ranked = scores[:, :, None, :].masked_fill(~seen, -torch.inf).argsort(-1, descending=True)
    want = torch.zeros_like(seen).scatter(-1, ranked[..., :4], True) & seen
    assert torch.equal(dense, want)


def test_a_key_that_never_makes_the_cut_has_no_rows():
    mask = IntervalMask.topk(-torch.arange(6.0)[None, None], 2)
    assert mask.start.tolist() == [[[0, 1, 2, 3, 4, 5]]]
    assert mask.end.tolist() == [[[6, 6, 2, 3, 4, 5]]]


@pytest.mark.parametrize("shape", [(12,), (1, 12), (1, 1, 12), (2, 3, 12), (2, 1, 1)])
def test_topk_broadcasts_the_padding_mask(shape):
    scores = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0))
    real = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    batched = real[:, None] if real.dim() == 2 else real
    got = IntervalMask.topk(scores, 4, key_padding_mask=real)
    want = IntervalMask.topk(scores, 4, key_padding_mask=batched.expand(2, 3, 12).contiguous())
    assert torch.equal(got.start, want.start)
    assert torch.equal(got.end, want.end)


@pytest.mark.parametrize("causal", [True, False])
def test_topk_of_packed_sequences_is_that_of_each(causal):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 30, generator=generator)
    real = torch.rand(1, 30, generator=generator) < 0.7
    lengths = (11, 0, 1, 14)
    cu = torch.tensor((0, *lengths)).cumsum(0).int()
    got = IntervalMask.topk(scores, 4, causal, real, cu_seqlens=cu)
    assert got.keys_per_row == 4
    of_each = zip(scores.split((*lengths, 4), -1), real.split((*lengths, 4), -1), strict=True)
    *alone, _outside = (IntervalMask.topk(x, 4, causal, keep) for x, keep in of_each)
    for name in ("start", "end"):
        tensor = getattr(got, name)
        assert tensor.shape == scores.shape
        assert torch.equal(tensor[..., :26], torch.cat([getattr(x, name) for x in alone], -1))
        assert not tensor[..., 26:].any(), "tokens of no sequence"


@pytest.mark.parametrize("causal", [True, False])
def test_topk_of_packed_sequences_in_attention(causal):
    """The call reads rows as the mask counts them: packed sequences give what each gives alone."""
    torch.manual_seed(0)
    lengths = (9, 1, 0, 12)
    tokens, cu = sum(lengths), torch.tensor((0, *lengths)).cumsum(0).int()
    q, k, v = (torch.randn(tokens, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    scores = torch.randn(1, 2, tokens)
    mask = IntervalMask.topk(scores, 3, causal, cu_seqlens=cu)
    longest = max(lengths)
    got = flash_sparse_attn_varlen_func(q, k, v, cu, cu, longest, longest, attn_mask=mask)
    for first, last in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        own = [x[None, first:last] for x in (q, k, v)]
        alone = IntervalMask.topk(scores[..., first:last], 3, causal)
        want = flash_sparse_attn_func(*own, attn_mask=alone)
        torch.testing.assert_close(got[None, first:last], want)


def test_keys_per_row_bounds_what_consecutive_rows_see():
    scores = torch.randn(1, 2, 20, generator=torch.Generator().manual_seed(0))
    best, all_of_them = IntervalMask.topk(scores, 6), IntervalMask.topk(scores, 30)
    window = IntervalMask.window(20, 20, 3, 2, sinks=4)
    bounds = {6: best, 20: all_of_them, 10: window}
    for bound, mask in bounds.items():
        assert mask.keys_per_row == bound
        for n in (1, 2, 7):
            rows = mask.to_dense(20).unfold(2, n, 1).any(-1)
            assert rows.sum(-1).max() <= bound + n - 1
    assert IntervalMask.window(8, 8, 5, 4).keys_per_row == 8
    unknown = (
        IntervalMask.window(20, 20, None, 2),
        IntervalMask.window(20, 20, 3, None),
        IntervalMask.causal(20, 20),
        IntervalMask.keys(torch.ones(1, 20, dtype=torch.bool), 20),
        IntervalMask(best.start, best.end),
    )
    for mask in unknown:
        assert mask.keys_per_row is None
        assert (mask & best).keys_per_row == (best & mask).keys_per_row == 6
        assert (mask & mask).keys_per_row is None
    assert (window & best).keys_per_row == 6


def test_wrong_counts_and_padding_masks_are_refused():
    scores = torch.zeros(2, 3, 12)
    interval = torch.zeros(1, 1, 4, dtype=torch.int32)
    wrong = {
        r"keys_per_row.*E1": lambda: IntervalMask(interval, interval, 2.0),
        r"keys_per_row.*E6": lambda: IntervalMask(interval, interval, -1),
        r"window_size.*E1": lambda: IntervalMask.topk(scores, True),
        r"window_size.*E6": lambda: IntervalMask.topk(scores, 0),
        r"seqlen_q.*E1": lambda: IntervalMask.topk(scores, 2, seqlen_q=3.0),
        r"seqlen_q.*E6": lambda: IntervalMask.topk(scores, 2, seqlen_q=-1),
        r"key_padding_mask.*E3": lambda: IntervalMask.topk(
            scores, 2, key_padding_mask=torch.ones(2, 12)
        ),
        r"key_padding_mask.*E4": lambda: IntervalMask.topk(
            scores, 2, key_padding_mask=torch.ones(2, 12, dtype=torch.bool, device="meta")
        ),
        r"key_padding_mask.*E5": lambda: IntervalMask.topk(
            scores, 2, key_padding_mask=torch.ones(3, 12, dtype=torch.bool)
        ),
    }
    for pattern, call in wrong.items():
        kind = TypeError if pattern.endswith(("E1", "E3")) else ValueError
        with pytest.raises(kind, match=pattern):
            call()


def test_wrong_boundaries_are_refused():
    scores, cu = torch.zeros(1, 3, 12), torch.tensor([0, 5, 12], dtype=torch.int32)
    padding = torch.ones(2, 12, dtype=torch.bool)
    wrong = {
        r"cu_seqlens.*E1": lambda: IntervalMask.topk(scores, 2, cu_seqlens=[0, 5, 12]),
        r"cu_seqlens.*E3": lambda: IntervalMask.topk(scores, 2, cu_seqlens=cu.long()),
        r"cu_seqlens.*E4": lambda: IntervalMask.topk(scores, 2, cu_seqlens=cu.to("meta")),
        r"shape of cu_seqlens.*E5": lambda: IntervalMask.topk(scores, 2, cu_seqlens=cu[None]),
        r"shape of cu_seqlens: got \(0,\).*E5": lambda: IntervalMask.topk(
            scores, 2, cu_seqlens=cu[:0]
        ),
        r"scores.*E5": lambda: IntervalMask.topk(scores.expand(2, 3, 12), 2, cu_seqlens=cu),
        r"key_padding_mask.*E5": lambda: IntervalMask.topk(
            scores, 2, key_padding_mask=padding, cu_seqlens=cu
        ),
        r"seqlen_q.*E8": lambda: IntervalMask.topk(scores, 2, seqlen_q=12, cu_seqlens=cu),
    }
    for pattern, call in wrong.items():
        kind = TypeError if pattern.endswith(("E1", "E3")) else ValueError
        with pytest.raises(kind, match=pattern):
            call()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_selection_of_packed_sequences_is_an_operator(causal, padded):
    scores = torch.randn(1, 40, 3).transpose(1, 2)
    keep = torch.rand(1, 1, 40) < 0.6 if padded else None
    cu = torch.tensor([0, 17, 17, 38], dtype=torch.int32)
    operator = torch.ops.flash_sparse_attn.topk_intervals.default
    results = torch.library.opcheck(operator, (scores, 0, 5, causal, keep, cu))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_selection_is_an_operator(causal, padded):
    scores = torch.randn(2, 40, 3).transpose(1, 2)
    keep = torch.rand(2, 1, 40) < 0.6 if padded else None
    operator = torch.ops.flash_sparse_attn.topk_intervals.default
    results = torch.library.opcheck(operator, (scores, 33, 5, causal, keep))
    assert set(results.values()) == {"SUCCESS"}


def test_masks_compile_to_one_graph():
    def masks(scores, window_size):
        seqlen = scores.shape[-1]
        mask = IntervalMask.topk(scores, window_size) & IntervalMask.window(seqlen, seqlen, 8)
        return mask.start, mask.end, mask.keys_per_row

    compiled = torch.compile(masks, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (10, 20, 33):
        scores = torch.randn(1, 2, seqlen, requires_grad=True)
        got, want = compiled(scores, 4), masks(scores, 4)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert got[2] == want[2]
        assert not got[1].requires_grad


def test_packed_masks_compile_to_one_graph():
    def mask(scores, cu_seqlens):
        chosen = IntervalMask.topk(scores, 4, cu_seqlens=cu_seqlens)
        return chosen.start, chosen.end

    compiled = torch.compile(mask, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((10, 3), (20, 0, 7), (5,)):
        cu = torch.tensor((0, *lengths)).cumsum(0).int()
        scores = torch.randn(1, 2, sum(lengths) + 2)
        for got, want in zip(compiled(scores, cu), mask(scores, cu), strict=True):
            assert torch.equal(got, want)


def test_conjunction_of_masks_in_one_call():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 10, 2, 8, dtype=torch.float64) for _ in range(3))
    dense = torch.rand(1, 1, 10, 10) > 0.3
    blocks = BlockMap(torch.rand(1, 2, 3, 3) > 0.3, (4, 4))
    intervals = IntervalMask.topk(torch.randn(1, 2, 10), 5)
    everywhere = blocks.active.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :10, :10]
    got = flash_sparse_attn_func(q, k, v, (dense, blocks, intervals))
    want = flash_sparse_attn_func(q, k, v, dense & everywhere & intervals.to_dense(10))
    torch.testing.assert_close(got, want)


def test_block_mask_is_its_mask_mod():
    def mod(b, h, q, k):
        return (q >= k) & (q - k < 150) & ((k % 3 != 0) | (h == 1))

    block_mask = create_block_mask(mod, 1, 2, 300, 260, device="cpu")
    torch.manual_seed(0)
    q = torch.randn(1, 300, 2, 8, dtype=torch.float64)
    k, v = (torch.randn(1, 260, 2, 8, dtype=torch.float64) for _ in range(2))
    i, j = torch.arange(300)[:, None], torch.arange(260)[None, :]
    dense = torch.stack([mod(0, torch.tensor(h), i, j) for h in range(2)])[None]
    got = flash_sparse_attn_func(q, k, v, block_mask)
    torch.testing.assert_close(got, flash_sparse_attn_func(q, k, v, dense))


def test_block_mask_without_elements_gives_no_dense_mask():
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu")
    block_map, elements = from_block_mask(block_mask)
    assert block_map.block_size == (128, 128)
    assert torch.equal(elements.to_dense()[0, 0, :128, :128], torch.ones(128, 128).tril().bool())
    assert torch.equal(block_map.active[0, 0], torch.tensor([[True, False], [True, True]]))
