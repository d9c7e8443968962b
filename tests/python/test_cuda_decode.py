"""Decoding on a GPU: graphs outlive the lengths, pages and lists that they were captured with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_sparse_attn import flash_sparse_attn_with_kvcache_func, get_available_backends
from flash_sparse_attn.registry import REFERENCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS = [name for name in get_available_backends() if name != REFERENCE]
B, SK, HQ, HKV, D = 3, 2048, 8, 2, 64
PAGE = 16
KINDS = ("contiguous", "pages", "short lists", "long lists", "threshold", "gates")


class Inputs:
    """A call of some kind; `change` gives other lengths, pages and lists in the same memory."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.q = self.normal(B, 2, HQ, D)
        self.k, self.v = (self.normal(B, SK, HKV, D) for _ in range(2))
        lengths = torch.tensor([SK, 0, 700], dtype=torch.int32, device="cuda")
        self.options = {"cache_seqlens": lengths}
        if kind == "pages":
            self.k, self.v = (x.view(-1, PAGE, HKV, D) for x in (self.k, self.v))
            self.options["page_table"] = self.pages()
        if kind.endswith("lists"):
            self.count = 300 if kind == "short lists" else 1500
            self.options["attn_indices"] = self.lists()
        if kind == "threshold":
            self.q *= 4
            self.options["softmax_threshold"] = 0.5
        if kind == "gates":
            self.options["gates"] = self.normal(B, 2, HQ), self.normal(B, SK, HKV)
            self.options["gate_threshold"] = 0.5

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device="cuda").bfloat16()

    def pages(self) -> Tensor:
        order = torch.randperm(B * SK // PAGE, generator=self.generator, device="cuda")
        return order.int().view(B, -1)

    def lists(self) -> Tensor:
        sizes = (B, HKV, self.count)
        drawn = torch.randint(-1, SK + 2, sizes, generator=self.generator, device="cuda")
        return drawn.int()

    def change(self) -> None:
        lengths = torch.tensor([5, SK, 1999], dtype=torch.int32)
        self.options["cache_seqlens"].copy_(lengths)
        if "page_table" in self.options:
            self.options["page_table"].copy_(self.pages())
        if "attn_indices" in self.options:
            self.options["attn_indices"].copy_(self.lists())

    def run(self, backend: str) -> tuple[Tensor, Tensor]:
        """(o, lse)."""
        return flash_sparse_attn_with_kvcache_func(
            self.q, self.k, self.v, return_lse=True, backend=backend, **self.options
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_graph_stays_valid(backend, kind):
    """What a replay gives is, bit by bit, what a call on the changed inputs gives."""
    inputs = Inputs(kind)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        inputs.run(backend)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = inputs.run(backend)
    inputs.change()
    graph.replay()
    got = [x.clone() for x in captured]
    want = inputs.run(backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    if kind != "threshold":  # whose o is that of the kept set
        o, lse = inputs.run(REFERENCE)
        torch.testing.assert_close(got[0], o, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got[1], lse, rtol=1e-4, atol=1e-4)


def side_streams() -> list[torch.cuda.Stream]:
    """Two streams that what is on the current one precedes."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    return streams


def require_equal(results: list[tuple[Tensor, ...]], want: tuple[Tensor, ...]) -> None:
    torch.cuda.synchronize()
    for found in results:
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", KERNELS)
def test_calls_that_overlap(backend, kind):
    """Calls on two streams, and many in turn in the same memory, give what one alone gives."""
    inputs = Inputs(kind)
    want = inputs.run(backend)
    torch.cuda.synchronize()
    results = []
    for stream in side_streams() * 20:
        with torch.cuda.stream(stream):
            results.append(inputs.run(backend))
            inputs.run(backend)  # into memory that is free again at once
    require_equal(results, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", KERNELS)
def test_graphs_that_overlap(backend, kind):
    """Two graphs of several calls each, replayed at the same time, again and again."""
    inputs = Inputs(kind)
    want = inputs.run(backend)
    streams = side_streams()
    graphs, results = [], []
    for stream in streams:
        with torch.cuda.stream(stream):
            inputs.run(backend)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results += [inputs.run(backend) for _ in range(3)]
        graphs.append(graph)
    for _ in range(10):
        for x in results:
            x[0].fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        require_equal(results, want)


@pytest.mark.parametrize("backend", KERNELS)
def test_what_follows_reads_all_of_it(backend):
    """A kernel launched after a call, and one before it, do not overlap with it."""
    inputs = Inputs("contiguous")
    want = inputs.run(backend)
    q = inputs.q.clone()
    results = []
    for _ in range(50):
        inputs.q.zero_()
        inputs.q.copy_(q)
        results.append(tuple(x.clone() for x in inputs.run(backend)))
    require_equal(results, want)


@pytest.mark.parametrize("backend", KERNELS)
def test_offsets_beyond_32_bits(backend):
    """The last sequence of a cache of more than 2^31 elements."""
    batch, seqlen, heads, dim = 3, 8192, 64, 2048
    needed = 2 * batch * seqlen * heads * dim
    if torch.cuda.mem_get_info()[0] < needed + 2**31:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB")
    wide = torch.empty(batch, seqlen, heads, dim, device="cuda", dtype=torch.bfloat16)
    cache = wide[..., :D]
    cache.normal_()
    q = torch.randn(batch, 1, heads, D, device="cuda").bfloat16()
    o = flash_sparse_attn_with_kvcache_func(q, cache, cache, backend=backend)
    own = cache[-1:].contiguous()
    want = flash_sparse_attn_with_kvcache_func(q[-1:], own, own, backend=backend)
    torch.testing.assert_close(o[-1:], want, rtol=1e-2, atol=1e-3)
