"""T1 in kernels: blocks taken by bounds of 8-bit products, and rows that drop nothing apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flash_sparse_attn.backends import triton as backend
from flash_sparse_attn.backends.triton.kernels import screening

from flash_sparse_attn import reference
from flash_sparse_attn.kept import kept_blocks
from flash_sparse_attn.problem import KEPT_BLOCK, AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

from .memory import checked_memory

SHARE = 0.01


def tensors(seqlen: int, peaked: tuple[bool, ...]) -> AttentionTensors:
    """Normal q, k, v of one group; rows of a peaked head attend to tokens of their own 64."""
    generator = torch.Generator().manual_seed(seqlen)
    q, k, v = (
        torch.randn(1, seqlen, heads, 16, generator=generator) for heads in (len(peaked), 1, 1)
    )
    code = 9.0 * torch.nn.functional.one_hot(torch.arange(seqlen) // 64 % 8, 8)
    k[:, :, 0, :8] = code
    for head, is_peaked in enumerate(peaked):
        q[:, :, head, :8] = code if is_peaked else 0.0
    return AttentionTensors(q, k, v)


def attend(
    given: AttentionTensors, scale: float, grads: tuple[str, ...] = ("q", "k", "v"), **options
):
    """o, gradients of the sum of its squares, and the blocks kept `[1, H, Sq / 16, Sk / 32]`."""
    options = AttentionOptions(softmax_scale=scale, causal=True, softmax_threshold=SHARE, **options)
    problem = describe(given, options, grads)
    o, lse, kept = backend.forward(problem, given)
    gradients = backend.backward(problem, given, o, lse, kept, 2 * o, None)
    return o, gradients, kept_blocks(kept, given, options).active


@pytest.mark.parametrize("scale", [0.25, -0.25])
def test_heads_that_drop_beside_heads_that_do_not(scale):
    """One head of a group drops, the other does not: each row is visited by one launch."""
    given = tensors(256, (True, False))
    if scale < 0:
        given.q.neg_()
    o, gradients, active = attend(given, scale)
    assert not active[0, 0].all()
    assert active[0, 1].all()
    leaves = {x: getattr(given, x).double().requires_grad_() for x in "qkv"}
    kept = reference.expand_kept(active, KEPT_BLOCK, 256, 256)
    want, _ = reference.attention(**leaves, softmax_scale=scale, causal=True, kept=kept)
    torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=1e-5)
    want.square().sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradients[name].double(), leaf.grad, rtol=1e-4, atol=1e-4)


def test_a_sample_of_many_tiles_decides(monkeypatch):
    """Where there are many tiles, one query tile of some looks at a few of them for all."""
    seqlen, rows = 1280, 64  # of a query tile
    monkeypatch.setattr(screening, "EACH", 8)
    given = tensors(seqlen, (True,))
    full = attend(given, 0.25, grads=("q",))[2][0, 0]
    monkeypatch.setattr(screening, "SAMPLE", 2)
    assert torch.equal(attend(given, 0.25, grads=("q",))[2][0, 0], full)  # it is worth it
    monkeypatch.setattr(screening, "WORTH", 0)  # nothing is
    dropped = ~attend(given, 0.25, grads=("q",))[2][0, 0].unflatten(0, (-1, rows // 16))
    deciding = {7, 15, seqlen // rows - 1}
    for tile, own in enumerate(dropped):
        assert (0 < own[0].sum() <= 4) if tile in deciding else not own.any()


def test_rows_of_a_tile_drop_together():
    """In every word of bits, of the blocks that a map (V5) leaves: others stay as they are, and so
    do query tiles that visit nothing.
    """
    seqlen, rows, block = 1280, 64, KEPT_BLOCK  # rows of a query tile; two words of keys
    generator = torch.Generator().manual_seed(1)
    shape = (1, 1, seqlen // block[0], seqlen // block[1])
    block_map = torch.rand(shape, generator=generator) < 0.95
    block_map[..., : rows // block[0], :] = False  # the first list: before it lies nothing
    given = replace(tensors(seqlen, (True,)), block_map=block_map)
    # No two words of bits alike, so that what one leaves behind is seen in the next.
    code = 9.0 * torch.nn.functional.one_hot(torch.arange(seqlen) // 64 % 7, 8)
    given.q[:, :, 0, :8] = given.k[:, :, 0, :8] = code
    sizes = {"block_size_q": block[0], "block_size_k": block[1]}
    with checked_memory():
        *_, active = attend(given, 0.25, grads=("q",), **sizes)
    assert not (active & ~block_map).any()
    taken = (block_map & ~active)[0, 0].unflatten(0, (-1, rows // block[0]))
    by_tile = taken.any(1, keepdim=True) & block_map[0, 0].unflatten(0, (-1, rows // block[0]))
    assert torch.equal(taken, by_tile)
    keys_per_word = 32 * block[1]
    for first in range(0, seqlen, keys_per_word):
        word = taken[..., first // block[1] : (first + keys_per_word) // block[1]]
        assert word[first // rows + 1 :].any()
    scores = torch.einsum("id,jd->ij", given.q[0, :, 0].double(), given.k[0, :, 0].double()) / 4
    visible = reference.expand_kept(block_map, block, seqlen, seqlen)[0, 0].tril()
    share = scores.masked_fill(~visible, -torch.inf).softmax(1) * visible.sum(1, keepdim=True)
    kept = reference.expand_kept(active, block, seqlen, seqlen)[0, 0]
    assert (share[visible & ~kept] < SHARE).all()  # T1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bounds_hold(dtype):
    """Integers are within their error of what they stand for, outliers included."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 128, 1, 24, generator=generator).to(dtype)
    k[0, 5] *= 30
    k[0, 70] = 0
    given = AttentionTensors(torch.zeros(1, 128, 1, 24, dtype=dtype), k, k)
    problem = describe(given, AttentionOptions(softmax_scale=1.0, softmax_threshold=SHARE), ())
    _, _, terms, _ = backend.kernels.preparation.prepare(problem, given, "forward")
    known = screening._key_bounds(problem, given, terms)
    blocks = k[0, :, 0].double().view(-1, terms.block, 24)
    back = known.keys[0, 0, ..., :24].double() * known.steps[0, 0].double()[:, None, None]
    off = (back - blocks).abs().amax((1, 2)) / known.steps[0, 0]
    assert (off <= screening.HALF.value).all()
    norms = blocks.abs().sum(2).amax(1)
    torch.testing.assert_close(known.norms[0, 0].double(), norms, rtol=1e-6, atol=0)
