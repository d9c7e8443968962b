"""`utils.mask.create_mask`: both published argument orders, and what the mask keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flash_sparse_attn import IntervalMask
from flash_sparse_attn.utils.mask import create_mask

MIN = torch.finfo(torch.float32).min


def key_bias(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


def kept(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().flatten().tolist()


def brute_force(bias: Tensor, window_size: int, visible: Tensor) -> Tensor:
    """Key j is kept if it is visible and fewer than w visible keys beat it, ties by recency."""
    keep = torch.zeros_like(visible)
    for row, (scores, allowed) in enumerate(
        zip(bias.flatten(0, 2), visible.flatten(0, 2), strict=True)
    ):
        ranked = sorted(allowed.nonzero().flatten().tolist(), key=lambda j: (-scores[j], -j))
        keep.view(-1, bias.shape[-1])[row, ranked[:window_size]] = True
    return keep


# --- argument orders


def with_sizes_by_position(bias: Tensor, mask: Tensor | None, **rest: object) -> Tensor:
    batch, _, _, key_len = bias.shape
    return create_mask(bias, mask, batch, 5, key_len, rest.pop("window_size"), MIN, **rest)


def with_sizes_by_keyword(bias: Tensor, mask: Tensor | None, **rest: object) -> Tensor:
    batch, _, _, key_len = bias.shape
    return create_mask(
        attention_bias=bias, attention_mask=mask, batch_size=batch, query_len=5, key_len=key_len,
        min_dtype=MIN, **rest,
    )  # fmt: skip


def without_sizes_by_position(bias: Tensor, mask: Tensor | None, **rest: object) -> Tensor:
    return create_mask(
        bias, 5, rest.pop("type", "topk"), mask, rest.pop("window_size"), MIN, **rest
    )


def without_sizes_by_keyword(bias: Tensor, mask: Tensor | None, **rest: object) -> Tensor:
    return create_mask(attention_bias=bias, query_len=5, attention_mask=mask, **rest)


@pytest.mark.parametrize("options", [{}, {"block_size": 2}, {"type": "relu"}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_every_way_to_call_gives_the_same_mask(masked: bool, options: dict) -> None:
    bias = torch.randn(2, 3, 1, 9, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9).expand(2, 9) > 2 if masked else None
    ways = [
        with_sizes_by_position,
        with_sizes_by_keyword,
        without_sizes_by_position,
        without_sizes_by_keyword,
    ]
    first, *others = [way(bias, mask, window_size=4, **options) for way in ways]
    assert first.dtype == torch.bool
    assert first.shape == (2, 3, 1, 9)
    assert first.any()
    assert not first.all()
    for other in others:
        assert torch.equal(first, other)


def test_the_quick_start_call() -> None:
    bias = torch.randn(1, 1, 1, 16, dtype=torch.bfloat16, requires_grad=True)
    mask = create_mask(
        attention_bias=bias, attention_mask=None, batch_size=1, query_len=16, key_len=16,
        window_size=4, min_dtype=torch.finfo(torch.bfloat16).min,
    )  # fmt: skip
    assert not mask.requires_grad
    assert kept(mask) == sorted(bias.flatten().topk(4).indices.tolist())


def test_the_last_argument_of_the_first_order_may_be_given_by_position() -> None:
    bias = key_bias(1.0, -1.0, 2.0, -2.0)
    assert kept(create_mask(bias, None, 1, 4, 4, None, None, None, "relu")) == [0, 2]
    assert kept(create_mask(bias, None, 1, 4, 4, 3, None, 1, "topk")) == [0, 1, 2]


# --- what is kept


@pytest.mark.parametrize("window_size", [1, 3, 6, 7, 100])
@pytest.mark.parametrize("rows", [1, 4])
def test_topk_is_the_best_of_all_keys(rows: int, window_size: int) -> None:
    generator = torch.Generator().manual_seed(window_size)
    # Few distinct values: ties decide.
    bias = torch.randint(-2, 3, (2, 2, rows, 7), generator=generator).float()
    visible = torch.rand(2, 1, rows, 7, generator=generator) > 0.3
    mask = create_mask(bias, rows, attention_mask=visible, window_size=window_size)
    expected = brute_force(bias, window_size, visible.expand(2, 2, rows, 7).clone())
    assert torch.equal(mask, expected)


def test_topk_looks_at_later_keys_and_intervals_do_not() -> None:
    bias = key_bias(0.0, 1.0, 5.0)
    assert kept(create_mask(bias, 3, window_size=1)) == [2]
    causal = IntervalMask.topk(bias.squeeze(2), 1).to_dense(3)
    assert causal[0, 0].nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]


def test_a_window_as_long_as_the_keys_keeps_all() -> None:
    bias = torch.randn(1, 2, 1, 5)
    assert create_mask(bias, 5, window_size=5).all()
    assert create_mask(bias, 5, window_size=6).all()


def test_ties_are_won_by_the_more_recent_key_and_nan_is_worst() -> None:
    assert kept(create_mask(torch.zeros(1, 1, 1, 6), 6, window_size=2)) == [4, 5]
    bias = key_bias(math.nan, -3.0, math.nan, 0.0)
    assert kept(create_mask(bias, 4, window_size=2)) == [1, 3]
    assert kept(create_mask(bias, 4, window_size=3)) == [1, 2, 3]


def test_relu_keeps_positive_biases() -> None:
    bias = key_bias(-1.0, 0.0, 0.5, math.nan, math.inf)
    assert kept(create_mask(bias, 5, type="relu")) == [2, 4]
    hidden = torch.tensor([[True, True, False, True, True]])
    assert kept(create_mask(bias, 5, type="relu", attention_mask=hidden)) == [4]


def test_a_bias_of_min_dtype_hides_the_key() -> None:
    bias = key_bias(1.0, MIN, -math.inf, -1e30)
    assert kept(create_mask(bias, 4, window_size=4)) == [0, 3]
    assert kept(create_mask(bias, 4, window_size=4, min_dtype=-1e30)) == [0]


def test_min_dtype_of_a_wider_dtype_hides_what_the_bias_holds_for_it() -> None:
    bias = key_bias(1.0, -2.0, -math.inf).half()
    assert kept(create_mask(bias, 3, window_size=3, min_dtype=MIN)) == [0, 1]


def test_a_row_from_which_all_keys_are_hidden_keeps_none() -> None:
    mask = torch.zeros(1, 4, dtype=torch.bool)
    assert not create_mask(torch.randn(1, 1, 1, 4), 4, attention_mask=mask, window_size=2).any()


def test_two_dim_masks_of_the_keys_or_of_the_last_rows() -> None:
    bias = torch.zeros(2, 1, 1, 5)
    of_keys = torch.tensor([[True] * 5, [False, True, True, True, False]])
    got = create_mask(bias, 2, attention_mask=of_keys, window_size=9)
    assert torch.equal(got[:, 0, 0], of_keys)
    of_rows = torch.tensor([[True, False], [False, True]])
    got = create_mask(bias, 2, attention_mask=of_rows, window_size=9)
    assert got[:, 0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]


def test_a_shared_bias_takes_the_batch_of_the_mask() -> None:
    mask = torch.tensor([[True, True, False], [False, True, True]])
    got = create_mask(torch.zeros(1, 1, 1, 3), mask, 2, 3, 3, 3, MIN)
    assert torch.equal(got[:, 0, 0], mask)


@pytest.mark.parametrize("key_len", [1, 4, 6, 7])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_blocks_follow_their_majority(key_len: int, block_size: int) -> None:
    bias = torch.randn(2, 1, 3, key_len, generator=torch.Generator().manual_seed(key_len))
    plain = create_mask(bias, 3, type="relu")
    expected = plain.clone()
    for first in range(0, key_len, block_size):
        block = slice(first, first + block_size)
        expected[..., block] = plain[..., block].float().mean(-1, keepdim=True) > 0.5
    assert torch.equal(create_mask(bias, 3, type="relu", block_size=block_size), expected)


def test_blocks_never_show_a_hidden_key() -> None:
    mask = torch.tensor([[True, True, True, False]])
    got = create_mask(torch.ones(1, 1, 1, 4), 4, "relu", mask, block_size=4)
    assert kept(got) == [0, 1, 2]


# --- bad calls

BIAS = torch.zeros(2, 1, 1, 4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "exception", "words"),
    [
        ((), {}, TypeError, "missing a required argument.*E1"),
        ((BIAS,), {}, TypeError, "query_len.*E1"),
        ((BIAS, None, 2), {}, TypeError, "query_len.*E1"),
        ((BIAS, 4), {"windowsize": 2}, TypeError, "windowsize.*E1"),
        ((BIAS, 4, "topk", None, 2, MIN, 1, 7), {}, TypeError, "too many.*E1"),
        (("bias", 4), {"window_size": 2}, TypeError, "attention_bias.*E1"),
        ((BIAS.int(), 4), {"window_size": 2}, TypeError, "attention_bias.*int32.*E3"),
        ((BIAS[0], 4), {"window_size": 2}, ValueError, "attention_bias.*E2"),
        ((BIAS, 4.0), {"window_size": 2}, TypeError, "query_len.*E1"),
        ((BIAS, 4), {}, TypeError, "window_size.*None.*E1"),
        ((BIAS, 4), {"window_size": True}, TypeError, "window_size.*E1"),
        ((BIAS, 4), {"window_size": 0}, ValueError, "window_size.*E6"),
        ((BIAS, 4), {"window_size": 2, "block_size": 0}, ValueError, "block_size.*E6"),
        ((BIAS, 4), {"window_size": 2, "min_dtype": "x"}, TypeError, "min_dtype.*E1"),
        ((BIAS, 4), {"window_size": 2, "min_dtype": math.nan}, ValueError, "min_dtype.*E6"),
        ((BIAS, 4, "top"), {"window_size": 2}, ValueError, "type.*'top'.*relu.*E6"),
        ((BIAS, None, 3, 4, 4, 2, MIN), {}, ValueError, r"\{1,3\}.*E5"),
        ((BIAS, None, 2, 4, 5, 2, MIN), {}, ValueError, "attention_bias.*E5"),
        ((BIAS.expand(2, 1, 3, 4), None, 2, 4, 4, 2, MIN), {}, ValueError, "E5"),
    ],
)
def test_bad_calls_say_what_is_wrong(
    arguments: tuple, keywords: dict, exception: type[Exception], words: str
) -> None:
    with pytest.raises(exception, match=words):
        create_mask(*arguments, **keywords)


@pytest.mark.parametrize(
    ("mask", "exception", "words"),
    [
        (torch.ones(2, 4), TypeError, "float32.*torch.bool.*E3"),
        (torch.ones(2, 4, dtype=torch.int64), TypeError, "int64.*E3"),
        ([[True]], TypeError, "E1"),
        (torch.ones(2, 9, dtype=torch.bool), ValueError, r"\(2, 9\).*E2"),
        (torch.ones(2, 1, 4, dtype=torch.bool), ValueError, "E2"),
        (torch.ones(3, 4, dtype=torch.bool), ValueError, "broadcast.*E5"),
        (torch.ones(2, 4, dtype=torch.bool, device="meta"), ValueError, "meta.*E4"),
    ],
)
def test_bad_masks_say_what_is_wrong(mask: object, exception: type[Exception], words: str) -> None:
    with pytest.raises(exception, match=words):
        create_mask(BIAS, 4, attention_mask=mask, window_size=2)
