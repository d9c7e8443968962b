"""Masks in bits (V3): what the kernels make of them, and calls beside those of the bool mask."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from flash_sparse_attn.backends import triton as backend
from flash_sparse_attn.backends.triton.kernels import preparation, tuning
from torch import Tensor

from flash_sparse_attn.packed_mask import pack_bits, unpack_bits
from flash_sparse_attn.problem import AttentionOptions, AttentionProblem
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

from .calls import Draw, same_bits
from .memory import checked_memory
from .pairs import classes_of

BLOCK = tuning.INTERPRETED_MASK_BLOCK

SIZES = [
    (1, 1, 70, 100),
    (2, 2, 33, 300),
    (1, 2, 128, 128),
    (2, 1, 128, 2304),
    (1, 1, 2, 31),
    (1, 1, 40, 1),
]
LAYOUTS = {
    "contiguous": lambda words: words,
    "keys first": lambda words: words.mT.contiguous().mT,
    "heads last": lambda words: words.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "a part": lambda words: torch.cat([~words, words, ~words], 3)[
        ..., words.shape[3] : 2 * words.shape[3]
    ],
}


def in_bits(mask: Tensor, layout: str = "contiguous") -> Tensor:
    """The bits of a mask; those past the last key are ones."""
    words = pack_bits(mask)
    if mask.shape[3] % 32:
        words[..., -1] |= -1 << mask.shape[3] % 32
    return LAYOUTS[layout](words)


def described(
    heads: tuple[int, int], mask: Tensor, words: Tensor | None = None, **more: object
) -> tuple[AttentionProblem, AttentionTensors]:
    """A call under the mask, or under its bits where they are given."""
    _, _, rows, keys = mask.shape
    rows = more.pop("seqlen_q", rows)
    q, k, v = Draw.seeded(0).qkv(2, rows, keys, heads)
    given = {name: more.pop(name) for name in ("bias", "block_map") if name in more}
    tensors = AttentionTensors(q, k, v, mask=mask if words is None else words, **given)
    in_words = None if words is None else keys
    options = AttentionOptions(softmax_scale=0.25, mask_keys=in_words, **more)
    grads = ("q", "k", "v", "bias") if "bias" in given else ("q", "k", "v")
    return describe(tensors, options, grads), tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bits_and_classes_are_those_of_the_bool_mask(sizes, layout):
    """And 0 where nothing exists, whatever the given bits say of it."""
    mask = Draw.seeded(1).coin(*sizes, share=0.6)
    mask[..., : sizes[2] // 2, : sizes[3] // 2] = True
    mask[..., -BLOCK // 2 :, : BLOCK // 2] = False
    mask[..., (sizes[2] - 1) // BLOCK * BLOCK :, BLOCK : 2 * BLOCK] = True  # full, rows missing
    words = in_bits(mask, layout)
    assert torch.equal(unpack_bits(words, sizes[3]), mask)
    problem, tensors = described((2, 2), mask, words)
    with checked_memory():
        got = preparation.prepare(problem, tensors, "forward")[2].mask
    want = preparation.prepare(*described((2, 2), mask), "forward")[2].mask
    assert torch.equal(got.words.reshape(-1), want.words.reshape(-1))
    assert torch.equal(got.classes, want.classes)
    if sizes[3] > 1:
        exact = classes_of(mask, BLOCK, BLOCK)
        given = got.classes[..., : exact.shape[-2], : exact.shape[-1]]
        assert torch.equal(given.int(), exact)
    assert [got.batch, got.head, got.row] == [want.batch, want.head, want.row]


def test_bits_of_whole_tiles_are_read_where_they_are():
    mask = Draw.seeded(1).coin(1, 2, 128, 256)
    words = in_bits(mask)
    terms = preparation.prepare(*described((2, 2), mask, words), "forward")[2]
    assert terms.mask.words is words
    terms = preparation.prepare(*described((2, 2), mask, in_bits(mask, "keys first")), "forward")[2]
    assert terms.mask.words.is_contiguous()


def test_no_bool_mask_is_made():
    mask = Draw.seeded(1).coin(1, 1, 70, 100)
    problem, tensors = described((2, 1), mask, in_bits(mask))
    unpacked = mock.Mock(side_effect=AssertionError("unpacked"))
    with mock.patch("flash_sparse_attn.packed_mask.unpack_bits", unpacked):
        backend.forward(problem, tensors)
    assert not unpacked.called


CALLS = {
    "one for all": ((1, 1, 70, 100), {}),
    "of key-value heads": ((2, 2, 70, 100), {"causal": True}),
    "of query heads": ((1, 4, 70, 100), {"window_left": 30, "softcap": 3.0}),
    "whole tiles": ((2, 1, 128, 128), {"causal": True}),
    "one row for all": ((1, 2, 1, 100), {"seqlen_q": 70, "causal": True}),
    "one row": ((2, 4, 1, 100), {}),
    "with a bias": ((1, 2, 70, 100), {"bias": Draw.seeded(3).normal(1, 2, 70, 100)}),
    "with blocks": (
        (1, 2, 70, 100),
        {
            "block_map": Draw.seeded(3).coin(1, 4, 3, 4),
            "block_size_q": 32,
            "block_size_k": 32,
        },
    ),
    "with blocks that do not fit": (
        (1, 2, 70, 100),
        {
            "block_map": Draw.seeded(3).coin(1, 4, 7, 5),
            "block_size_q": 10,
            "block_size_k": 20,
        },
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_has_the_bits_of_that_of_the_bool_mask(name):
    """Forward and backward, which read the same words and classes by the same kernels."""
    sizes, more = CALLS[name]
    mask = Draw.seeded(1).coin(*sizes)
    found = []
    for words in (None, in_bits(mask)):
        problem, tensors = described((4, 2), mask, words, **more)
        o, lse, kept = backend.forward(problem, tensors)
        do, dlse = Draw.seeded(5).normal(*o.shape), Draw.seeded(6).normal(*lse.shape)
        grads = backend.backward(problem, tensors, o, lse, kept, do, dlse)
        found.append({"o": o, "lse": lse} | grads)
    for quantity, got in found[1].items():
        assert same_bits(got, found[0][quantity]), quantity
