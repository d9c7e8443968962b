"""Every rule that the backend serves, one small call a rule and corner, against float64.

The interpreter's tiles are 32 or 64 rows or keys, so Sq = 70 and Sk = 100 have several tiles in
each direction, full ones, partial ones and ragged ones.
"""

from __future__ import annotations

import math

import pytest
import torch

from flash_sparse_attn.masks import IntervalMask
from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors

from .calls import Draw, check, grad_subsets, run, same_bits

FLOAT64, FLOAT32, FLOAT16 = torch.float64, torch.float32, torch.float16
SQ, SK = 70, 100


def attention(seed=0, *, grads=("q", "k", "v", "bias"), with_dlse=True, options=None, **arguments):
    """Check a call of the default sizes; tensors by name, sizes and scalar options likewise."""
    sizes = {x: arguments.pop(x) for x in ("batch", "heads", "dim", "dtype") if x in arguments}
    sizes |= {x: arguments.pop(x) for x in ("seqlen_q", "seqlen_k") if x in arguments}
    terms = ("mask", "bias", "interval_start", "interval_end")
    tensors = {x: arguments.pop(x) for x in terms if x in arguments}
    qkv = Draw.seeded(seed).qkv(**sizes)
    scalars = {"softmax_scale": qkv[0].shape[-1] ** -0.5} | arguments
    call = AttentionTensors(*qkv, **tensors), AttentionOptions(**scalars)
    return check(*call, seed=seed, grads=grads, with_dlse=with_dlse)


# S1, S2: score


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dense(dtype, causal):
    attention(dtype=dtype, causal=causal)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("dim", [1, 8, 24, 33, 80])
def test_head_dim_of_any_size(dim, dtype):
    attention(dim=dim, dtype=dtype, causal=True, seqlen_k=70)


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_scale_that_does_not_rise(scale, softcap):
    attention(softmax_scale=scale, softcap=softcap, causal=True)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_softcap_with_bias(dtype):
    bias = Draw.seeded(1).normal(1, 2, SQ, SK, dtype=dtype)
    attention(softcap=2.0, bias=bias, dtype=dtype)


def test_scores_beyond_the_range_of_exp():
    got = attention(softmax_scale=8.0, causal=True, grads=())
    assert got["lse"].max() > math.log(torch.finfo(FLOAT32).max)


# N1: float64


@pytest.mark.parametrize("bias", [None, (1, 2, 1, SK), (1, 1, SQ, 1), (1, 2, SQ, SK)], ids=str)
def test_float64_knows_probabilities_to_their_last_places(bias):
    """Scores near 1024 are exact here, being 16ths, as is what is added to them; lse then is only
    good to 1e-13, and what is not P is far from it.
    """
    draw = Draw.seeded(15)
    q, k, v = draw.qkv(dtype=FLOAT64)
    q, k = ((4 * x).round() / 4 for x in (q, k))
    q[..., 0], k[..., 0] = 64, 16
    terms = {}
    if bias is not None:
        terms["bias"] = (4 * draw.normal(*bias, dtype=FLOAT64)).round() / 4
    options = AttentionOptions(softmax_scale=1.0, causal=True)
    got = check(AttentionTensors(q, k, v, **terms), options, grads=("q", "k", "v", "bias"))
    assert got["lse"].min() > 950


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("scale", [-0.7, 0.3])
def test_float64_of_every_kind_of_score(scale, softcap):
    mask = Draw.seeded(16).coin(1, 1, SQ, SK)
    mask[:, :, 5] = False
    bias = Draw.seeded(17).normal(1, 2, SQ, SK, dtype=FLOAT64)
    attention(softmax_scale=scale, softcap=softcap, mask=mask, bias=bias, dtype=FLOAT64)


