"""V6: attention over what `Packing` makes is attention over each sequence alone."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attn import IntervalMask, flash_sparse_attn_func, flash_sparse_attn_varlen_func
from flash_sparse_attn.packing import Packing

HQ, HKV, DIM = 4, 2, 3
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]],
}
BOUNDS = [{}, {"tokens": 15}, {"tokens": 12, "max_seqlen": 5}]


@pytest.fixture(params=MASKS)
def mask(request) -> torch.Tensor:
    return torch.tensor(MASKS[request.param]).bool()


def padded(rand, mask):
    return [rand(*mask.shape, heads, DIM) for heads in (HQ, HKV, HKV)]


@pytest.mark.parametrize("bounds", BOUNDS, ids=["exact", "all-places", "some-places"])
def test_packed_is_padded_with_hidden_keys(rand, mask, bounds):
    """Causality among the tokens that remain is causality among their places."""
    inputs = [x.requires_grad_() for x in padded(rand, mask)]
    packing = Packing.from_mask(mask, **bounds)
    packed = [packing.pack(x) for x in inputs]
    o = packing.unpack(flash_sparse_attn_varlen_func(*packed, *packing.boundaries, is_causal=True))
    keys = IntervalMask.keys(mask, mask.shape[1])
    dense = flash_sparse_attn_func(*inputs, attn_mask=keys, is_causal=True)
    want = dense * mask[..., None, None]  # rows of padding are no rows of a sequence
    torch.testing.assert_close(o, want)
    weight = rand(*o.shape)
    got, expected = (torch.autograd.grad((x * weight).sum(), inputs) for x in (o, want))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert (one[~mask] == 0).all()


def test_position_ids_keep_sequences_apart(rand):
    position_ids = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]])
    packing = Packing.from_position_ids(position_ids)
    q, k, v = (rand(8, heads, DIM) for heads in (HQ, HKV, HKV))
    o = flash_sparse_attn_varlen_func(q, k, v, *packing.boundaries, is_causal=True)
    for first, last in ((0, 3), (3, 4), (4, 8)):
        own = [x[None, first:last] for x in (q, k, v)]
        want = flash_sparse_attn_func(*own, is_causal=True)[0]
        torch.testing.assert_close(o[first:last], want)
    bounded = Packing.from_position_ids(position_ids, sequences=6, max_seqlen=8)
    again = flash_sparse_attn_varlen_func(q, k, v, *bounded.boundaries, is_causal=True)
    torch.testing.assert_close(again, o)
