"""`PackedMask` against the bool mask it stands for, and `BlockMask`s, which become one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flash_sparse_attn import (
    BlockMap,
    IntervalMask,
    flash_sparse_attn_func,
    flash_sparse_attn_varlen_func,
    flash_sparse_attn_with_kvcache_func,
    masks,
)
from flash_sparse_attn.masks import from_block_mask
from flash_sparse_attn.packed_mask import PackedMask, pack_bits, unpack_bits
from flash_sparse_attn.problem import OPTION_NAMES, AttentionOptions
from flash_sparse_attn.tensors import TENSOR_NAMES, AttentionTensors


def coin(*sizes, seed=0, share=0.5):
    """Bools, true in the given share of places."""
    return torch.rand(*sizes, generator=torch.Generator().manual_seed(seed)) < share


def qkv(sq, sk, heads=(4, 2), batch=2, dtype=torch.float64, grad=False):
    """q, k and v on the CPU."""
    torch.manual_seed(0)
    shapes = ((batch, sq, heads[0], 8), *[(batch, sk, heads[1], 8)] * 2)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


# Bits


@pytest.mark.parametrize("count", [0, 1, 7, 31, 32, 33, 64, 100, 256])
def test_bit_n_of_word_n_over_32(count):
    flags = coin(3, 1, 5, count)
    packed = PackedMask.pack(flags)
    assert packed.words.shape == (3, 1, 5, -(-count // 32))
    assert packed.words.dtype == torch.int32
    for n in range(count):
        bit = packed.words[..., n // 32] >> n % 32 & 1
        assert torch.equal(bit.bool(), flags[..., n])
    if count % 32:
        assert (packed.words[..., -1].long() & 0xFFFFFFFF < 1 << count % 32).all()
    assert torch.equal(packed.to_dense(), flags)


def test_bits_of_strided_masks_and_words():
    flags = coin(100, 5, 2, 2).permute(3, 2, 1, 0)
    words = PackedMask.pack(flags).words
    assert torch.equal(words, PackedMask.pack(flags.contiguous()).words)
    scattered = words.mT.contiguous().mT
    assert not scattered.is_contiguous()
    assert torch.equal(PackedMask(scattered, 100).to_dense(), flags)
    part = coin(1, 1, 4, 200)[..., 3:99]
    assert torch.equal(unpack_bits(pack_bits(part), 96), part)


# Calls


@pytest.mark.parametrize(
    "sizes", [(2, 4, 33, 70), (1, 2, 33, 70), (2, 1, 33, 70), (1, 4, 1, 70)], ids=str
)
def test_a_call_and_its_gradients_are_those_of_the_bool_mask(sizes):
    q, k, v = inputs = qkv(33, 70, grad=True)
    mask = coin(*sizes)
    found = []
    for given in (mask, PackedMask.pack(mask)):
        o, lse = flash_sparse_attn_func(q, k, v, given, is_causal=True, return_lse=True)
        found.append((o, lse, *torch.autograd.grad(o.square().sum() + lse[lse > -9].sum(), inputs)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_bits_past_the_last_key_mean_nothing():
    q, k, v = qkv(9, 40)
    packed = PackedMask.pack(coin(1, 1, 9, 40))
    words = packed.words.clone()
    words[..., -1] |= -1 << 8
    assert not torch.equal(words, packed.words)
    got = flash_sparse_attn_func(q, k, v, PackedMask(words, 40))
    assert torch.equal(got, flash_sparse_attn_func(q, k, v, packed))


def test_conjunction_with_masks_of_other_kinds():
    q, k, v = qkv(20, 20)
    mask, intervals = coin(1, 2, 20, 20), IntervalMask.topk(torch.randn(1, 2, 20), 9)
    blocks = BlockMap(coin(2, 4, 3, 3, seed=1), (8, 8))
    got = flash_sparse_attn_func(q, k, v, (blocks, PackedMask.pack(mask), intervals))
    assert torch.equal(got, flash_sparse_attn_func(q, k, v, (mask, blocks, intervals)))


def test_cache_form():
    q, k, v = qkv(3, 50)
    lengths = torch.tensor([50, 17], dtype=torch.int32)
    mask = coin(2, 4, 3, 50)
    found = [
        flash_sparse_attn_with_kvcache_func(q, k, v, cache_seqlens=lengths, attn_mask=given)
        for given in (mask, PackedMask.pack(mask))
    ]
    assert torch.equal(*found)


# What is refused


def call(mask):
    return lambda: flash_sparse_attn_func(*qkv(6, 40, batch=1), mask)


def packed_call(mask):
    q, k, v = (x[0] for x in qkv(40, 40, batch=1))
    cu = torch.tensor([0, 40], dtype=torch.int32)
    return lambda: flash_sparse_attn_varlen_func(q, k, v, cu, cu, 40, 40, mask)


def words(*sizes, dtype=torch.int32):
    return torch.zeros(sizes, dtype=dtype)


TWO = words(1, 1, 6, 2)
WRONG = {
    "words list": (lambda: PackedMask([1], 32), TypeError, "words.*E1"),
    "words long": (lambda: PackedMask(words(1, 1, 6, 2, dtype=torch.long), 40), TypeError, "E3"),
    "words rank": (lambda: PackedMask(words(6, 2), 40), ValueError, "words.*E5"),
    "words few": (lambda: PackedMask(words(1, 1, 6, 1), 40), ValueError, "words.*E5"),
    "words many": (lambda: PackedMask(words(1, 1, 6, 3), 40), ValueError, "words.*E5"),
    "keys bool": (lambda: PackedMask(words(1, 1, 6, 1), True), TypeError, "seqlen_k.*E1"),
    "keys float": (lambda: PackedMask(TWO, 40.0), TypeError, "seqlen_k.*E1"),
    "keys negative": (lambda: PackedMask(words(1, 1, 6, 0), -1), ValueError, "seqlen_k.*E6"),
    "pack list": (lambda: PackedMask.pack([True]), TypeError, "mask.*E1"),
    "pack float": (lambda: PackedMask.pack(torch.ones(1, 1, 6, 40)), TypeError, "mask.*E3"),
    "pack rank": (lambda: PackedMask.pack(coin(6, 40)), ValueError, "mask.*E5"),
    "call keys": (call(PackedMask(TWO, 39)), ValueError, "keys of mask.*E5"),
    "call rows": (call(PackedMask(words(1, 1, 5, 2), 40)), ValueError, "shape of mask.*E5"),
    "call heads": (call(PackedMask(words(1, 3, 6, 2), 40)), ValueError, "shape of mask.*E5"),
    "call device": (call(PackedMask(TWO.to("meta"), 40)), ValueError, "device of mask.*E4"),
    "call bare words": (call(TWO), TypeError, "dtype of mask.*E3"),
    "twice": (call((PackedMask(TWO, 40), PackedMask(TWO, 40))), ValueError, "twice.*E8"),
    "bool too": (call((coin(1, 1, 6, 40), PackedMask(TWO, 40))), ValueError, "twice.*E8"),
    "packed form": (packed_call(PackedMask(words(1, 1, 40, 2), 40)), ValueError, "mask.*E8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_are_refused(name):
    function, kind, pattern = WRONG[name]
    with pytest.raises(kind, match=pattern):
        function()


# The operators


def test_opcheck():
    q, k, v = qkv(12, 40, dtype=torch.float32, grad=True)
    tensors = AttentionTensors(q, k, v, mask=PackedMask.pack(coin(1, 4, 12, 40)).words)
    options = AttentionOptions(softmax_scale=0.3, causal=True, mask_keys=40)
    given = [getattr(tensors, name) for name in TENSOR_NAMES]
    given += [getattr(options, name) for name in OPTION_NAMES]
    operator = torch.ops.flash_sparse_attn.forward.default
    results = torch.library.opcheck(operator, (*given, None, "q,k,v"))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic):
    def made_outside(q, k, v, words):
        return flash_sparse_attn_func(q, k, v, PackedMask(words, k.shape[1]))

    def made_inside(q, k, v, scores):
        return flash_sparse_attn_func(q, k, v, PackedMask.pack(scores > 0))

    for length in (40, 50, 63):
        q, k, v = qkv(12, length, dtype=torch.float32, grad=True)
        scores = torch.randn(1, 2, 12, length)
        for step, last in (
            (made_outside, PackedMask.pack(scores > 0).words),
            (made_inside, scores),
        ):
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            assert torch.equal(compiled(q, k, v, last), step(q, k, v, last))


# FlexAttention's BlockMask

DOCUMENT = torch.repeat_interleave(torch.arange(6), torch.tensor([40, 3, 100, 57, 90, 10]))
RANDOM = coin(2, 300, 260, share=0.02)
MODS = {
    "causal": lambda b, h, i, j: i >= j,
    "documents": lambda b, h, i, j: DOCUMENT[i] == DOCUMENT[j],
    "window": lambda b, h, i, j: (i - j < 40) & (j - i < 9),
    "random by head": lambda b, h, i, j: RANDOM[h, i, j],
    "everything": lambda b, h, i, j: i + j >= 0,
    "nothing": lambda b, h, i, j: i + j < 0,
}


def dense_mask(mod, batch, heads, sq, sk):
    """What a `mask_mod` says of every pair, one by one in rows and keys."""
    i, j = torch.arange(sq)[:, None], torch.arange(sk)[None, :]
    planes = [
        [mod(torch.tensor(b), torch.tensor(h), i, j) for h in range(heads)] for b in range(batch)
    ]
    return torch.stack([torch.stack(row) for row in planes])


def visible(found, sq, sk):
    """The conjunction of a block map and a packed mask."""
    blocks, elements = found
    rows, keys = blocks.block_size
    shown = blocks.active.repeat_interleave(rows, 2).repeat_interleave(keys, 3)[..., :sq, :sk]
    return shown if elements is None else shown & elements.to_dense()


@pytest.mark.parametrize("block_size", [128, (64, 32)], ids=str)
@pytest.mark.parametrize("name", MODS)
def test_a_block_mask_is_its_mask_mod(name, block_size, monkeypatch):
    """Lengths that are no whole blocks, evaluated in chunks of rows that are none either."""
    mod, (sq, sk) = MODS[name], (300, 260)
    heads = 2 if "head" in name else 1
    monkeypatch.setattr(masks, "EVALUATED_AT_ONCE", 50 * heads * sk)
    flex = create_block_mask(mod, 1, heads, sq, sk, device="cpu", BLOCK_SIZE=block_size)
    found = from_block_mask(flex)
    assert found[1].words.shape == (1, heads, sq, 9)
    assert torch.equal(visible(found, sq, sk), dense_mask(mod, 1, heads, sq, sk))


def test_dims_of_batch_and_heads():
    def mod(b, h, i, j):
        return (i - j) % (b + h + 2) == 0

    flex = create_block_mask(mod, 2, 3, 40, 70, device="cpu", BLOCK_SIZE=32)
    assert torch.equal(visible(from_block_mask(flex), 40, 70), dense_mask(mod, 2, 3, 40, 70))
    q, k, v = qkv(40, 70, heads=(3, 3))
    got = flash_sparse_attn_func(q, k, v, flex)
    assert torch.equal(got, flash_sparse_attn_func(q, k, v, dense_mask(mod, 2, 3, 40, 70)))


def test_mask_mod_is_evaluated_once_for_each_block_mask():
    called = []

    def mod(b, h, i, j):
        called.append(1)
        return i >= j

    first, second = (
        create_block_mask(mod, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16) for _ in "ab"
    )
    called.clear()
    q, k, v = qkv(64, 64, grad=True)
    flash_sparse_attn_func(q, k, v, first).sum().backward()
    once = len(called)
    assert once == 1
    for _ in range(5):
        flash_sparse_attn_func(q, k, v, first).sum().backward()
    assert len(called) == once
    assert from_block_mask(first)[1] is from_block_mask(first)[1]
    assert from_block_mask(second)[1] is not from_block_mask(first)[1]
    assert len(called) == 2 * once


def test_what_was_evaluated_goes_with_its_block_mask():
    flex = create_block_mask(MODS["causal"], 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16)
    packed = weakref.ref(from_block_mask(flex)[1])
    gc.collect()
    assert packed() is not None
    del flex
    gc.collect()
    assert packed() is None


def test_captured_tensors_are_read_once():
    limit = torch.tensor(10)
    flex = create_block_mask(
        lambda b, h, i, j: j < limit, 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16
    )
    q, k, v = qkv(64, 64)
    before = flash_sparse_attn_func(q, k, v, flex)
    limit.fill_(3)
    assert torch.equal(flash_sparse_attn_func(q, k, v, flex), before)


def test_evaluated_in_inference_mode_and_trained_with_later():
    q, k, v = qkv(64, 64)
    with torch.inference_mode():
        flex = create_block_mask(MODS["causal"], 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16)
        want = flash_sparse_attn_func(q, k, v, flex)
    q = q.clone().requires_grad_()
    o = flash_sparse_attn_func(q, k, v, flex)
    o.sum().backward()
    assert torch.equal(o.detach(), want)
    assert q.grad.isfinite().all()


def test_masks_of_a_block_mask_in_a_compiled_call():
    flex = create_block_mask(MODS["window"], 1, 1, 64, 64, device="cpu", BLOCK_SIZE=16)
    blocks, elements = from_block_mask(flex)

    def step(q, k, v, *given):
        return flash_sparse_attn_func(q, k, v, given if len(given) > 1 else given[0])

    q, k, v = qkv(64, 64, grad=True)
    want = flash_sparse_attn_func(q, k, v, flex)
    for given in ((blocks, elements), (flex,)):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v, *given), want)


def test_full_blocks_are_full_whatever_their_mask_mod_says():
    """V5: `mask_mod` speaks inside partial blocks only."""
    partial = torch.tensor([[[[True, False], [False, True]]]])
    full = torch.tensor([[[[False, True], [False, False]]]])
    flex = BlockMask.from_kv_blocks(
        *block_lists(partial),
        *block_lists(full),
        BLOCK_SIZE=16,
        mask_mod=MODS["causal"],
        seq_lengths=(30, 25),
    )
    spread = [
        x.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., :30, :25] for x in (partial, full)
    ]
    want = spread[1] | spread[0] & dense_mask(MODS["causal"], 1, 1, 30, 25)
    assert torch.equal(visible(from_block_mask(flex), 30, 25), want)


def test_without_a_mask_mod_there_are_no_elements():
    counts, lists = block_lists(coin(1, 2, 4, 5))
    flex = BlockMask.from_kv_blocks(counts, lists, BLOCK_SIZE=16, seq_lengths=(60, 75))
    blocks, elements = from_block_mask(flex)
    assert elements is None
    assert torch.equal(blocks.active, coin(1, 2, 4, 5))


# Block lists


def block_lists(active):
    """`(kv_num_blocks, kv_indices)` of a map, with lists in falling order."""
    order = active.flip(-1).int().argsort(dim=-1, descending=True, stable=True)
    return active.sum(-1, dtype=torch.int32), (active.shape[-1] - 1 - order).int()


@pytest.mark.parametrize("size", [64, 128])
def test_block_lists(size):
    active = coin(2, 4, 3, 2, share=0.6)
    counts, lists = block_lists(active)
    blocks = BlockMap.from_lists(counts, lists, (size, size))
    assert blocks.block_size == (size, size)
    assert torch.equal(blocks.active, active)
    q, k, v = qkv(3 * size - 5, 2 * size - 1)
    got = flash_sparse_attn_func(q, k, v, blocks)
    assert torch.equal(got, flash_sparse_attn_func(q, k, v, BlockMap(active, (size, size))))


def test_block_lists_shorter_than_the_map_and_what_stands_past_them():
    counts = torch.tensor([[[2, 0, 1]]], dtype=torch.int32)
    lists = torch.tensor([[[[4, 1], [-7, 9999], [0, -1]]]], dtype=torch.int32)
    active = BlockMap.from_lists(counts, lists, num_key_blocks=5).active
    want = [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert active.int().tolist() == [[want]]
    assert BlockMap.from_lists(counts, lists[..., :0], num_key_blocks=5).active.sum() == 0


def test_wrong_block_lists_are_refused():
    counts, lists = block_lists(coin(1, 1, 3, 4))
    wrong = {
        "kv_num_blocks.*E1": lambda: BlockMap.from_lists([1], lists),
        "kv_indices.*E3": lambda: BlockMap.from_lists(counts, lists.long()),
        "kv_num_blocks and kv_indices.*E5": lambda: BlockMap.from_lists(counts[..., :2], lists),
        "kv_indices.*E5": lambda: BlockMap.from_lists(counts[0], lists[0]),
        "num_key_blocks.*E1": lambda: BlockMap.from_lists(counts, lists, num_key_blocks=4.0),
        "num_key_blocks.*E6": lambda: BlockMap.from_lists(counts, lists, num_key_blocks=-1),
    }
    for pattern, function in wrong.items():
        kind = TypeError if pattern.endswith(("E1", "E3")) else ValueError
        with pytest.raises(kind, match=pattern):
            function()
