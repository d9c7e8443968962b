"""Family names of the cache functions: a 3-D query is one row, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attn import BlockMap, families, flash_sparse_attn_with_kvcache_func

B, SK, HQ, HKV, D, DV = 2, 40, 4, 2, 16, 8


def inputs():
    """q [B, 1, Hq, D], k, v and lengths."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator)

    lengths = torch.tensor([40, 7], dtype=torch.int32)
    return normal(B, 1, HQ, D), normal(B, SK, HKV, D), normal(B, SK, HKV, DV), lengths


def gates():
    generator = torch.Generator().manual_seed(1)
    sizes = (B, 1, HQ), (B, SK, HKV)
    return tuple(torch.randn(size, generator=generator) for size in sizes)


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("return_kept", [False, True])
def test_three_dims_are_one_row(name, return_lse, return_kept):
    q, k, v, lengths = inputs()
    function = getattr(families, f"flash_{name}_attn_with_kvcache_func")
    options = {"cache_seqlens": lengths, "return_lse": return_lse, "return_kept": return_kept}
    want = flash_sparse_attn_with_kvcache_func(q, k, v, **options)
    got = function(q[:, 0], k, v, **options)
    if not (return_lse or return_kept):
        want, got = (want,), (got,)
    assert len(got) == len(want)
    assert torch.equal(got[0], want[0][:, 0])
    assert got[0].shape == (B, HQ, DV)
    if return_lse:
        assert torch.equal(got[1], want[1][:, :, 0])
    if return_kept:
        assert isinstance(got[-1], BlockMap)
        assert torch.equal(got[-1].active, want[-1].active)


def test_four_dims_pass_through():
    q, k, v, _ = inputs()
    got = families.flash_sparse_attn_with_kvcache_func(q, k, v, return_lse=True)
    want = flash_sparse_attn_with_kvcache_func(q, k, v, return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("rows_of_alpha", [True, False])
def test_gated(rows_of_alpha):
    q, k, v, lengths = inputs()
    alpha, delta = gates()
    options = {"cache_seqlens": lengths, "gate": "identity", "gate_threshold": 0.3}
    want = flash_sparse_attn_with_kvcache_func(q, k, v, gates=(alpha, delta), **options)
    given = alpha if rows_of_alpha else alpha[:, 0]
    got = families.flash_gated_attn_with_kvcache_func(q[:, 0], k, v, given, delta, **options)
    assert torch.equal(got, want[:, 0])
    without = flash_sparse_attn_with_kvcache_func(q, k, v, cache_seqlens=lengths)
    assert not torch.allclose(want, without)


@pytest.mark.parametrize("sizes", [(B, HQ), (B, 1, 1, HQ, D)])
def test_other_ranks_are_errors(sizes):
    _, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"rank of query: got .*\[rule E2\]"):
        families.flash_sparse_attn_with_kvcache_func(torch.zeros(sizes), k, v)


def test_what_is_no_tensor_is_an_error():
    q, k, v, _ = inputs()
    with pytest.raises(TypeError, match=r"query: .*\[rule E1\]"):
        families.flash_dense_attn_with_kvcache_func([1.0], k, v)
    with pytest.raises(TypeError, match=r"alpha: .*\[rule E1\]"):
        families.flash_gated_attn_with_kvcache_func(q, k, v, None, gates()[1])
