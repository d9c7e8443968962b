"""DynamicMaskAttention against its formulas computed row by row, its cache, PyTorch's machinery."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flash_sparse_attn import flash_sparse_attn_func
from flash_sparse_attn.modules import (
    DynamicMaskAttention,
    DynamicMaskAttentionConfig,
    DynamicMaskCache,
)

B, S, HIDDEN = 2, 24, 32
CONFIG = DynamicMaskAttentionConfig(HIDDEN, num_heads=4, num_kv_heads=2, window_size=5)
PARAMETERS = {"q_proj", "k_proj", "v_proj", "o_proj", "dt_proj", "A"}


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object):
    """A layer, A's heads told apart, and an input that requires a gradient."""
    torch.manual_seed(seed)
    layer = DynamicMaskAttention(dataclasses.replace(CONFIG, **changes), dtype=dtype)
    with torch.no_grad():
        layer.A.copy_(torch.linspace(-1.5, 0.75, layer.A.numel()))
    return layer, torch.randn(B, S, HIDDEN, dtype=dtype, requires_grad=True)


def brute_force(layer: DynamicMaskAttention, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The formulas, one batch entry, head and row at a time."""
    config = layer.config
    width, group = config.head_dim, config.num_heads // config.num_kv_heads
    keep = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    q, k, v = (F.linear(x, p.weight, p.bias) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    scores = torch.exp(layer.A * torch.log1p(torch.exp(v @ layer.dt_proj.weight.T)))
    entries = []
    for b in range(x.shape[0]):
        rows = []
        for i in range(x.shape[1]):
            heads = []
            for h in range(config.num_heads):
                n = h // group
                seen = [j for j in range(i + 1) if keep[b, j]]
                # The w best, ties to the more recent.
                best = sorted(seen, key=lambda j: (-scores[b, j, n].item(), -j))
                best = torch.tensor(best[: config.window_size], dtype=torch.long)
                head_q, head_kv = (slice(m * width, (m + 1) * width) for m in (h, n))
                s = config.softmax_scale * (k[b, best, head_kv] @ q[b, i, head_q])
                p = torch.softmax(s + scores[b, best, n], 0)
                heads.append(p @ v[b, best, head_kv])
            rows.append(torch.cat(heads))
        entries.append(torch.stack(rows))
    return F.linear(torch.stack(entries), layer.o_proj.weight, layer.o_proj.bias)


def gradients(layer: DynamicMaskAttention, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of x and of every parameter, for an output gradient that tells all elements apart."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    do = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad(y, (x, *parameters), do)
    return dict(zip(("x", *names), found, strict=True))


# --- what it computes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window_size": 1},
        {"num_kv_heads": 4, "head_dim": 12},
        {"num_kv_heads": 1, "qkv_bias": True, "out_bias": True, "softmax_scale": 0.7},
    ],
)
def test_output_and_every_gradient_are_those_of_the_formulas(changes):
    layer, x = make(**changes)
    assert {name.partition(".")[0] for name, _ in layer.named_parameters()} == PARAMETERS
    y, want = layer(x), brute_force(layer, x)
    torch.testing.assert_close(y, want)
    got, expected = gradients(layer, x, y), gradients(layer, x, want)
    for name, gradient in got.items():
        torch.testing.assert_close(
            gradient, expected[name], msg=lambda text, n=name: f"{n}: {text}"
        )
    for name in set(got) - {"k_proj.bias"}:  # shifts a row's scores alike where nothing rotates
        alone = layer.config.window_size == 1 and name in {
            "q_proj.weight", "k_proj.weight", "dt_proj.weight", "A"
        }  # fmt: skip
        assert alone or got[name].abs().max() > 1e-6, name


def test_a_window_of_all_keys_is_dense_attention_with_the_bias():
    layer, x = make(window_size=S)
    q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    bias = layer.key_scores(v)[:, :, None]
    o = flash_sparse_attn_func(q, k, v, attn_bias=bias, is_causal=True)
    torch.testing.assert_close(layer(x), layer.o_proj(o.flatten(2)))


def test_equal_scores_keep_the_most_recent_keys():
    layer, x = make()
    with torch.no_grad():
        layer.A.zero_()
    q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert torch.equal(layer.key_scores(v), torch.ones(B, 2, S, dtype=x.dtype))
    o = flash_sparse_attn_func(q, k, v, is_causal=True, window=(4, 0))
    torch.testing.assert_close(layer(x), layer.o_proj(o.flatten(2)))


def test_padding_is_no_key_and_takes_no_place():
    layer, x = make()
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :7], keep[1, 15:] = False, False  # one padded on the left, one on the right
    y = layer(x, key_padding_mask=keep)
    torch.testing.assert_close(y[keep], brute_force(layer, x, keep)[keep])
    torch.testing.assert_close(y[0, 7:], layer(x[:1, 7:])[0])
    torch.testing.assert_close(y[1, :15], layer(x[1:, :15])[0])
    (dx,) = torch.autograd.grad(y[keep].square().sum(), x)
    assert dx[~keep].abs().max() == 0


def test_no_row_depends_on_a_later_token():
    layer, x = make()
    later = x.detach().clone()
    later[:, 13:] += 1
    torch.testing.assert_close(layer(x)[:, :13], layer(later)[:, :13])


# --- position embedding


def turn(positions: Tensor, x: Tensor) -> Tensor:
    """A rotation of the halves of every head by an angle that grows with the position."""
    angles = positions.to(x.dtype)[:, None, None] / (1 + torch.arange(x.shape[3] // 2))
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def rotation(positions: Tensor):
    return lambda query, key: (turn(positions, query), turn(positions, key))


def test_rotation_reaches_query_and_key_and_not_the_choice():
    layer, x = make()
    seen = {}

    def rotary(query, key):
        seen["query"], seen["key"] = query, key
        return 2 * query, key

    y = layer(x, rotary=rotary)
    assert seen["query"].shape == (B, S, 4, 8)
    assert seen["key"].shape == (B, S, 2, 8)
    with torch.no_grad():
        layer.q_proj.weight *= 2
    torch.testing.assert_close(y, layer(x))


def test_rotation_is_relative():
    layer, x = make()
    positions = torch.arange(S)
    y = layer(x, rotary=rotation(positions))
    assert (y - layer(x)).abs().max() > 1e-3
    torch.testing.assert_close(y, layer(x, rotary=rotation(positions + 1000)))


# --- cache


@pytest.mark.parametrize("first", [1, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_is_full_recomputation(first, padded):
    layer, x = make()
    keep = None
    if padded:
        keep = torch.ones(B, S, dtype=torch.bool)
        keep[0, :4] = False
    positions = torch.arange(S)
    whole = layer(x, key_padding_mask=keep, rotary=rotation(positions))
    cache, parts = layer.allocate_cache(B), []
    with torch.no_grad():
        for start, stop in [(0, first), *((i, i + 1) for i in range(first, S))]:
            assert cache.seqlen.tolist() == [start] * B
            # Calls past the padding need no mask.
            mask = keep[:, start:stop] if padded and start < 4 else None
            part = x[:, start:stop]
            parts.append(layer(part, mask, rotation(positions[start:stop]), cache))
    got, want = torch.cat(parts, 1), whole.detach()
    rows = torch.ones(B, S, dtype=torch.bool) if keep is None else keep
    torch.testing.assert_close(got[rows], want[rows])
    assert cache.held.tolist() == [5, 5]


@torch.no_grad()
def test_several_tokens_may_follow_a_cache_and_padding_may_come_late():
    layer, x = make()
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[1, 20:] = False
    cache, parts = layer.allocate_cache(B), []
    for start, stop in ((0, 7), (7, 8), (8, 17), (17, S)):
        mask = keep[:, start:stop] if stop == S else None
        parts.append(layer(x[:, start:stop], mask, cache=cache))
    got, want = torch.cat(parts, 1), layer(x, keep)
    torch.testing.assert_close(got[keep], want[keep])
    assert cache.position.max(-1).values.lt(20)[1].all()


def test_a_cache_has_the_sizes_of_its_layer():
    layer, _ = make(num_kv_heads=4, head_dim=12)
    cache = layer.allocate_cache(3)
    assert cache.key.shape == cache.value.shape == (3, 5, 4, 12)
    assert cache.key.dtype == cache.scores.dtype == torch.float64
    assert layer.allocate_cache(1, torch.float16).key.dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float().allocate_cache(1).key.dtype == torch.bfloat16
    assert DynamicMaskAttention(CONFIG, device="meta").allocate_cache(1).key.is_meta


@pytest.mark.parametrize("n", [1, 3])
def test_a_cache_takes_no_gradient(n):
    """Gradients of what is held would be left out, so none is given."""
    layer, x = make()
    cache = layer.allocate_cache(B)
    with pytest.raises(NotImplementedError, match=r"gradients: got .*key.* \[rule E9\]"):
        layer(x[:, :n], cache=cache)
    assert cache.seqlen.tolist() == [0, 0]


# --- PyTorch's machinery


def test_state_dict_and_copies_give_the_same_output():
    layer, x = make()
    other, _ = make(seed=1)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    assert twin.A is not layer.A


def test_compile_is_one_graph_and_equal():
    layer, x = make(dtype=torch.float32)
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :7] = False
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, want = compiled(x, keep), layer(x, keep)
    torch.testing.assert_close(y, want)
    got, expected = gradients(layer, x, y), gradients(layer, x, want)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name])


def test_decoding_compiles():
    layer, x = make(dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    cache = layer.allocate_cache(B)
    with torch.no_grad():
        parts = [compiled(x[:, i : i + 1], cache=cache) for i in range(6)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x[:, :6]))


def test_scores_are_float32_under_autocast_and_in_half_precision():
    layer, x = make(dtype=torch.float32, window_size=S)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, cache = layer(x), layer.allocate_cache(B)
        with torch.no_grad():
            layer(x, cache=cache)
    assert (y.dtype, cache.value.dtype) == (torch.bfloat16, torch.bfloat16)
    assert cache.scores.dtype == torch.float32
    with torch.no_grad():
        dt = cache.value.flatten(2).float() @ layer.dt_proj.weight.T
        want = torch.exp(layer.A * F.softplus(dt)).transpose(1, 2)
    assert torch.equal(cache.scores, want)
    found = gradients(layer, x, y)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}

    layer, x = make(dtype=torch.float32)
    half = copy.deepcopy(layer).bfloat16()
    y, cache = half(x.bfloat16()), half.allocate_cache(B)
    with torch.no_grad():
        half(x.bfloat16(), cache=cache)
    assert (y.dtype, cache.scores.dtype) == (torch.bfloat16, torch.float32)
    # The choice is that of the rounded values, so this is no bound on the error of a given mask.
    assert (y.float() - layer(x)).abs().mean() < 0.1 * layer(x).abs().mean()
    y.float().square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in half.parameters())


def test_sizes_resolve_and_show():
    config = DynamicMaskAttentionConfig(64, 4)
    assert (config.num_kv_heads, config.head_dim, config.softmax_scale) == (4, 16, 0.25)
    assert DynamicMaskAttentionConfig(60, 4, head_dim=16).head_dim == 16
    layer = DynamicMaskAttention(config)
    assert layer.dt_proj.weight.shape == (4, 64)
    assert "window_size=1024" in repr(layer)
    assert DynamicMaskAttention(config, device="meta").A.is_meta


def test_a_new_layer_scores_keys_between_zero_and_one_and_tells_them_apart():
    torch.manual_seed(0)
    layer = DynamicMaskAttention(CONFIG)
    x = torch.randn(B, S, HIDDEN)
    scores = layer.key_scores(layer.v_proj(x).unflatten(-1, (-1, 8)))
    assert scores.min() > 0
    assert scores.max() < 1
    assert scores.std(-1).min() > 0.01


# --- errors


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"hidden_size": 0}, ValueError, r"hidden_size: got 0, expected an int >= 1 \[rule E6\]"),
        ({"num_heads": 4.0}, TypeError, r"num_heads: got 4.0, .* \[rule E1\]"),
        ({"window_size": True}, TypeError, r"window_size: got True, .* \[rule E1\]"),
        ({"window_size": 0}, ValueError, r"window_size: got 0, .* \[rule E6\]"),
        ({"num_kv_heads": 3}, ValueError, r"num_heads: got 4, .* num_kv_heads 3 \[rule E2\]"),
        ({"num_kv_heads": -1}, ValueError, r"num_kv_heads: got -1, .* \[rule E6\]"),
        ({"hidden_size": 30}, ValueError, r"hidden_size: got 30, .* num_heads 4.* \[rule E2\]"),
        ({"head_dim": 257}, ValueError, r"head_dim: got 257, expected at most 256 \[rule E7\]"),
        ({"qkv_bias": 1}, TypeError, r"qkv_bias: got 1, expected a bool \[rule E1\]"),
        ({"softmax_scale": "1"}, TypeError, r"softmax_scale: got '1', .* \[rule E1\]"),
        ({"softmax_scale": float("nan")}, ValueError, r"softmax_scale: got nan, .* \[rule E6\]"),
        ({"backend": 3}, TypeError, r"backend: got 3, .* \[rule E1\]"),
    ],
)
def test_config_errors(changes, kind, words):
    with pytest.raises(kind, match=words):
        DynamicMaskAttentionConfig(**{"hidden_size": 32, "num_heads": 4} | changes)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.window_size = 3


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (([1.0],), TypeError, r"x: got list, .* \[rule E1\]"),
        ((torch.zeros(S, HIDDEN),), ValueError, r"shape of x: .* hidden_size 32\] \[rule E2\]"),
        ((torch.zeros(B, S, 8),), ValueError, r"shape of x: got \(2, 24, 8\), .* \[rule E2\]"),
        (
            (torch.zeros(B, S, HIDDEN), torch.zeros(B, S)),
            TypeError,
            r"dtype of key_padding_mask: got torch.float32, .* \[rule E3\]",
        ),
        (
            (torch.zeros(B, S, HIDDEN), torch.ones(B, 3, dtype=torch.bool)),
            ValueError,
            r"shape of key_padding_mask: got \(2, 3\), .* \[rule E5\]",
        ),
    ],
)
def test_call_errors(arguments, kind, words):
    layer = DynamicMaskAttention(CONFIG)
    cache = layer.allocate_cache(B)
    with pytest.raises(kind, match=words):
        layer(*arguments, cache=cache)
    assert cache.seqlen.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("cache", "kind", "words"),
    [
        ({}, TypeError, r"cache: got dict, expected a DynamicMaskCache .* \[rule E1\]"),
        (
            DynamicMaskCache(B, 4, 2, 8),
            ValueError,
            r"window_size of cache: got 4, .*5.* \[rule E2\]",
        ),
        (DynamicMaskCache(B, 5, 4, 8), ValueError, r"\(2, 24, 4, 8\) \[rule E2\]"),
        (DynamicMaskCache(3, 5, 2, 8), ValueError, r"\(3, 24, 2, 8\) \[rule E2\]"),
        (DynamicMaskCache(B, 5, 2, 8, dtype=torch.float16), TypeError, r"float16.* \[rule E3\]"),
    ],
)
@torch.no_grad()
def test_a_cache_of_another_layer(cache, kind, words):
    with pytest.raises(kind, match=words):
        DynamicMaskAttention(CONFIG)(torch.zeros(B, S, HIDDEN), cache=cache)


def test_a_named_backend_is_asked():
    layer, x = make(backend="no such backend")
    with pytest.raises(ValueError, match="no such backend"):
        layer(x)
