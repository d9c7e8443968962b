"""What the host works out once for calls that are alike: every input of it tells calls apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", minversion="3.5")

from flash_sparse_attn.backends.triton.kernels import arguments, decode, tuning
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_sparse_attn import dispatch, ops
from flash_sparse_attn.problem import AttentionOptions, Form
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe

SIZES = {"B": 2, "S": 256, "H": 2, "D": 64}


def cache(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*SIZES.values(), dtype=dtype)


def problem(**changes: object):
    """A decoding call of an H200, one token."""
    q, options = torch.zeros(2, 1, 8, 64, dtype=torch.bfloat16), {"softmax_scale": 0.1}
    made = describe(
        AttentionTensors(q, cache(), cache()), AttentionOptions(form=Form.CACHE, **options)
    )
    return replace(made, **{"device": "cuda", "arch": 90} | changes)


def test_the_copy_engine_reads_what_it_can():
    """Layouts of one shape, in turn: strides, alignment and dtype decide."""
    whole = cache()
    padded = torch.zeros(2, 256, 2, 72, dtype=torch.bfloat16)[..., :64]
    odd = torch.zeros(2, 256, 2, 65, dtype=torch.bfloat16)[..., :64]
    shifted = torch.zeros(whole.numel() + 1, dtype=torch.bfloat16)[1:].view(whole.shape)
    transposed = torch.zeros(2, 256, 64, 2, dtype=torch.bfloat16).transpose(2, 3)
    expanded = cache()[:, :1].expand(whole.shape)
    for _ in range(2):
        for tensor, reads in (
            (whole, True), (padded, True), (odd, False), (shifted, False), (transposed, False),
            (expanded, False), (cache(torch.float32), True), (whole[:0], False),
        ):  # fmt: skip
            found = arguments.source(tensor, 64, 64, tma=True)
            assert isinstance(found, TensorDescriptor) == reads
            if reads:
                batch, row, head, column = tensor.stride()
                assert found.base.data_ptr() == tensor.data_ptr()
                assert list(found.shape) == [2, 2, 256, 64]
                assert list(found.strides) == [batch, head, row, column]
                assert list(found.block_shape) == [1, 1, 64, 64]
        assert not isinstance(arguments.source(whole, 64, 64, tma=False), TensorDescriptor)


def test_the_stride_of_a_dim_of_one_is_valid():
    """Whatever it is, as it is never used."""
    one = torch.zeros(256, 64, dtype=torch.bfloat16).as_strided((1, 256, 1, 64), (1, 64, 3, 1))
    found = arguments.source(one, 64, 64, tma=True)
    assert isinstance(found, TensorDescriptor)
    assert all(stride % 8 == 0 for stride in found.strides[:-1])


def test_plans_tell_calls_apart():
    """One cache of plans serves every device and every layout of the cache."""
    large = {"batch": 4, "seqlen_k": 65536}
    plain = decode.plan(problem(**large), 132)
    assert decode.plan(problem(**large), 66).splits < plain.splits
    assert decode.plan(problem(**large), 132) == plain
    paged = decode.plan(problem(**large, page_size=64), 132)
    assert paged.tile.block_n == 64
    small = decode.plan(problem(**large, page_size=16), 132)
    assert not small.tile.tma
    assert decode.plan(problem(**large, entries=1024), 132).repeats_tested
    assert not decode.plan(problem(**large, entries=1025), 132).repeats_tested
    assert decode.plan(problem(**large, arch=80), 132).tile != plain.tile


def test_launches_tell_plans_and_problems_apart():
    made = problem(seqlen_k=4096)
    cut = decode.plan(made, 132)
    fixed = decode._fixed(made, cut)
    assert decode._fixed(replace(made), replace(cut)) is fixed
    assert decode._fixed(replace(made, softmax_scale=0.2), cut).score != fixed.score
    assert decode._fixed(made, replace(cut, splits=1)).of_values["FINAL"]
    assert not decode._fixed(replace(made, arch=80), cut).overlaps[1]["OVERLAP"]


def test_tiles_are_no_longer_than_the_blocks_of_a_map():
    """What `tuning.tile` takes for granted, and what it is for."""
    rows = [row["m"] for kernel in ("forward", "query_gradients") for row in tuning.TABLE[kernel]]
    assert max(rows) == tuning.MOST_ROWS
    for dim in (64, 128):
        for size in (64, 128):
            made = problem(
                form=Form.BATCHED, head_dim=dim, head_dim_v=dim, block_map=(1, 1, 4, 4),
                block_size_q=size, block_size_k=size,
            )  # fmt: skip
            assert tuning.tile("forward", made).block_m <= size


@pytest.mark.parametrize(
    "of",
    [
        ops._validated, dispatch.select, tuning.tile, decode.plan, decode._fixed,
        arguments._copy_engine_steps,
    ],
)  # fmt: skip
def test_what_is_kept_is_bounded(of):
    assert of.cache_info().maxsize is not None
