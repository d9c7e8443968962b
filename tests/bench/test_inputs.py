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
SIZES = {"seqlen": 33, "heads_q": 4, "heads_kv": 2, "head_dim": 8, "dtype": "float32"}


def every_row(inputs):
    length = inputs.q.shape[1]
    return inputs.visibility(torch.arange(length)).expand(1, 1, length, length)


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


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: case.name)
def test_pairs_and_visibility_agree_with_the_specification(case):
    inputs = build(case, CPU, requires_grad=False)
    terms = {"causal": inputs.causal, "mask": inputs.mask}
    if inputs.intervals is not None:
        terms |= {
            "interval_start": inputs.intervals.start,
            "interval_end": inputs.intervals.end,
        }
    # With all scores equal, o_i is the mean of the visible v_j, and v_j is the j-th unit vector.
    zeros = torch.zeros(1, case.seqlen, 1, 1)
    unit = torch.eye(case.seqlen)[None, :, None]
    visible = reference.attention(zeros, zeros, unit, **terms)[0][:, :, 0] > 0
    assert torch.equal(every_row(inputs)[0], visible)
    assert inputs.pairs == int(visible.sum()) * case.batch * case.heads_q


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
    assert torch.equal(dense.visible, (rows + 1).clamp(max=width))


def test_inputs_repeat_and_only_leaves_require_gradients():
    case = Case(**SIZES, bias="key", bias_grad=False)
    first, second = (build(case, CPU, requires_grad=True) for _ in range(2))
    assert torch.equal(first.q, second.q)
    assert first.q.requires_grad
    assert not first.bias.requires_grad
    assert not first.do.requires_grad
