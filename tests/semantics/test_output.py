"""O1, O2, S1 to S4 and N2 of the reference: facts that hold without a second implementation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from flash_sparse_attn import reference

NAN = math.nan


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_one_key_gives_its_value(qkv):
    q, k, v = qkv(seqlen_k=1, heads_kv=4)
    o, lse = reference.attention(q, k, v)
    close(o, v.expand(-1, 5, -1, -1))
    close(lse, torch.einsum("bihd,bjhd->bhi", q, k) / math.sqrt(3))


def test_one_visible_key_gives_its_value(qkv):
    q, k, v = qkv(heads_kv=4)
    mask = F.one_hot(torch.tensor([3, 0, 6, 6, 2]), 7).bool()[None, None]
    o, _ = reference.attention(q, k, v, mask=mask)
    close(o, v[:, [3, 0, 6, 6, 2]])


def test_equal_scores_give_the_mean_of_the_visible_values(qkv, coin):
    q, k, v = qkv(heads_kv=4)
    mask = coin(2, 4, 5, 7)
    mask[..., 0] = True
    o, lse = reference.attention(torch.zeros_like(q), k, v, mask=mask)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)):
        seen = mask[b, h, i]
        close(o[b, i, h], v[b, seen, h].mean(0))
        close(lse[b, h, i], seen.sum().double().log())


def test_order_of_the_keys_is_immaterial(qkv, rand, coin):
    q, k, v = qkv()
    bias, mask, gate_q, gate_k = rand(2, 4, 5, 7), coin(1, 2, 5, 7), rand(2, 5, 4), rand(2, 7, 2)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    want = reference.attention(q, k, v, bias=bias, mask=mask, gate_q=gate_q, gate_k=gate_k)
    got = reference.attention(
        q,
        k[:, order],
        v[:, order],
        bias=bias[..., order],
        mask=mask[..., order],
        gate_q=gate_q,
        gate_k=gate_k[:, order],
    )
    close(got[0], want[0])
    close(got[1], want[1])


def test_no_scale_is_the_mean_and_a_large_scale_is_the_best_key(qkv):
    q, k, v = qkv(heads_kv=4)
    mean, _ = reference.attention(q, k, v, softmax_scale=0.0)
    close(mean, v.mean(1, keepdim=True).expand(-1, 5, -1, -1))
    best, _ = reference.attention(q, k, v, softmax_scale=1e6)
    chosen = torch.einsum("bihd,bjhd->bhij", q, k).argmax(3)
    want = v.transpose(1, 2).gather(2, chosen.unsqueeze(3).expand(-1, -1, -1, 6))
    close(best, want.transpose(1, 2))


def test_default_scale_is_the_inverse_root_of_the_head_dim(qkv):
    q, k, v = qkv(dim=5)
    close(reference.attention(q, k, v)[0], reference.attention(q, k, v, softmax_scale=5**-0.5)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_attention_and_logsumexp(qkv, causal):
    q, k, v = qkv(seqlen_q=6, seqlen_k=6)
    o, lse = reference.attention(q, k, v, causal=causal)
    qt, kt, vt = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
    close(o, F.scaled_dot_product_attention(qt, kt, vt, is_causal=causal).transpose(1, 2))
    s = qt @ kt.transpose(2, 3) / math.sqrt(3)
    if causal:
        s = s.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    close(lse, s.logsumexp(3))


def test_group_of_query_heads_shares_its_kv_head(qkv, rand, coin):
    q, k, v = qkv(heads_q=6, heads_kv=2)
    shared = {"bias": rand(2, 2, 1, 7), "mask": coin(1, 2, 5, 7), "gate_k": rand(2, 7, 2)}
    gate_q = rand(2, 5, 6)
    want = reference.attention(q, k, v, gate_q=gate_q, **shared)
    k, v = (x.repeat_interleave(3, 2) for x in (k, v))
    heads = {"bias": 1, "mask": 1, "gate_k": 2}
    shared = {name: x.repeat_interleave(3, heads[name]) for name, x in shared.items()}
    got = reference.attention(q, k, v, gate_q=gate_q, **shared)
    close(got[0], want[0])
    close(got[1], want[1])


def test_adding_a_constant_to_a_row_moves_lse_alone(qkv, rand):
    q, k, v = qkv()
    shift = rand(2, 4, 5, 1)
    o, lse = reference.attention(q, k, v)
    moved, moved_lse = reference.attention(q, k, v, bias=shift)
    close(moved, o)
    close(moved_lse, lse + shift.squeeze(3))


def test_bias_is_added_after_the_cap_and_is_not_scaled(qkv, rand):
    q, k, v = qkv()
    bias = rand(2, 4, 5, 7)
    s = 2 * torch.tanh(0.7 * torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 2)
    lse = reference.attention(q, k, v, softmax_scale=0.7, softcap=2.0, bias=bias)[1]
    close(lse, (s + bias).logsumexp(3))


def test_cap_bounds_the_scores_and_vanishes_when_large(qkv):
    q, k, v = qkv()
    capped = reference.attention(100 * q, k, v, softcap=1.5)[1]
    assert (capped - math.log(7)).abs().max() <= 1.5
    torch.testing.assert_close(
        reference.attention(q, k, v, softcap=1e6)[0], reference.attention(q, k, v)[0]
    )


@pytest.mark.parametrize("gate", ["logsigmoid", "identity"])
def test_gate_is_a_scaled_bias(qkv, rand, gate):
    q, k, v = qkv()
    gate_q, gate_k = rand(2, 5, 4), rand(2, 7, 2)
    x = torch.einsum("bih,bjh->bhij", gate_q, gate_k.repeat_interleave(2, 2))
    bias = 0.3 * (torch.log(1 / (1 + torch.exp(-x))) if gate == "logsigmoid" else x)
    options = {"softmax_scale": 0.3, "softcap": 1.0}
    got = reference.attention(q, k, v, gate_q=gate_q, gate_k=gate_k, gate=gate, **options)
    want = reference.attention(q, k, v, bias=bias, **options)
    close(got[0], want[0])
    close(got[1], want[1])


def test_empty_rows_are_zero_and_minus_infinity(qkv, rand):
    q, k, v = qkv()
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 2] = False
    bias = rand(2, 4, 5, 7)
    bias[1, 3, 4] = -math.inf
    o, lse = reference.attention(q, k, v, mask=mask, bias=bias)
    empty = torch.zeros(2, 4, 5, dtype=torch.bool)
    empty[0, :, 2] = empty[1, 3, 4] = True
    assert torch.equal(lse == -math.inf, empty)
    assert torch.equal((o == 0).all(3).transpose(1, 2), empty)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_attend_from_or_to(qkv, seqlen_q, seqlen_k, causal):
    q, k, v = qkv(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    gates = {"gate_q": q[..., 0], "gate_k": k[..., 0], "gate_threshold": 0.5}
    o, lse = reference.attention(q, k, v, causal=causal, **gates)
    assert o.shape == (2, seqlen_q, 4, 6)
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.equal(lse, torch.full((2, 4, seqlen_q), -math.inf, dtype=torch.float64))
    grads = reference.attention_backward(o, lse, q, k, v, causal=causal, **gates)
    assert all(not grad.any() for grad in grads.values())


def test_strides_do_not_matter(qkv, rand):
    q, k, v = qkv()
    bias = rand(1, 1, 1, 7)
    want = reference.attention(q, k[:, :, :1].expand_as(k), v, bias=bias.expand(2, 4, 5, 7))
    q = q.transpose(1, 3).contiguous().transpose(1, 3)
    v = torch.stack([v, -v], -1)[..., 0]
    got = reference.attention(q, k[:, :, :1].contiguous().repeat(1, 1, 2, 1), v, bias=bias)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_float32_rounded_once(qkv, rand, dtype):
    q, k, v = qkv(dtype=dtype)
    bias = rand(2, 2, 1, 7, dtype=dtype)
    o, lse = reference.attention(q, k, v, bias=bias, causal=True)
    wide = [x.float() for x in (q, k, v)]
    wide_o, wide_lse = reference.attention(*wide, bias=bias.float(), causal=True)
    assert torch.equal(o, wide_o.to(dtype))
    assert lse.dtype == torch.float32
    assert torch.equal(lse, wide_lse)
    do, dlse = rand(2, 5, 4, 6, dtype=dtype), rand(2, 4, 5, dtype=torch.float32)
    got = reference.attention_backward(do, dlse, q, k, v, bias=bias, causal=True)
    want = reference.attention_backward(do.float(), dlse, *wide, bias=bias.float(), causal=True)
    for name in want:
        assert torch.equal(got[name], want[name].to(dtype)), name


def test_autocast_does_not_narrow_it(qkv):
    q, k, v = qkv(dtype=torch.float32)
    do = torch.ones(2, 5, 4, 6)
    want = reference.attention(q, k, v)[0], reference.attention_backward(do, None, q, k, v)["k"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = reference.attention(q, k, v)[0], reference.attention_backward(do, None, q, k, v)["k"]
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_masked_values_reach_neither_results_nor_gradients(qkv, rand):
    """N2: a bias or gate that is NaN where masked, and keys and rows of NaN that meet nothing."""
    q, k, v = qkv()
    bias, gate_q, gate_k = rand(2, 4, 5, 7), rand(2, 5, 4), rand(2, 7, 2)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, :, 1, 4] = False
    mask[:, :, :, 5] = False
    mask[1, :, 3] = False
    terms = {"mask": mask, "softcap": 2.0, "gate_threshold": 0.01}
    do, dlse = rand(2, 5, 4, 6), rand(2, 4, 5)

    def results(poison: float):
        inputs = [x.clone() for x in (q, k, v, bias, gate_q, gate_k)]
        inputs[0][1, 3] = inputs[1][:, 5] = inputs[2][:, 5] = poison
        inputs[3].masked_fill_(~mask, poison)
        inputs[4][1, 3] = inputs[5][:, 5] = poison
        cotangent = do.clone(), dlse.clone()
        cotangent[0][1, 3] = cotangent[1][1, :, 3] = poison
        for x in inputs:
            x.requires_grad_()
        named = dict(zip(("q", "k", "v", "bias", "gate_q", "gate_k"), inputs, strict=True))
        out = reference.attention(**named, **terms)
        grads = torch.autograd.grad(out, inputs, cotangent)
        closed = reference.attention_backward(*cotangent, **named, **terms)
        return [*out, *grads, *closed.values()]

    for clean, poisoned in zip(results(0.0), results(NAN), strict=True):
        assert torch.equal(clean, poisoned)
        assert not clean.isnan().any()


def test_masked_score_that_overflows_contributes_nothing(qkv, rand):
    """N2: <q_i, k_j> is inf - inf = NaN, of finite q and k, at a pair that is not visible."""
    q, k, v = qkv(heads_kv=4)
    q[0, 1, 2, :2], k[0, 3, 2, 0], k[0, 3, 2, 1] = 1e200, 1e200, -1e200
    assert (q[0, 1, 2] @ k[0, 3, 2]).isnan()
    mask = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    mask[0, 2, 1] = mask[0, 2, :, 3] = False
    mask[0, 2, 1, 0] = mask[0, 2, 0, 3] = True
    q[0, 0, 2] = 0  # the row that sees the large key
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = reference.attention(*inputs, mask=mask, softcap=2.0)
    do, dlse = rand(2, 5, 4, 6), rand(2, 4, 5)
    grads = torch.autograd.grad(out, inputs, (do, dlse))
    closed = reference.attention_backward(do, dlse, *inputs, mask=mask, softcap=2.0)
    for x in (*out, *grads, *closed.values()):
        assert x.isfinite().all()


def test_visible_nan_shows_in_its_own_row_and_its_keys_alone(qkv, rand):
    q, k, v = qkv(heads_kv=4)
    bias, mask = rand(2, 4, 5, 7), torch.ones(2, 4, 5, 7, dtype=torch.bool)
    bias[1, 2, 3, 4] = NAN
    mask[1, 2, 3, 5] = False
    row = torch.zeros(2, 5, 4, dtype=torch.bool)
    row[1, 3, 2] = True
    keys = torch.zeros(2, 7, 4, dtype=torch.bool)
    keys[1, [0, 1, 2, 3, 4, 6], 2] = True
    pair = torch.zeros_like(mask)
    pair[1, 2, 3, keys[1, :, 2]] = True

    inputs = [x.requires_grad_() for x in (q, k, v, bias)]
    o, lse = reference.attention(q, k, v, bias=bias, mask=mask)
    assert torch.equal(lse.isnan().transpose(1, 2), row)
    assert torch.equal(o.isnan(), row.unsqueeze(3).expand_as(o))
    do, dlse = rand(2, 5, 4, 6), rand(2, 4, 5)
    closed = reference.attention_backward(do, dlse, q, k, v, bias=bias, mask=mask)
    for grads in (torch.autograd.grad((o, lse), inputs, (do, dlse)), closed.values()):
        dq, dk, dv, dbias = grads
        assert torch.equal(dq.isnan(), row.unsqueeze(3).expand_as(dq))
        assert torch.equal(dk.isnan(), keys.unsqueeze(3).expand_as(dk))
        assert torch.equal(dv.isnan(), keys.unsqueeze(3).expand_as(dv))
        assert torch.equal(dbias.isnan(), pair)


@pytest.mark.parametrize(
    ("terms", "rule"),
    [
        ({"interval_start": torch.zeros(1, 1, 7, dtype=torch.int32)}, "E5"),
        ({"block_size": (2, 2)}, "E5"),
        ({"gate_k": torch.zeros(2, 7, 2)}, "E8"),
        ({"gate_threshold": 0.5}, "E8"),
        ({"gate": "relu"}, "E6"),
    ],
)
def test_half_a_term_is_refused(qkv, terms, rule):
    with pytest.raises(ValueError, match=rule):
        reference.attention(*qkv(), **terms)


def test_unknown_term_is_refused(qkv):
    with pytest.raises(TypeError, match="scale"):
        reference.attention(*qkv(), scale=1.0)
