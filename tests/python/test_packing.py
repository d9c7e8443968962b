"""`packing`: boundaries from masks and position ids, tokens in and out, bounds without the host."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from flash_sparse_attn.packing import Packing, gather_tokens, scatter_tokens

LEFT = [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
RIGHT = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
HOLES = [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]
NONE = [[0, 0, 0, 0], [0, 0, 0, 0]]


def values(mask: Tensor, *last: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*mask.shape, *last, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rows", [LEFT, RIGHT, HOLES, NONE], ids=["left", "right", "holes", "none"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_a_mask_says_where_sequences_are(rows: list[list[int]], dtype: torch.dtype) -> None:
    mask = torch.tensor(rows)
    packing = Packing.from_mask(mask.to(dtype))
    lengths = [sum(row) for row in rows]
    assert packing.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(rows) + 1)]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == max(lengths)
    assert packing.padded_shape == tuple(mask.shape)
    x = values(mask, 2, 3)
    assert torch.equal(packing.pack(x), x[mask.bool()])
    assert torch.equal(packing.unpack(packing.pack(x)), x * mask[..., None, None])


@pytest.mark.parametrize("rows", [LEFT, RIGHT, HOLES, NONE], ids=["left", "right", "holes", "none"])
def test_bounds_in_place_of_counts(rows: list[list[int]]) -> None:
    mask = torch.tensor(rows).bool()
    exact = Packing.from_mask(mask)
    count = len(exact.indices)
    for tokens in (count, mask.numel()):
        bounded = Packing.from_mask(mask, tokens=tokens, max_seqlen=4)
        assert torch.equal(bounded.cu_seqlens, exact.cu_seqlens)
        assert bounded.max_seqlen == 4
        assert torch.equal(bounded.indices[:count], exact.indices)
        assert len(set(bounded.indices.tolist())) == tokens
    x = values(mask, 2)
    assert torch.equal(bounded.unpack(bounded.pack(x)), x)


@pytest.mark.parametrize(
    ("position_ids", "boundaries"),
    [
        ([0, 1, 2, 0, 1, 0], [0, 3, 5, 6]),
        ([0], [0, 1]),
        ([0, 0, 0], [0, 1, 2, 3]),
        ([7, 8, 0, 1], [0, 2, 4]),  # the first goes on from elsewhere
        ([0, 2, 5, 0, 9], [0, 3, 5]),
        ([], [0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rank", [1, 2])
def test_position_ids_say_where_sequences_start(
    position_ids: list[int], boundaries: list[int], dtype: torch.dtype, rank: int
) -> None:
    given = torch.tensor(position_ids, dtype=dtype)
    given = given[None] if rank == 2 else given
    packing = Packing.from_position_ids(given)
    lengths = [b - a for a, b in pairwise(boundaries)]
    assert packing.cu_seqlens.tolist() == boundaries
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == max(lengths, default=0)
    for sequences in range(len(lengths), len(position_ids) + 1):
        bounded = Packing.from_position_ids(given, sequences=sequences, max_seqlen=100)
        rest = [len(position_ids)] * (sequences - len(lengths))
        assert bounded.cu_seqlens.tolist() == boundaries + rest
        assert bounded.cu_seqlens.dtype == torch.int32
        assert bounded.max_seqlen == len(position_ids)


def test_the_arguments_of_a_packed_call() -> None:
    packing = Packing.from_position_ids(torch.tensor([0, 1, 0]))
    first, second, *longest = packing.boundaries
    assert first is second is packing.cu_seqlens
    assert longest == [2, 2]


def test_gradients_pass_both_ways() -> None:
    mask = torch.tensor(HOLES).bool()
    packing = Packing.from_mask(mask)
    x = values(mask, 3).requires_grad_()
    weight = values(mask, 3)
    (packing.unpack(packing.pack(x)) * weight).sum().backward()
    assert torch.equal(x.grad, weight * mask[..., None])
    assert torch.autograd.gradcheck(packing.pack, (x,))
    assert torch.autograd.gradcheck(packing.unpack, (packing.pack(x).detach().requires_grad_(),))


def test_with_bounds_nothing_is_read_by_the_host() -> None:
    """A fake tensor has no data: reading it raises."""
    with FakeTensorMode():
        mask = torch.ones(3, 4, dtype=torch.bool)
        packing = Packing.from_mask(mask, tokens=10, max_seqlen=4)
        assert packing.unpack(packing.pack(torch.ones(3, 4, 2))).shape == (3, 4, 2)
        ids = torch.zeros(10, dtype=torch.int64)
        assert Packing.from_position_ids(ids, sequences=4, max_seqlen=9).cu_seqlens.shape == (5,)
        for read in (
            lambda: Packing.from_mask(mask, max_seqlen=4),
            lambda: Packing.from_mask(mask, tokens=10),
            lambda: Packing.from_position_ids(ids, max_seqlen=9),
            lambda: Packing.from_position_ids(ids, sequences=4),
        ):
            with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                read()


MASK = torch.tensor(LEFT)
IDS = torch.tensor([0, 1, 0])


@pytest.mark.parametrize(
    ("call", "exception", "rule"),
    [
        (lambda: Packing.from_mask(LEFT), TypeError, "E1"),
        (lambda: Packing.from_mask(MASK[0]), ValueError, "E2"),
        (lambda: Packing.from_mask(MASK, tokens=True), TypeError, "E1"),
        (lambda: Packing.from_mask(MASK, tokens=5.0), TypeError, "E1"),
        (lambda: Packing.from_mask(MASK, tokens=13), ValueError, "E6"),
        (lambda: Packing.from_mask(MASK, tokens=-1), ValueError, "E6"),
        (lambda: Packing.from_mask(MASK, max_seqlen=-1), ValueError, "E6"),
        (lambda: Packing.from_mask(MASK, max_seqlen="4"), TypeError, "E1"),
        (lambda: Packing.from_position_ids([0, 1]), TypeError, "E1"),
        (lambda: Packing.from_position_ids(IDS.float()), TypeError, "E3"),
        (lambda: Packing.from_position_ids(IDS == 0), TypeError, "E3"),
        (lambda: Packing.from_position_ids(MASK), ValueError, "E2"),
        (lambda: Packing.from_position_ids(IDS[0]), ValueError, "E2"),
        (lambda: Packing.from_position_ids(IDS, sequences=4), ValueError, "E6"),
        (lambda: Packing.from_position_ids(IDS, sequences=1.0), TypeError, "E1"),
        (lambda: Packing.from_mask(MASK).pack(torch.ones(3, 5)), ValueError, "E2"),
        (lambda: Packing.from_mask(MASK).pack([1.0]), TypeError, "E1"),
        (lambda: Packing.from_mask(MASK).unpack(torch.ones(6, 2)), ValueError, "E2"),
        (lambda: Packing.from_position_ids(IDS).pack(torch.ones(1, 3)), ValueError, "E8"),
        (lambda: Packing.from_position_ids(IDS).unpack(torch.ones(3)), ValueError, "E8"),
        (lambda: gather_tokens(torch.ones(3), IDS), ValueError, "E2"),
        (lambda: gather_tokens(torch.ones(3, 2), [0]), TypeError, "E1"),
        (lambda: scatter_tokens(torch.ones(()), IDS, 1, 3), ValueError, "E2"),
        (lambda: scatter_tokens(1.0, IDS, 1, 3), TypeError, "E1"),
    ],
)
def test_invalid_arguments(call, exception: type[Exception], rule: str) -> None:
    with pytest.raises(exception, match=rf"\[rule {rule}\]"):
        call()
