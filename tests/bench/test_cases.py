"""The suites as data."""

import pytest

from bench import cases
from bench.cases import Case

SIZES = {"seqlen": 8, "heads_q": 2, "heads_kv": 1, "head_dim": 4}


@pytest.mark.parametrize("suite", cases.names())
@pytest.mark.parametrize("command", cases.COMMANDS)
def test_every_suite_is_well_formed(suite, command):
    loaded = cases.load(suite, command)
    assert loaded.cases
    assert loaded.about


@pytest.mark.parametrize(
    ("suite", "command", "count"),
    [
        ("dense", "forward", 6),
        ("dense", "backward", 6),
        ("masked", "forward", 6),
        ("masked", "backward", 10),
        ("predecessors", "forward", 8 + 11),
    ],
)
def test_size_of_a_suite(suite, command, count):
    assert len(cases.load(suite, command).cases) == count


def test_forward_is_not_run_twice_for_the_gradient_of_the_bias():
    assert not any(case.bias_grad for case in cases.load("masked", "forward").cases)
    assert sum(case.bias_grad for case in cases.load("masked", "backward").cases) == 4


def test_a_sweep_is_one_case_a_value():
    swept = [c for c in cases.load("predecessors", "forward").cases if c.sweep == "window_size"]
    assert [case.window_size for case in swept] == [2**n for n in range(5, 16)]
    assert {case.seqlen for case in swept} == {32768}


def test_name_tells_the_case():
    case = Case(**SIZES, causal=True, mask="topk", window_size=3, bias="key", bias_grad=True)
    assert case.name == "B1 S8 H2/1 D4 bf16 causal mask=topk(3) bias=key dbias"
    assert case.leaves == ("q", "k", "v", "bias")


@pytest.mark.parametrize(
    "fields",
    [
        {"mask": "diagonal"},
        {"bias": "row"},
        {"dtype": "float8"},
        {"mask_form": "bits"},
        {"mask": "keys"},
        {"window_size": 3},
        {"mask": "random"},
        {"density": 0.5},
        {"mask": "topk", "window_size": 3},
        {"mask": "keys", "window_size": 3, "mask_form": "intervals"},
        {"bias_grad": True},
    ],
)
def test_a_case_without_meaning_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Case(**(SIZES | fields))


def test_unknown_suite():
    with pytest.raises(ValueError, match="'none'"):
        cases.load("none", "forward")
