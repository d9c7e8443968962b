"""The cache of dynamic mask attention on a GPU: kernels against PyTorch's operations, generation
against full recomputation, a step as a captured graph.
"""

from __future__ import annotations

import math

import pytest
import torch
from flash_sparse_attn.spec import tolerances
from torch import Tensor

from flash_sparse_attn import get_available_backends, registry
from flash_sparse_attn.modules import DynamicMaskCache
from flash_sparse_attn.registry import REFERENCE
from flash_sparse_attn.streaming import admit_by_operations

from ..conformance.compare import failures
from .generation import VOCAB, Generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ADMITTING = [name for name in get_available_backends() if hasattr(registry.load(name), "admit")]
KERNELS = [name for name in get_available_backends() if name != REFERENCE]
STATE = ("key", "value", "scores", "position", "_held", "_seqlen")
PROMPT, GENERATED, WINDOW = 100, 2000, 128
TOKENS = PROMPT + GENERATED


def state(cache: DynamicMaskCache) -> list[Tensor]:
    return [getattr(cache, name) for name in STATE]


def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(sizes, device="cuda").to(dtype)


# --- the kernel


def test_a_backend_admits():
    assert ADMITTING


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("window", "dtype"),
    [
        (1, torch.float32),
        (7, torch.float16),
        (1000, torch.bfloat16),
        (1024, torch.bfloat16),
        (5000, torch.float32),
    ],
)
@pytest.mark.parametrize("backend", ADMITTING)
def test_the_kernel_does_what_operations_do(backend, window, dtype, padded):
    """Slot by slot, many tokens after a prompt that fills the cache all but 20 slots."""
    torch.manual_seed(0)
    batch, heads, dim, dim_v, special = 3, 2, 80, 33, (math.nan, math.inf, -math.inf, -0.0)
    caches = [DynamicMaskCache(batch, window, heads, dim, dim_v, "cuda", dtype) for _ in range(2)]
    prompt = max(window - 20, 0)
    new = normal(batch, prompt, heads, dim, dtype=dtype), normal(batch, prompt, heads, dim_v)
    for cache in caches:
        cache.admit(new[0], new[1].to(dtype), normal(batch, heads, prompt) * 0)
    for token in range(60):
        k = normal(batch, heads, 1, dim, dtype=dtype).transpose(1, 2)
        v = normal(batch, 1, heads, 2 * dim_v, dtype=dtype)[..., ::2]
        scores = normal(batch, heads, 1).round()
        if token % 3 == 0:
            scores[token % batch, token % heads] = special[token // 3 % 4]
        keep = torch.rand(batch, 2, device="cuda")[:, 1:] < 0.7 if padded else None
        registry.load(backend).admit(*state(caches[0]), k, v, scores, keep)
        admit_by_operations(*state(caches[1]), k, v, scores, keep)
    for name, got, want in zip(STATE, *map(state, caches), strict=True):
        assert torch.equal(got.nan_to_num(12345.0), want.nan_to_num(12345.0)), name


# --- rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", KERNELS)
def test_rows_are_those_of_attention_over_all_tokens(backend, dtype):
    """N1 over a prompt, tokens one by one, and several at once; the choice is exact."""
    torch.manual_seed(0)
    kind, seqlen, window = getattr(torch, dtype), 400, 64
    q, k, v = (normal(2, seqlen, heads, 64, dtype=kind) for heads in (8, 2, 2))
    scores = (normal(2, 2, seqlen) * 3).round() / 3
    cache, rows, at = DynamicMaskCache(2, window, 2, 64, device="cuda", dtype=kind), [], 0
    for n in (200, *[1] * 150, 17, 3, *[1] * 30):
        own = slice(at, at + n)
        new = q[:, own], k[:, own], v[:, own], scores[..., own]
        rows.append(cache.attend(*new, backend=backend))
        at += n
    assert at == seqlen

    i = torch.arange(seqlen, device="cuda")
    better = scores[:, :, None] > scores[..., None]  # [B, Hkv, j, other]
    better |= (scores[:, :, None] == scores[..., None]) & (i > i[:, None])
    joined = i <= i[:, None]  # [row, other]
    rank = torch.einsum("bnjo,io->bnij", better.float(), joined.float())
    mask = (rank < window) & joined
    results = {}
    for name, wide in (("exact", torch.float64), ("eager", kind)):
        parts = []
        for h in range(8):
            n = h // 4
            s = q[:, :, h].to(wide) @ k[:, :, n].to(wide).mT * 64**-0.5
            s = s + scores[:, n, None].to(torch.promote_types(wide, torch.float32))
            p = s.masked_fill(~mask[:, n], -math.inf).softmax(-1)
            parts.append(p.to(wide) @ v[:, :, n].to(wide))
        results[name] = {"o": torch.stack(parts, 2)}
    got = {"o": torch.cat(rows, 1)}
    broken = failures(got, results["exact"], results["eager"], tolerances()[dtype])
    assert not broken, "; ".join(broken)


# --- generation


def written() -> Tensor:
    tokens = torch.zeros(1, TOKENS, device="cuda", dtype=torch.long)
    random = torch.Generator().manual_seed(1)
    tokens[:, :PROMPT] = torch.randint(VOCAB, (1, PROMPT), generator=random)
    return tokens


def require_recomputed(model: Generator, tokens: Tensor) -> None:
    """Every token is the one that a call over all tokens chooses."""
    assert torch.equal(model.choose(tokens)[:, PROMPT - 1 : -1], tokens[:, PROMPT:])
    assert len(tokens[:, PROMPT:].unique()) > 20
    dense = Generator(TOKENS, TOKENS, device="cuda").choose(tokens)
    assert not torch.equal(dense[:, PROMPT - 1 : -1], tokens[:, PROMPT:])  # the choice matters


@torch.no_grad()
def test_2000_tokens_are_those_of_full_recomputation():
    model, tokens = Generator(TOKENS, WINDOW, device="cuda"), written()
    cache = model.layer.allocate_cache(1)
    positions = torch.arange(TOKENS, device="cuda")
    logits = model(tokens[:, :PROMPT], positions[:PROMPT], cache)
    for at in range(PROMPT, TOKENS):
        tokens[:, at] = logits[:, -1].argmax(-1)
        logits = model(tokens[:, at : at + 1], positions[at : at + 1], cache)
    require_recomputed(model, tokens)


@torch.no_grad()
def test_2000_tokens_by_replays_of_one_graph():
    """Token, position and cache live on the device: one captured step writes them all."""
    model, tokens = Generator(TOKENS, WINDOW, device="cuda"), written()
    cache = model.layer.allocate_cache(1)
    token = torch.zeros(1, 1, device="cuda", dtype=torch.long)

    def step() -> None:
        index = cache.seqlen[:, None].long()
        tokens.scatter_(1, index, token)
        token.copy_(model(token, index, cache)[:, -1:].argmax(-1))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    cache.reset()
    tokens.copy_(written())
    prompt = model(tokens[:, :PROMPT], torch.arange(PROMPT, device="cuda"), cache)
    token.copy_(prompt[:, -1:].argmax(-1))
    for _ in range(PROMPT, TOKENS):
        graph.replay()
    assert cache.seqlen.item() == TOKENS
    require_recomputed(model, tokens)


# --- cost


def test_nothing_waits_for_the_device():
    cache = DynamicMaskCache(2, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    calls = [
        (*(normal(2, n, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2)), normal(2, 2, n))
        for n in (100, 5, 1)
    ]
    for call in calls:
        cache.attend(*call)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            cache.attend(*call)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_memory_does_not_depend_on_the_context():
    cache = DynamicMaskCache(1, 256, 2, 64, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for prompt in (1000, 30_000):
        cache.reset()
        new = (normal(1, prompt, 2, 64, dtype=torch.bfloat16) for _ in range(2))
        cache.admit(*new, normal(1, 2, prompt))
        del new
        tokens = (*(normal(1, 1, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2)),)
        cache.attend(*tokens, normal(1, 2, 1))  # what is kept from a first call on is not a token's
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(20):
            cache.attend(*tokens, normal(1, 2, 1))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[0] == peaks[1]