def test_float64_row_that_is_nan():
    """It has no peak and no sum; the keys that it does not see have nothing of it."""
    bias = torch.zeros(1, 1, SQ, SQ, dtype=FLOAT64)
    bias[..., 40, 3] = math.nan
    got = attention(bias=bias, dtype=FLOAT64, causal=True, seqlen_k=SQ, grads=("v",))
    assert got["lse"].isnan().sum() == 2
    assert got["dv"].isnan().any(-1).sum() == 41


# Shapes


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (3, 1)])
def test_groups_of_heads(heads):
    attention(batch=2, heads=heads, seqlen_q=20, seqlen_k=40, causal=True)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k"), [(1, 1), (1, 100), (100, 1), (33, 130), (130, 33), (64, 64)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_that_differ(seqlen_q, seqlen_k, causal):
    attention(seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal)


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_dimension_of_size_zero(empty, masked):
    sizes = {"batch": 2, "seqlen_q": 40, "seqlen_k": 50} | {empty: 0}
    pairs = (sizes["batch"], 2, sizes["seqlen_q"], sizes["seqlen_k"])
    terms = {}
    if masked:
        terms["mask"] = torch.ones(pairs, dtype=torch.bool)
        terms["bias"] = torch.zeros(pairs)
        terms["interval_start"] = torch.zeros(1, 1, sizes["seqlen_k"], dtype=torch.int32)
        terms["interval_end"] = torch.full((1, 1, sizes["seqlen_k"]), 9, dtype=torch.int32)
    got = attention(**sizes, **terms)
    if empty == "seqlen_k":
        assert not got["o"].any()
        assert (got["lse"] == -math.inf).all()
        assert not got["dq"].any()


