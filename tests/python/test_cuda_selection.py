"""M5 on a GPU: kernels against the reference's operations, integer by integer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flash_sparse_attn import IntervalMask, get_available_backends, reference, registry
from flash_sparse_attn.selection import KERNEL_DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SELECTING = [
    name for name in get_available_backends() if hasattr(registry.load(name), "topk_intervals")
]
LENGTH = 20_000
LENGTHS = (3000, 1, 0, 128, 4096, 4097, 5, 0, 8192, 400)
"""Of packed sequences; 81 of `LENGTH` tokens are in none."""
NAN, INF = math.nan, math.inf


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def pattern(name: str, generator: torch.Generator) -> Tensor:
    """float32 scores [1, 3, LENGTH]."""
    j = torch.arange(LENGTH, device="cuda").float().expand(1, 3, LENGTH)
    noise = torch.randn(1, 3, LENGTH, device="cuda", generator=generator)
    special = torch.tensor([1.0, NAN, -INF, 0.0, -0.0, INF, -1e-40], device="cuda")
    return {
        "random": noise,
        "rising": noise + j * 1e-3,
        "falling": noise - j * 1e-3,
        "ascending": j,
        "descending": -j,
        "constant": j * 0,
        "sawtooth": j.remainder(1000),
        "falling sawtooth": -j.remainder(777),
        "duplicates": (noise * 2).round(),
        "special": special[(noise * 1e4).long().remainder(7)],
    }[name]


def check(
    scores: Tensor,
    seqlen_q: int,
    window_size: int,
    causal: bool = True,
    keep: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Every backend that selects, and the mask, against the reference."""
    arguments = scores, seqlen_q, window_size, causal, keep, cu_seqlens
    start, end = reference.topk_intervals(*arguments)
    want = start, torch.maximum(start, end)
    rows = seqlen_q if cu_seqlens is None else None
    mask = IntervalMask.topk(scores, window_size, causal, keep, rows, cu_seqlens)
    kernels = SELECTING if scores.dtype in KERNEL_DTYPES else ()
    found = {name: registry.load(name).topk_intervals(*arguments) for name in kernels}
    for name, got in (found | {"mask": (mask.start, mask.end)}).items():
        assert torch.equal(got[0], want[0]), name
        assert torch.equal(got[1], want[1]), name


def test_a_backend_selects():
    assert SELECTING


@pytest.mark.parametrize("window_size", [1, 100, 1024, 5000, LENGTH - 1, LENGTH])
@pytest.mark.parametrize(
    "name",
    [
        "random", "rising", "falling", "ascending", "descending", "constant", "sawtooth",
        "falling sawtooth", "duplicates", "special",
    ],
)  # fmt: skip
def test_patterns(name, window_size, generator):
    check(pattern(name, generator), LENGTH, window_size)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
def test_dtypes_layouts_and_padding(dtype, causal, generator):
    scores = torch.randn(2, 5003, 3, device="cuda", generator=generator).to(dtype).transpose(1, 2)
    keep = torch.rand(2, 1, 5003, device="cuda", generator=generator) < 0.7
    for seqlen_q in (5003, 1, 777, 6000):
        check(scores, seqlen_q, 300, causal, keep)
    check(scores[:1, :1], 5003, 300, causal, keep.expand(2, 3, 5003))


@pytest.mark.parametrize("seqlen_k", [0, 1, 127, 128, 129, 4095, 4096, 4097, 8192])
def test_lengths(seqlen_k, generator):
    check(torch.randn(1, 2, seqlen_k, device="cuda", generator=generator), seqlen_k, 50)


def test_a_long_sequence(generator):
    check(torch.randn(1, 2, 600_001, device="cuda", generator=generator), 600_001, 1024)


def boundaries(*lengths: int) -> Tensor:
    return torch.tensor((0, *lengths), device="cuda").cumsum(0).int()


@pytest.mark.parametrize("window_size", [1, 100, 1024, 5000])
@pytest.mark.parametrize("name", ["random", "ascending", "descending", "constant", "special"])
def test_packed_patterns(name, window_size, generator):
    check(pattern(name, generator), -1, window_size, cu_seqlens=boundaries(*LENGTHS))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64], ids=str)
def test_packed_dtypes_layouts_and_padding(dtype, causal, generator):
    scores = torch.randn(1, LENGTH, 3, device="cuda", generator=generator).to(dtype)
    keep = torch.rand(1, 1, LENGTH, device="cuda", generator=generator) < 0.7
    check(scores.transpose(1, 2), -1, 300, causal, keep, boundaries(*LENGTHS))


@pytest.mark.parametrize("causal", [True, False])
def test_packed_lengths(causal, generator):
    """One long sequence, whose segments grow; thousands of short ones; none."""
    scores = torch.randn(1, 2, 300_001, device="cuda", generator=generator)
    short = torch.arange(5000).remainder(61).tolist()
    for lengths in ((300_001,), (1, 299_000), short, ()):
        check(scores, -1, 1024, causal, cu_seqlens=boundaries(*lengths))


def test_packed_replay_with_other_boundaries(generator):
    scores = torch.randn(1, 2, LENGTH, device="cuda", generator=generator)
    cu_seqlens = boundaries(*LENGTHS)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        IntervalMask.topk(scores, 1000, cu_seqlens=cu_seqlens)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        mask = IntervalMask.topk(scores, 1000, cu_seqlens=cu_seqlens)
    for lengths in (LENGTHS[::-1], (LENGTH,), (7,) * 9, (0,) * 10):
        lengths += (0,) * (len(LENGTHS) - len(lengths))
        cu_seqlens.copy_(boundaries(*lengths))
        graph.replay()
        want = reference.topk_intervals(scores, -1, 1000, cu_seqlens=cu_seqlens)
        assert torch.equal(mask.start, want[0])
        assert torch.equal(mask.end, want[1])


def test_graph_capture_and_replay(generator):
    scores = torch.randn(1, 2, LENGTH, device="cuda", generator=generator)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        IntervalMask.topk(scores, 1000)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        mask = IntervalMask.topk(scores, 1000)
    scores.copy_(torch.randn(scores.shape, device="cuda", generator=generator))
    graph.replay()
    want = IntervalMask.topk(scores, 1000)
    assert torch.equal(mask.start, want.start)
    assert torch.equal(mask.end, want.end)


def test_nothing_waits_for_the_device(generator):
    scores = torch.randn(1, 2, LENGTH, device="cuda", generator=generator)
    cu_seqlens = boundaries(*LENGTHS)
    IntervalMask.topk(scores, 1000)
    IntervalMask.topk(scores, 1000, cu_seqlens=cu_seqlens)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        IntervalMask.topk(scores, 1000)
        IntervalMask.topk(scores, 1000, cu_seqlens=cu_seqlens)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_linear(packed, generator):
    """Beside the result at most 40 bytes a key; a matrix of pairs would be 10^10 bits. Of packed
    sequences, one of which is long, as many bytes for each place of a whole block.
    """
    scores = torch.randn(1, 1, 100_000, device="cuda", generator=generator)
    cu_seqlens = boundaries(90_000, *(100,) * 100) if packed else None
    places = scores.numel() + (128 * 101 if packed else 0)
    IntervalMask.topk(scores, 1024, cu_seqlens=cu_seqlens)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = IntervalMask.topk(scores, 1024, cu_seqlens=cu_seqlens)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= mask.start.nbytes + mask.end.nbytes + 40 * places
