"""The softmax threshold on a GPU, at lengths where a sample decides whether rows are looked at."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attn import flash_sparse_attn_func, get_available_backends
from flash_sparse_attn.registry import REFERENCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS = [name for name in get_available_backends() if name != REFERENCE]
SEQLEN, SEGMENT = 8192, 1024


def attend(backend: str, peaked: bool) -> tuple[torch.Tensor, ...]:
    """(o with a threshold, o without, visible blocks that are kept): one head of each kind, or
    two that attend evenly.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, SEQLEN, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    if peaked:
        place = torch.arange(SEQLEN, device="cuda") // SEGMENT
        code = 14 * torch.nn.functional.one_hot(place, SEQLEN // SEGMENT)
        q[:, :, 0, :8] = k[:, :, 0, :8] = code.to(q.dtype)
    options = {"is_causal": True, "backend": backend}
    o, kept = flash_sparse_attn_func(q, k, v, softmax_threshold=0.01, return_kept=True, **options)
    rows, keys = kept.block_size
    last = torch.arange(SEQLEN // rows, device="cuda") * rows + rows - 1
    seen = torch.arange(SEQLEN // keys, device="cuda") * keys <= last[:, None]
    return o, flash_sparse_attn_func(q, k, v, **options), kept.active[0].float()[:, seen]


@pytest.mark.parametrize("backend", KERNELS)
def test_most_of_what_can_go_goes(backend):
    """Of one head seven eighths of the pairs beyond a row's own segment; of the other nothing."""
    o, full, kept = attend(backend, peaked=True)
    segments = SEQLEN // SEGMENT
    own = segments / (segments * segments)  # of causal pairs, roughly
    assert kept[0].mean() < own + 0.25
    assert kept[1].all()
    assert (o - full).abs().max() <= 0.01 * 6 + 0.05  # less than a of the mass, and the rounding


@pytest.mark.parametrize("backend", KERNELS)
def test_where_nothing_can_go_results_are_those_of_no_threshold(backend):
    """Bit by bit: rows that drop nothing are visited as without a threshold."""
    o, full, kept = attend(backend, peaked=False)
    assert kept.all()
    assert torch.equal(o, full)
