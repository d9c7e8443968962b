"""The check that stands before every timing lets right results through and no wrong one."""

import pytest
import torch

from bench import cases, check
from bench.inputs import build
from flash_sparse_attn import IntervalMask, flash_sparse_attn_func

CASE = next(case for case in cases.load("smoke", "backward").cases if case.bias == "pair")


@pytest.fixture(scope="module")
def expected_and_got():
    inputs = build(CASE, torch.device("cpu"), requires_grad=True)
    expected = check.expect(CASE, inputs, backward=True)
    o = flash_sparse_attn_func(
        inputs.q,
        inputs.k,
        inputs.v,
        attn_mask=inputs.mask,
        attn_bias=inputs.bias,
        is_causal=True,
    )
    gradients = torch.autograd.grad(o, inputs.leaves(CASE.leaves), expected.do)
    return expected, {"o": o} | dict(zip(CASE.leaves, gradients, strict=True))


def test_right_results_pass(expected_and_got):
    expected, got = expected_and_got
    found = check.errors(expected, got)
    assert set(found) == {"o", "q", "k", "v", "bias"}
    assert max(found.values()) < 1e-5
    assert check.wrong(CASE, found) is None


def off_by_a_scale(x, rows):
    return x * 1.01


def not_finite(x, rows):
    return x.clone().index_fill_(1, rows[:1], torch.nan)


def another_row(x, rows):
    """A value where nothing belongs: rows without an upstream gradient."""
    dim = 2 if x.shape[1] == 1 and x.shape[2] > 1 else 1
    other = next(i for i in range(x.shape[dim]) if i not in rows.tolist())
    return x.clone().index_fill_(dim, torch.tensor([other]), 1.0)


@pytest.mark.parametrize(
    ("name", "mutant", "title"),
    [
        ("o", off_by_a_scale, "o is off"),
        ("q", off_by_a_scale, "dq is off"),
        ("k", off_by_a_scale, "dk is off"),
        ("v", off_by_a_scale, "dv is off"),
        ("bias", off_by_a_scale, "db is off"),
        ("o", not_finite, "o is off by nan"),
        ("q", another_row, "dq is off"),
        ("bias", another_row, "db is off"),
    ],
)
def test_wrong_results_do_not(expected_and_got, name, mutant, title):
    expected, got = expected_and_got
    bad = got | {name: mutant(got[name].detach(), expected.rows)}
    assert title in check.wrong(CASE, check.errors(expected, bad))


def test_a_selection_is_compared_key_by_key():
    case = next(case for case in cases.load("smoke", "dynamic").cases if case.selects)
    inputs = build(case, torch.device("cpu"), requires_grad=True)
    expected = check.expect(case, inputs, backward=True)
    start, end = inputs.intervals.start, inputs.intervals.end
    assert check.selection_error(expected, inputs.intervals) == 0
    assert check.wrong(case, {"selection": 0.0}) is None
    late = end.clone()
    late[0, 0, 0] += 1
    found = check.selection_error(expected, IntervalMask(start, late))
    assert found == 1 / start.numel()
    assert "the selection is off by" in check.wrong(case, {"selection": found})
    # An empty interval hides its key wherever it lies.
    hidden = (end <= start).int()
    assert check.selection_error(expected, IntervalMask(start + 3 * hidden, end)) == 0
