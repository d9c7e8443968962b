"""The cache of dynamic mask attention against attention over all tokens, whatever the calls."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flash_sparse_attn import flash_sparse_attn_func
from flash_sparse_attn.modules import DynamicMaskCache

from .generation import Generator

B, HQ, HKV, D, DV = 2, 4, 2, 8, 5
S = 30
NAN, INF = math.nan, math.inf
CHUNKS = {
    "tokens": [1] * S,
    "prompt and tokens": [17, *[1] * (S - 17)],
    "mixed": [1, 4, 0, 7, 1, 1, 13, 3],
    "one call": [S],
    "two calls": [12, S - 12],
}
STATE = ("key", "value", "scores", "position", "_held", "_seqlen")


class Inputs:
    """Tokens: q [B, S, Hq, D], k [B, S, Hkv, D], v [B, S, Hkv, Dv], scores [B, Hkv, S]."""

    def __init__(self, scores: str = "random", dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

        self.q, self.k, self.v = normal(B, S, HQ, D), normal(B, S, HKV, D), normal(B, S, HKV, DV)
        noise = normal(B, HKV, S)
        special = torch.tensor([1.0, -INF, 0.0, NAN, -0.0, 2.0, -INF, NAN], dtype=dtype)
        self.scores = {
            "random": noise,
            "ties": (noise * 1.5).round(),
            "constant": noise * 0,
            "rising": noise.sort(-1).values,
            "falling": noise.sort(-1, descending=True).values,
            "special": special[(noise * 100).long().remainder(8)],
        }[scores]
        self.keep = torch.rand(B, S, generator=generator) < 0.6
        self.keep[0, :6] = False
        self.keep[1, 20:25] = False

    def empty_cache(self, window: int) -> DynamicMaskCache:
        return DynamicMaskCache(B, window, HKV, D, DV, dtype=self.k.dtype)

    def stream(self, cache: DynamicMaskCache, sizes: list[int], padded: bool = False) -> Tensor:
        """All rows, so many tokens a call."""
        rows, at = [], 0
        for n in sizes:
            own = slice(at, at + n)
            keep = self.keep[:, own] if padded else None
            new = self.q[:, own], self.k[:, own], self.v[:, own], self.scores[..., own]
            rows.append(cache.attend(*new, keep))
            at += n
        assert at == S
        return torch.cat(rows, 1)

    def ranked(self, i: int, padded: bool = False) -> list[list[list[int]]]:
        """M5 in its own words: by batch entry and head, the keys that row i may see, best first."""

        def key(b: int, n: int, j: int) -> tuple[bool, float, int]:
            score = self.scores[b, n, j].item()
            return math.isnan(score), 0 if math.isnan(score) else -score, -j

        seen = [[j for j in range(i + 1) if not padded or self.keep[b, j]] for b in range(B)]
        return [
            [sorted(seen[b], key=lambda j, b=b, n=n: key(b, n, j)) for n in range(HKV)]
            for b in range(B)
        ]

    def whole(self, window: int, padded: bool = False) -> Tensor:
        """All rows by a dense mask over all tokens."""
        mask = torch.zeros(B, HKV, S, S, dtype=torch.bool)
        for i in range(S):
            for b, heads in enumerate(self.ranked(i, padded)):
                for n, keys in enumerate(heads):
                    mask[b, n, i, keys[:window]] = True
        return flash_sparse_attn_func(
            self.q, self.k, self.v, attn_mask=mask, attn_bias=self.scores[:, :, None]
        )


def state(cache: DynamicMaskCache) -> dict[str, Tensor]:
    return {name: getattr(cache, name) for name in STATE}


# --- what it computes


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scores", ["random", "ties", "constant", "rising", "falling", "special"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_rows_are_those_of_attention_over_all_tokens(chunks, scores, padded):
    inputs = Inputs(scores)
    got = inputs.stream(inputs.empty_cache(5), CHUNKS[chunks], padded)
    want = inputs.whole(5, padded)
    rows = inputs.keep if padded else torch.ones_like(inputs.keep)  # those of padding mean nothing
    torch.testing.assert_close(got[rows], want[rows], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [1, 2, S - 1, S, S + 9])
@pytest.mark.parametrize("chunks", ["tokens", "mixed"])
def test_windows(chunks, window, dtype):
    inputs = Inputs("ties", dtype)
    cache = inputs.empty_cache(window)
    torch.testing.assert_close(inputs.stream(cache, CHUNKS[chunks]), inputs.whole(window))
    assert cache.held.tolist() == [min(window, S)] * B


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("scores", ["ties", "special"])
def test_it_holds_the_best_keys_so_far(scores, chunks):
    """After every call: which tokens, and what is theirs; unused slots say so."""
    inputs, at = Inputs(scores), 0
    cache = inputs.empty_cache(5)
    for n in CHUNKS[chunks]:
        own = slice(at, at + n)
        new = inputs.k[:, own], inputs.v[:, own], inputs.scores[..., own]
        cache.admit(*new, inputs.keep[:, own])
        at += n
        assert cache.seqlen.tolist() == [at] * B
        for b, heads in enumerate(inputs.ranked(at - 1, padded=True)):
            held = cache.held[b].item()
            for h, keys in enumerate(heads):
                tokens = cache.position[b, h, :held]
                assert sorted(tokens.tolist()) == sorted(keys[:5])
                assert torch.equal(cache.key[b, :held, h], inputs.k[b, tokens.long(), h])
                assert torch.equal(cache.value[b, :held, h], inputs.v[b, tokens.long(), h])
                want = inputs.scores[b, h, tokens.long()]
                torch.testing.assert_close(
                    cache.scores[b, h, :held], want, rtol=0, atol=0, equal_nan=True
                )
                assert (cache.position[b, h, held:] == -1).all()


def test_a_sequence_of_nothing_but_padding():
    inputs = Inputs()
    inputs.keep[0] = False
    cache = inputs.empty_cache(4)
    inputs.stream(cache, CHUNKS["mixed"], padded=True)
    assert cache.held.tolist() == [0, 4]
    assert cache.seqlen.tolist() == [S, S]


def test_scale_reaches_both_forms():
    inputs = Inputs()
    for n in (1, 3):
        new = inputs.q[:, :n], inputs.k[:, :n], inputs.v[:, :n], inputs.scores[..., :n]
        flat = new[0] * 0, *new[1:]
        got, want = (
            inputs.empty_cache(4).attend(*x, softmax_scale=c) for x, c in ((new, 0.0), (flat, None))
        )
        torch.testing.assert_close(got, want)


def test_memory_is_constant_and_in_place():
    inputs = Inputs()
    cache = inputs.empty_cache(4)
    before = {name: (x.data_ptr(), x.shape, x.stride()) for name, x in state(cache).items()}
    assert sum(x.nbytes for x in state(cache).values()) == B * HKV * (
        4 * ((D + DV + 1) * 8 + 4) + 2 * 4
    )
    for sizes in CHUNKS.values():
        inputs.stream(cache, sizes)
    assert cache.seqlen.tolist() == [S * len(CHUNKS)] * B
    after = {name: (x.data_ptr(), x.shape, x.stride()) for name, x in state(cache).items()}
    assert after == before


def test_reset_is_a_new_cache():
    inputs = Inputs()
    cache = inputs.empty_cache(4)
    want = inputs.stream(cache, CHUNKS["mixed"])
    cache.reset()
    assert cache.held.tolist() == cache.seqlen.tolist() == [0, 0]
    assert torch.equal(inputs.stream(cache, CHUNKS["mixed"]), want)


def test_strides_of_new_tokens_do_not_matter():
    inputs, strided = Inputs(), Inputs()
    for name in ("q", "k", "v", "scores"):
        x = getattr(strided, name)
        setattr(strided, name, x.transpose(1, -1).contiguous().transpose(1, -1))
    caches = inputs.empty_cache(4), strided.empty_cache(4)
    for n in ("tokens", "mixed"):
        got, want = strided.stream(caches[0], CHUNKS[n]), inputs.stream(caches[1], CHUNKS[n])
        torch.testing.assert_close(got, want)
    for name, x in state(caches[0]).items():
        assert torch.equal(x, getattr(caches[1], name)), name


def test_sizes_and_dtypes():
    cache = DynamicMaskCache(3, 7, 2, 16, 8, dtype=torch.bfloat16)
    assert cache.window_size == 7
    assert (cache.key.shape, cache.value.shape) == ((3, 7, 2, 16), (3, 7, 2, 8))
    assert cache.scores.shape == cache.position.shape == (3, 2, 7)
    assert cache.held.shape == cache.seqlen.shape == (3,)
    kinds = {x.dtype for x in (cache.position, cache.held, cache.seqlen)}
    assert kinds == {torch.int32}
    assert (cache.key.dtype, cache.scores.dtype) == (torch.bfloat16, torch.float32)
    assert DynamicMaskCache(1, 1, 1, 4, dtype=torch.float64).scores.dtype == torch.float64
    assert DynamicMaskCache(1, 1, 1, 4, device="meta").value.shape == (1, 1, 1, 4)


# --- generation


def test_generated_tokens_are_those_of_full_recomputation():
    tokens, prompt = 240, 12
    model = Generator(tokens, window_size=24, dtype=torch.float64)
    with torch.no_grad():
        written = torch.randint(61, (2, tokens), generator=torch.Generator().manual_seed(1))
        cache = model.layer.allocate_cache(2)
        logits = model(written[:, :prompt], torch.arange(prompt), cache)
        for at in range(prompt, tokens):
            written[:, at] = logits[:, -1].argmax(-1)
            logits = model(written[:, at : at + 1], torch.tensor([at]), cache)
        assert torch.equal(model.choose(written)[:, prompt - 1 : -1], written[:, prompt:])
        assert len(written[:, prompt:].unique()) > 20  # not one token again and again
        # The choice matters: with all keys it would write other tokens.
        dense = Generator(tokens, window_size=tokens, dtype=torch.float64).choose(written)
        assert not torch.equal(dense[:, prompt - 1 : -1], written[:, prompt:])


# --- PyTorch's machinery


def arguments(window: int, padded: bool) -> tuple[Tensor | None, ...]:
    """Of the operator, with a token to admit."""
    inputs = Inputs("ties", torch.float32)
    cache = inputs.empty_cache(window)
    cache.admit(inputs.k[:, :4], inputs.v[:, :4], inputs.scores[..., :4])
    new = inputs.k[:, 4:5], inputs.v[:, 4:5], inputs.scores[..., 4:5]
    return *state(cache).values(), *new, inputs.keep[:, 4:5] if padded else None


@pytest.mark.parametrize("window", [3, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_operator_passes_opcheck(window, padded):
    torch.library.opcheck(torch.ops.flash_sparse_attn.admit.default, arguments(window, padded))


@pytest.mark.parametrize("n", [1, 3])
def test_calls_compile_to_one_graph(n):
    inputs = Inputs()
    caches = inputs.empty_cache(4), inputs.empty_cache(4)
    compiled = torch.compile(DynamicMaskCache.attend, fullgraph=True, backend="aot_eager")
    for at in range(0, 4 * n, n):
        own = slice(at, at + n)
        new = inputs.q[:, own], inputs.k[:, own], inputs.v[:, own], inputs.scores[..., own]
        got, want = compiled(caches[0], *new), caches[1].attend(*new)
        torch.testing.assert_close(got, want)
        for name, x in state(caches[0]).items():
            assert torch.equal(x, getattr(caches[1], name)), name


def test_inference_mode():
    inputs = Inputs()
    with torch.inference_mode():
        got = inputs.stream(inputs.empty_cache(5), CHUNKS["mixed"])
    torch.testing.assert_close(got, inputs.whole(5))


# --- errors


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"batch_size": -1}, ValueError, r"batch_size: got -1, expected an int >= 0 \[rule E6\]"),
        ({"window_size": 0}, ValueError, r"window_size: got 0, expected an int >= 1 \[rule E6\]"),
        ({"window_size": 2.0}, TypeError, r"window_size: got 2.0, .* \[rule E1\]"),
        ({"num_kv_heads": True}, TypeError, r"num_kv_heads: got True, .* \[rule E1\]"),
        ({"head_dim": 257}, ValueError, r"head_dim: got 257, expected at most 256 \[rule E7\]"),
        ({"head_dim_v": 0}, ValueError, r"head_dim_v: got 0, .* \[rule E6\]"),
        ({"dtype": torch.int32}, TypeError, r"dtype: got torch.int32, .* \[rule E3\]"),
    ],
)
def test_size_errors(changes, kind, words):
    sizes = {"batch_size": 2, "window_size": 4, "num_kv_heads": 2, "head_dim": 8}
    with pytest.raises(kind, match=words):
        DynamicMaskCache(**sizes | changes)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("name", "change", "kind", "words"),
    [
        ("q", lambda x: None, TypeError, r"query: got NoneType, .* \[rule E1\]"),
        ("q", lambda x: x[:, :, :3], ValueError, r"heads of query: got 3, .* 2 heads .*E2\]"),
        ("q", lambda x: x[..., :7], ValueError, r"shape of query: got .* \[rule E2\]"),
        ("q", lambda x: x.float(), TypeError, r"dtype of query: got torch.float32, .*E3\]"),
        ("k", lambda x: x[0], ValueError, r"shape of key: .* expected \(2, n, 2, 8\) \[rule E2\]"),
        ("k", lambda x: x[:1], ValueError, r"shape of key: got \(1, .* \[rule E2\]"),
        ("v", lambda x: x[..., :4], ValueError, r"shape of value: got .*, 5\) \[rule E2\]"),
        ("v", lambda x: x.half(), TypeError, r"dtype of value: got torch.float16, .* \[rule E3\]"),
        ("scores", lambda x: x[:, :1], ValueError, r"shape of scores: .* \[rule E2\]"),
        ("scores", lambda x: x.float(), TypeError, r"dtype of scores: .*float64, .* \[rule E3\]"),
        ("scores", lambda x: x.to("meta"), ValueError, r"device of scores: got meta, .*E4\]"),
        ("keep", lambda x: [True], TypeError, r"key_padding_mask: got list, .* \[rule E1\]"),
        ("keep", lambda x: x.float(), TypeError, r"dtype of key_padding_mask: .* \[rule E3\]"),
        ("keep", lambda x: x[:1], ValueError, r"shape of key_padding_mask: .* \[rule E5\]"),
        (
            "v",
            lambda x: x.requires_grad_(),
            NotImplementedError,
            r"gradients: got value that require one, .*torch.no_grad.* \[rule E9\]",
        ),
    ],
)  # fmt: skip
def test_call_errors_leave_the_cache_as_it_was(name, change, kind, words, n):
    inputs = Inputs()
    cache = inputs.empty_cache(4)
    new = {x: getattr(inputs, x)[:, :n] for x in ("q", "k", "v", "keep")}
    new["scores"] = inputs.scores[..., :n]
    new[name] = change(new[name].clone())
    with pytest.raises(kind, match=words):
        cache.attend(new["q"], new["k"], new["v"], new["scores"], new["keep"])
    assert cache.seqlen.tolist() == [0, 0]
    if name != "q":
        with pytest.raises(kind, match=words):
            cache.admit(new["k"], new["v"], new["scores"], new["keep"])


def test_no_gradient_is_asked_for_without_grad_mode():
    inputs = Inputs()
    inputs.v.requires_grad_()
    with torch.no_grad():
        inputs.stream(inputs.empty_cache(4), CHUNKS["mixed"])
