"""`utils.padding`: packing and padding, their lengths and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_sparse_attn.utils.padding import (
    get_unpad_data,
    index_first_axis,
    pad_input,
    unpad_input,
)

MASK = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


def hidden(*last: int) -> Tensor:
    return torch.randn(3, 4, *last, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_where_the_tokens_are(dtype: torch.dtype) -> None:
    indices, cu_seqlens, max_seqlen = get_unpad_data(MASK.to(dtype))
    assert indices.tolist() == [0, 1, 9, 10, 11]
    assert cu_seqlens.tolist() == [0, 2, 2, 5]
    assert cu_seqlens.dtype == torch.int32
    assert max_seqlen == 3
    assert isinstance(max_seqlen, int)


@pytest.mark.parametrize("last", [(), (2,), (2, 3)])
def test_unpad_gives_the_tokens_and_pad_puts_them_back(last: tuple[int, ...]) -> None:
    padded = hidden(*last)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(padded, MASK)
    assert torch.equal(packed, padded[MASK.bool()])
    assert cu_seqlens.tolist() == [0, 2, 2, 5]
    assert (max_seqlen, seqused.tolist(), seqused.dtype) == (3, [2, 0, 3], torch.int32)
    restored = pad_input(packed, indices, 3, 4)
    marked = MASK.bool().view(3, 4, *(1 for _ in last))
    assert torch.equal(restored, torch.where(marked, padded, 0))


def test_unused_places_are_packed_but_not_counted() -> None:
    unused = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden(2), MASK, unused)
    assert indices.tolist() == [0, 1, 2, 4, 9, 10, 11]
    assert torch.equal(packed, hidden(2).flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), max_seqlen, seqused.tolist()) == ([0, 3, 4, 7], 3, [2, 0, 3])


def test_index_first_axis_takes_places_in_the_batch() -> None:
    places = torch.tensor([5, 0, 5])
    assert torch.equal(index_first_axis(hidden(2), places), hidden(2).view(12, 2)[places])


def test_strided_inputs() -> None:
    padded = torch.randn(4, 3, 5).transpose(0, 1)
    assert torch.equal(unpad_input(padded, MASK)[0], padded[MASK.bool()])


def test_nothing_is_a_token() -> None:
    packed, indices, cu_seqlens, max_seqlen, _ = unpad_input(hidden(2), torch.zeros(3, 4))
    assert (packed.shape, cu_seqlens.tolist(), max_seqlen) == ((0, 2), [0, 0, 0, 0], 0)
    assert torch.equal(pad_input(packed, indices, 3, 4), torch.zeros(3, 4, 2))


def test_an_empty_batch() -> None:
    indices, cu_seqlens, max_seqlen = get_unpad_data(torch.ones(0, 4))
    assert (indices.shape, cu_seqlens.tolist(), max_seqlen) == ((0,), [0], 0)


def test_gradients_reach_the_tokens_alone() -> None:
    padded = hidden(2).double().requires_grad_()
    packed, indices, *_ = unpad_input(padded, MASK)
    weight = torch.arange(10.0, dtype=torch.float64).view(5, 2)
    (pad_input(packed, indices, 3, 4).view(12, 2)[indices] * weight).sum().backward()
    expected = torch.zeros(12, 2, dtype=torch.float64).index_put((indices,), weight)
    assert torch.equal(padded.grad, expected.view(3, 4, 2))


def test_gradcheck() -> None:
    indices, *_ = get_unpad_data(MASK)
    padded = hidden(2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unpad_input(x, MASK)[0], padded)
    packed = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pad_input(x, indices, 3, 4), packed)


@pytest.mark.parametrize(
    ("call", "exception", "words"),
    [
        (lambda: get_unpad_data(MASK[0]), ValueError, "attention_mask.*E2"),
        (lambda: get_unpad_data([[1]]), TypeError, "attention_mask.*E1"),
        (lambda: unpad_input(hidden(2)[0, 0], MASK), ValueError, "hidden_states.*E2"),
        (lambda: unpad_input(hidden(2), MASK[:2]), ValueError, r"\(2, 4\).*\(3, 4\).*E2"),
        (lambda: unpad_input(hidden(2), MASK, MASK[:, :2]), ValueError, "unused_mask.*E2"),
        (lambda: pad_input(hidden(2)[0], torch.arange(3), 1, 9), ValueError, "indices.*E2"),
        (lambda: pad_input([1.0], torch.arange(1), 1, 1), TypeError, "hidden_states.*E1"),
        (lambda: index_first_axis(torch.zeros(3), torch.arange(1)), ValueError, "tensor.*E2"),
        (lambda: index_first_axis(hidden(2), [0]), TypeError, "indices.*E1"),
    ],
)
def test_bad_calls_say_what_is_wrong(call, exception: type[Exception], words: str) -> None:
    with pytest.raises(exception, match=words):
        call()
