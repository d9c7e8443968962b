"""The suites as data."""

import re
from dataclasses import replace

import pytest

from bench import cases
from bench.cases import Case

SIZES = {"seqlen": 8, "heads_q": 2, "heads_kv": 1, "head_dim": 4}


@pytest.mark.parametrize(
    ("command", "suite"),
    [(command, suite) for command in cases.COMMANDS for suite in cases.names(command)],
)
def test_every_suite_is_well_formed(command, suite):
    loaded = cases.load(suite, command)
    assert loaded.cases
    assert loaded.about


def test_a_command_has_its_default_suite_and_a_suite_a_command():
    for command, suite in cases.DEFAULT_SUITES.items():
        assert suite in cases.names(command)
        assert "smoke" in cases.names(command)
    assert {name for command in cases.COMMANDS for name in cases.names(command)} == set(
        cases.names()
    )
    assert "dense" not in cases.names("dynamic")


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


@pytest.mark.parametrize(("heads_q", "heads_kv", "head_dim"), [(32, 8, 128), (16, 16, 64)])
def test_the_linear_suite_grows_to_its_ends(heads_q, heads_kv, head_dim):
    suite = cases.load("linear", "dynamic")
    own = [
        c
        for c in suite.cases
        if (c.heads_q, c.heads_kv, c.head_dim) == (heads_q, heads_kv, head_dim)
    ]
    topk = [c for c in own if c.mask == "topk"]
    assert all(c.selects and c.per_head and c.causal and c.dtype == "bfloat16" for c in topk)
    lengths = [2**n for n in range(12, 19)]
    assert [c.seqlen for c in topk if c.sweep == "seqlen" and not c.bias] == lengths
    widths = [c for c in topk if c.sweep == "window_size"]
    assert [c.window_size for c in widths] == [512, 1024, 2048, 4096]
    assert {c.seqlen for c in widths} == {32768}
    assert [c.seqlen for c in own if c.mask is None] == lengths[:-1]


def test_the_linear_suite_has_the_layer_and_the_key_mask():
    suite = cases.load("linear", "dynamic")
    assert len([c for c in suite.cases if c.bias_grad and c.per_head]) == 7
    (keys,) = [c for c in suite.cases if c.mask == "keys"]
    assert (keys.seqlen, keys.window_size, keys.per_head) == (32768, 1024, True)


@pytest.mark.parametrize(
    ("contender", "name", "reason"),
    [
        ("flex", "S32768 H32/8 D128 bf16 causal mask=topk\\(1024.*intervals$", None),
        ("flex", "S65536 H32/8 D128 bf16 causal mask=.*intervals$", "above S 32768: the time"),
        ("flex", "S32768 H16 D64 bf16 causal mask=topk\\(2048", "suite: it is compared at w"),
        ("flex", "S4096 H32/8 D128 bf16 causal$", "suite: it is compared on the masked"),
        ("flex", "S32768 .*dbias", None),
        ("flex", "S16384 .*dbias", "with a bias"),
        ("flex", "mask=keys", None),
        ("sdpa-flash", "S4096 H16 D64 bf16 causal$", "cuDNN"),
        ("sdpa-cudnn", "S131072 H16 D64 bf16 causal$", None),
        ("flash-attn-4", "S131072 H32/8 D128 bf16 causal$", None),
        ("fsa-triton", "S262144 H32/8 D128 .*dbias", None),
    ],
)  # fmt: skip
def test_who_is_left_out_of_the_linear_suite(contender, name, reason):
    suite = cases.load("linear", "dynamic")
    (case,) = {replace(c, sweep=None) for c in suite.cases if re.search(name, c.name)}
    found = suite.left_out(contender, case)
    assert (found is None) if reason is None else (reason in found)


def test_name_tells_the_case():
    case = Case(**SIZES, causal=True, mask="topk", window_size=3, bias="key", bias_grad=True)
    assert case.name == "B1 S8 H2/1 D4 bf16 causal mask=topk(3) bias=key dbias"
    assert case.leaves == ("q", "k", "v", "bias")
    assert not case.selects
    intervals = replace(case, mask_form="intervals", per_head=True)
    assert intervals.name == (
        "B1 S8 H2/1 D4 bf16 causal mask=topk(3) per-head as-intervals bias=key dbias"
    )
    assert intervals.selects


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
        {"per_head": True},
        {"per_head": True, "mask": "random", "density": 0.5},
        {"per_head": True, "mask": "keys", "window_size": 3, "bias": "pair"},
    ],
)
def test_a_case_without_meaning_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Case(**(SIZES | fields))


def test_unknown_suite():
    with pytest.raises(ValueError, match="'none'"):
        cases.load("none", "forward")
