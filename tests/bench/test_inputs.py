"""Every contender is given the same problem, and its cost is counted on visible pairs."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask as flex_dense

from bench import cases
from bench.cases import Case
from bench.inputs import build, flops
from bench.peers import flex, sdpa
from flash_sparse_attn import reference

CPU = torch.device("cpu")
SMOKE = cases.load("smoke", "backward").cases
EVERY = SMOKE + cases.load("smoke", "dynamic").cases
SIZES = {"seqlen": 33, "heads_q": 4, "heads_kv": 2, "head_dim": 8, "dtype": "float32"}


def every_row(inputs):
    length = inputs.q.shape[1]
    visible = inputs.visibility(torch.arange(length))
    return visible.expand(1, visible.shape[1], length, length)


def test_flops_of_causal_attention():
    case = Case(**SIZES, batch=3, causal=True)
    inputs = build(case, CPU, requires_grad=False)
    assert inputs.pairs == 3 * 4 * 33 * 34 // 2
    counted = flops(case, inputs.pairs)
    assert counted["forward"] == 4 * 8 * inputs.pairs
    assert counted["backward"] == 2.5 * counted["forward"]
    assert counted["forward+backward"] == 3.5 * counted["forward"]


def test_pairs_of_dense_attention():
    assert build(Case(**SIZES, batch=3), CPU, requires_grad=False).pairs == 3 * 4 * 33**2


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_pairs_and_visibility_agree_with_the_specification(case):
    inputs = build(case, CPU, requires_grad=False)
    terms = {"causal": inputs.causal, "mask": inputs.mask}
    if inputs.intervals is not None:
        terms |= {
            "interval_start": inputs.intervals.start,
            "interval_end": inputs.intervals.end,
        }
    # With all scores equal, o_i is the mean of the visible v_j, and v_j is the j-th unit vector.
    heads = case.heads_kv if case.per_head else 1
    zeros = torch.zeros(1, case.seqlen, heads, 1)
    unit = torch.eye(case.seqlen)[None, :, None].expand(-1, -1, heads, -1)
    visible = (reference.attention(zeros, zeros, unit, **terms)[0] > 0).transpose(1, 2)
    assert torch.equal(every_row(inputs), visible)
    assert torch.equal(inputs.visible.expand(heads, -1), visible[0].sum(2))
    assert inputs.pairs == int(visible.sum()) * case.batch * case.heads_q // heads


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_flex_and_sdpa_are_given_the_same_mask(case):
    inputs = build(case, CPU, requires_grad=False)
    visible = every_row(inputs)
    length = case.seqlen
    assert torch.equal(
        flex_dense(flex.mask_mod(inputs), None, None, length, length, device="cpu"), visible
    )
    merged = sdpa.merge(inputs)
    bias = torch.zeros(()) if inputs.bias is None else inputs.bias
    if merged.dtype == torch.bool:
        assert torch.equal(merged.expand_as(visible), visible)
    else:
        expected = torch.where(visible, bias, -torch.inf)
        assert torch.equal(merged.expand_as(visible), expected)


@pytest.mark.parametrize("width", [1, 7, 40])
def test_the_forms_of_a_mask_are_one_mask(width):
    common = SIZES | {"causal": True, "mask": "topk", "window_size": width, "bias": "key"}
    dense = build(Case(**common), CPU, requires_grad=False)
    intervals = build(Case(**common, mask_form="intervals"), CPU, requires_grad=False)
    assert intervals.mask is None
    assert dense.intervals is None
    assert torch.equal(every_row(dense), every_row(intervals))
    rows = torch.arange(33)
    assert torch.equal(dense.visible, (rows + 1).clamp(max=width)[None])


def test_inputs_repeat_and_only_leaves_require_gradients():
    case = Case(**SIZES, bias="key", bias_grad=False)
    first, second = (build(case, CPU, requires_grad=True) for _ in range(2))
    assert torch.equal(first.q, second.q)
    assert first.q.requires_grad
    assert not first.bias.requires_grad
    assert not first.do.requires_grad


PER_HEAD = SIZES | {"causal": True, "mask": "topk", "window_size": 7, "per_head": True}


@pytest.mark.parametrize(
    "fields",
    [{"mask_form": "intervals"}, {"mask_form": "intervals", "bias": "key"}, {"mask": "keys"}, {}],
    ids=["intervals", "bias", "keys", "dense"],
)
def test_flex_is_given_the_mask_of_every_head(fields, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = Case(**(PER_HEAD | {"seqlen": 200} | fields))
    inputs = build(case, CPU, requires_grad=False)
    visible = every_row(inputs).repeat_interleave(2, 1)
    assert not torch.equal(visible[:, 0], visible[:, 2])
    block_mask, setup_ms = flex.timed_block_mask(case, inputs)
    assert setup_ms > 0
    built = flex_dense(block_mask.mask_mod, 1, 4, 200, 200, device="cpu")
    assert torch.equal(built, visible)
    blocks = (
        torch.nn.functional.pad(visible, (0, 56, 0, 56)).unfold(2, 128, 128).unfold(3, 128, 128)
    )
    assert torch.equal(block_mask.to_dense().bool(), blocks.any(-1).any(-1))


def test_every_head_chooses_by_its_own_scores_which_are_its_bias():
    case = Case(**PER_HEAD, mask_form="intervals", bias="key", bias_grad=True)
    inputs = build(case, CPU, requires_grad=True)
    assert inputs.scores.shape == (1, 2, 33)
    assert inputs.scores.dtype == torch.float32
    assert torch.equal(inputs.bias.detach()[:, :, 0], inputs.scores)
    assert inputs.bias.is_leaf
    assert inputs.bias.requires_grad
    assert not inputs.scores.requires_grad
    half = build(Case(**(PER_HEAD | {"dtype": "float16"})), CPU, requires_grad=False)
    assert half.scores.dtype == torch.float32


def test_scores_that_are_given_decide():
    scores = torch.arange(33.0).flip(0).expand(1, 2, 33)
    case = Case(**PER_HEAD, mask_form="intervals", bias="key")
    inputs = build(case, CPU, requires_grad=False, scores=scores)
    assert torch.equal(inputs.bias[:, :, 0], scores)
    assert (inputs.intervals.end[:, :, :7] == 33).all()  # the first are best and stay
    assert (inputs.intervals.end[:, :, 7:] <= inputs.intervals.start[:, :, 7:]).all()


def test_bytes_of_a_call():
    case = Case(**PER_HEAD, mask_form="intervals", bias="key", bias_grad=True)
    inputs = build(case, CPU, requires_grad=True)
    q, k, bias = 33 * 4 * 8 * 4, 33 * 2 * 8 * 4, 33 * 2 * 4
    assert inputs.nbytes == 2 * q + 2 * k + bias + 2 * bias  # do is as q; int32 intervals
    assert inputs.nbytes_of_results(case.leaves) == 2 * q + 2 * k + bias
    assert inputs.nbytes_of_results(()) == q