def transposed(x):
    """[B, H, S, D] in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def reversed_dims(x):
    """Contiguous in S, not in D."""
    return x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)


def padded(x):
    """Rows that start on no 16-byte boundary."""
    return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]


def one_for_all_heads(x):
    """Stride 0 over heads."""
    return x[:, :, :1].expand(x.shape)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
@pytest.mark.parametrize("layout", [transposed, reversed_dims, padded, one_for_all_heads])
def test_strides(layout, dtype):
    q, k, v = Draw.seeded(2).qkv(2, 40, 40, (2, 2), dtype=dtype)
    tensors = AttentionTensors(layout(q), layout(k), layout(v))
    check(tensors, AttentionOptions(softmax_scale=0.25, causal=True))


# V1, V2: bounds


@pytest.mark.parametrize("window", [(0, 0), (5, None), (None, 3), (40, 10), (1000, 1000)])
@pytest.mark.parametrize("sinks", [0, 45])
def test_window_with_sinks(window, sinks):
    left, right = window
    attention(window_left=left, window_right=right, sinks=sinks)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(100, 40), (40, 100), (100, 100)])
@pytest.mark.parametrize("sinks", [0, 35])
def test_causal_window(seqlen_q, seqlen_k, sinks):
    attention(
        causal=True,
        window_left=20,
        window_right=5,
        sinks=sinks,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
    )


# V3, S4: mask and bias, every broadcast


PAIR_SIZES = [
    (batch, heads, rows, keys)
    for batch, heads in ((1, 1), (2, 4), (1, 2))
    for rows in (1, 40)
    for keys in (1, 50)
]


@pytest.mark.parametrize("sizes", PAIR_SIZES, ids=str)
def test_broadcasts(sizes):
    """A mask and a bias of the same sizes: batch, heads {1, Hkv, Hq}, rows, keys."""
    draw = Draw.seeded(sum(sizes))
    mask, bias = draw.coin(*sizes, share=0.6), draw.normal(*sizes)
    attention(batch=2, heads=(4, 2), seqlen_q=40, seqlen_k=50, mask=mask, bias=bias)


def test_mask_and_bias_of_other_sizes_and_strides():
    draw = Draw.seeded(3)
    mask = draw.coin(SK, SQ, 2, 1).permute(3, 2, 1, 0)
    bias = draw.normal(2, 1, SK).permute(1, 0, 2)[:, :, None].to(FLOAT16)
    attention(heads=(4, 2), mask=mask, bias=bias, causal=True, dtype=FLOAT16)


def test_expanded_bias_has_a_gradient_of_its_full_shape():
    bias = Draw.seeded(4).normal(1, 1, 1, SK).expand(1, 2, SQ, SK)
    got = attention(bias=bias)
    assert got["dbias"].shape == (1, 2, SQ, SK)


@pytest.mark.parametrize("sizes", [(1, 1, 1, SK), (1, 2, SQ, SK), (1, 1, SQ, 1)], ids=str)
def test_bias_of_the_other_dtype(sizes):
    attention(bias=Draw.seeded(5).normal(*sizes, dtype=FLOAT32), dtype=FLOAT16)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("rows", [1, SQ])
def test_bias_at_masked_positions_contributes_nothing(value, rows):
    """N2."""
    draw = Draw.seeded(6)
    mask, bias = draw.coin(1, 2, rows, SK), draw.normal(1, 2, rows, SK)
    sizes = {"heads": (2, 2), "seqlen_q": SQ, "seqlen_k": SK}
    attention(mask=mask, bias=bias.masked_fill(~mask, value), causal=True, **sizes)


def test_row_that_is_nan():
    """Gradients of what it does not see have nothing of it (N2)."""
    bias = torch.zeros(1, 1, SQ, SQ)
    bias[..., 40, 3] = math.nan
    got = attention(
        bias=bias, causal=True, seqlen_k=SQ, dtype=FLOAT32, grads=("q", "k", "v", "bias")
    )
    seen = 41  # keys of row 40
    assert got["dq"].isnan().any(-1).sum() == 2
    assert got["dk"].isnan().any(-1).nonzero()[:, 1].unique().tolist() == list(range(seen))
    assert got["dbias"].isnan().nonzero()[:, 2:].tolist() == [[40, j] for j in range(seen)]


def test_visible_bias_of_minus_infinity():
    bias = Draw.seeded(7).normal(1, 2, SQ, SK)
    bias[Draw.seeded(8).coin(1, 2, SQ, SK, share=0.2)] = -math.inf
    bias[:, 0, 5] = -math.inf
    got = attention(bias=bias)
    assert not got["o"][:, 5, 0].any()
    assert got["lse"][0, 0, 5] == -math.inf


def test_tile_that_turns_from_inactive_to_active():
    """Rows see nothing in the first tiles of keys that are visited, and something later."""
    mask = torch.zeros(1, 1, SQ, 200, dtype=torch.bool)
    mask[:, :, 40:, 150:] = True
    mask[:, :, 3, 199] = True
    attention(mask=mask, seqlen_k=200)
    mask[:, :, 64:, 64:128] = True
    attention(mask=mask, seqlen_k=200, dtype=FLOAT16)


def test_mask_with_tiles_of_every_class():
    draw = Draw.seeded(9)
    mask = draw.coin(2, 1, 130, 200)
    mask[:, :, :64, :64] = True
    mask[:, :, 64:128, :128] = False
    mask[0, :, :, 128:] = True
    got = attention(mask=mask, batch=2, seqlen_q=130, seqlen_k=200, causal=True)
    assert not got["lse"].isnan().any()


# V4: intervals


def test_documents():
    boundaries = torch.tensor([0, 10, 11, 64, 100], dtype=torch.int32)
    mask = IntervalMask.documents(boundaries, 100)
    attention(interval_start=mask.start, interval_end=mask.end, causal=True, seqlen_q=100)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_top_keys(dtype):
    scores = Draw.seeded(10).normal(1, 2, SK)
    mask = IntervalMask.topk(scores, 12)
    bias = scores[:, :, None].to(dtype)
    attention(
        heads=(4, 2),
        seqlen_q=SK,
        dtype=dtype,
        interval_start=mask.start,
        interval_end=mask.end,
        bias=bias,
        causal=True,
    )


def test_intervals_out_of_range_and_empty():
    least, greatest = -(2**31), 2**31 - 1
    start = torch.full((1, 1, SK), least, dtype=torch.int32)
    end = torch.full((1, 1, SK), greatest, dtype=torch.int32)
    start[..., 10:20], end[..., 10:20] = 30, 30
    start[..., 20:30], end[..., 20:30] = 40, 10
    start[..., 30:40], end[..., 30:40] = SQ, SQ + 50
    start[..., 40:50], end[..., 40:50] = -20, -10
    start[..., 50], end[..., 50] = greatest, greatest
    start[..., 51], end[..., 51] = least, least
    start[..., 64:], end[..., 64:] = 5, 6
    attention(interval_start=start, interval_end=end)


def test_intervals_of_other_strides_than_each_other():
    draw = Draw.seeded(11)
    start = draw.integers(-5, 30, SK, 2, 1).permute(2, 1, 0)
    end = draw.integers(20, 90, 1, 2, SK)
    attention(heads=(4, 2), interval_start=start, interval_end=end)


def test_every_rule_at_once():
    draw = Draw.seeded(12)
    attention(
        batch=2,
        heads=(4, 2),
        dim=24,
        causal=True,
        window_left=60,
        sinks=10,
        softcap=3.0,
        mask=draw.coin(2, 1, SQ, SK, share=0.8),
        bias=draw.normal(1, 2, SQ, SK),
        interval_start=draw.integers(-5, 30, 1, 2, SK),
        interval_end=draw.integers(20, 90, 1, 2, SK),
    )


# O2: rows without keys


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_empty_rows(dtype):
    """Causal rows before the first key, and rows that a mask empties."""
    mask = Draw.seeded(13).coin(1, 2, 100, 1, share=0.7)
    got = attention(seqlen_q=100, seqlen_k=40, causal=True, mask=mask, dtype=dtype)
    empty = torch.arange(100) < 60
    assert not got["o"][:, empty].any()
    assert (got["lse"][..., empty] == -math.inf).all()
    assert not got["dq"][:, empty].any()


def test_nothing_visible_at_all():
    got = attention(mask=torch.zeros(1, 1, SQ, SK, dtype=torch.bool), bias=torch.ones(1, 1, SQ, SK))
    assert (got.pop("lse") == -math.inf).all()
    assert not any(x.any() for x in got.values())


# G1, G2: gradients


@pytest.mark.parametrize("grads", grad_subsets, ids=lambda x: "+".join(x) or "none")
def test_any_subset_of_gradients(grads):
    bias = Draw.seeded(14).normal(1, 1, 1, 64)
    attention(grads=grads, bias=bias, seqlen_q=64, seqlen_k=64, causal=True)


@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (1, 2, 40, 1), (1, 4, 1, 50), (2, 1, 40, 50)])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_gradient_of_the_bias_alone(sizes, with_dlse):
    bias = Draw.seeded(15).normal(*sizes)
    arguments = {"batch": 2, "heads": (4, 2), "seqlen_q": 40, "seqlen_k": 50, "softcap": 2.0}
    attention(grads=("bias",), bias=bias, with_dlse=with_dlse, **arguments)


def test_no_gradient_through_lse():
    attention(with_dlse=False, causal=True)


@pytest.mark.parametrize("rows", [1, SQ])
def test_bitwise_repeatable(rows):
    draw = Draw.seeded(16)
    qkv = draw.qkv(dtype=FLOAT16, heads=(4, 2))
    mask, bias = draw.coin(1, 2, rows, SK), draw.normal(1, 1, rows, SK)
    tensors = AttentionTensors(*qkv, mask=mask, bias=bias)
    options = AttentionOptions(softmax_scale=0.3, causal=True, deterministic=True)
    do, dlse = draw.normal(*qkv[0].shape, dtype=FLOAT16), draw.normal(1, 4, SQ)
    first, second = (run(tensors, options, do, dlse, ("q", "k", "v", "bias")) for _ in range(2))
    for name, x in first.items():
        assert same_bits(x, second[name]), name
