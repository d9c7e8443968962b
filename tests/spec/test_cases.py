"""The cases: enough of them, each rule witnessed, and a loader that lets no mistake through."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_args, get_type_hints

import pytest
from flash_sparse_attn.spec import schema

from flash_sparse_attn import spec
from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import DIFFERENTIABLE, TENSOR_NAMES

SIZES = {"batch": 2, "seqlen_q": 5, "heads_q": 4, "heads_kv": 2, "head_dim": 8}
VALID = {"id": "a-case", "rule": "S1", "dtype": "float32", "seed": 1, "sizes": SIZES}


def test_rules_are_those_of_the_page() -> None:
    families = Counter(rule[0] for rule in spec.rules())
    assert families == {"S": 4, "V": 7, "M": 5, "O": 2, "G": 2, "T": 1, "N": 2, "E": 9}


def test_every_rule_is_witnessed() -> None:
    """By a case of its own, not only beside others."""
    assert set(spec.rules()) == {case.rule for case in spec.cases().values()}


def test_cases_are_many_as_written_and_expanded() -> None:
    assert len(spec.declared()) >= 200
    assert len(spec.cases()) >= len(spec.declared())


def test_names_and_seeds_are_unique() -> None:
    names = Counter((family, table["id"]) for family, table in spec.declared())
    seeds = Counter(table["seed"] for _, table in spec.declared())
    assert max(names.values()) == max(seeds.values()) == 1


@pytest.mark.parametrize("form", ["batched", "packed", "cache"])
def test_forms_have_valid_and_invalid_cases(form: str) -> None:
    of_form = [case for case in spec.cases().values() if case.form == form]
    assert {case.reject is None for case in of_form} == {True, False}


def test_valid_rules_are_witnessed_in_half_precision_and_float32() -> None:
    """The E rules do not depend on the dtype."""
    valid = [case for case in spec.cases().values() if case.reject is None]
    for rule in spec.rules():
        if rule[0] != "E":
            dtypes = {case.dtype for case in valid if rule in case.rules}
            assert {"float32", "bfloat16"} <= dtypes, rule


@pytest.mark.parametrize(
    ("attribute", "wanted"),
    [
        ("head_dim", {1, 8, 16, 24, 33, 64, 72, 80, 96, 128, 160, 192, 256}),
        ("seqlen_q", {0, 1, 63, 64, 65, 127, 128, 129, 200}),
        ("seqlen_k", {0, 1, 63, 64, 65, 127, 128, 129, 200}),
        ("batch", {0, 1, 3, 7}),
    ],
)
def test_sizes_that_break_kernels_are_covered(attribute: str, wanted: set[int]) -> None:
    covered = {getattr(case.sizes, attribute) for case in spec.cases().values() if not case.reject}
    assert wanted <= covered


@pytest.mark.parametrize("term", ["mask", "bias"])
def test_every_broadcast_is_covered(term: str) -> None:
    shapes = {getattr(case, term).shape for case in spec.cases().values() if getattr(case, term)}
    symbols = (("1", "B"), ("1", "Hkv", "Hq"), ("1", "Sq"), ("1", "Sk"))
    wanted = {
        f"{b} {h} {i} {j}"
        for b in symbols[0]
        for h in symbols[1]
        for i in symbols[2]
        for j in symbols[3]
    }
    assert shapes == wanted


def test_every_word_of_the_schema_is_used() -> None:
    """A fill, layout or kind that no case asks for would be code that nothing runs."""
    tables = {
        "data": schema.Data, "mask": schema.Mask, "bias": schema.Bias, "gates": schema.Gates,
        "block_map": schema.BlockMap, "cache": schema.Cache, "intervals": schema.Intervals,
    }  # fmt: skip
    unused = []
    for name, table in tables.items():
        hints = get_type_hints(table)
        for key, hint in hints.items():
            words = {x for x in _literals(hint) if isinstance(x, str)}
            used = {
                getattr(part, key) for case in spec.cases().values() for part in _parts(case, name)
            }
            unused += [f"{name}.{key} = {word}" for word in words - used]
    assert not unused


def _literals(hint: Any) -> tuple[Any, ...]:
    return tuple(x for part in get_args(hint) for x in (_literals(part) or (part,)))


def _parts(case: schema.Case, name: str) -> tuple[Any, ...]:
    value = getattr(case, name)
    return value if isinstance(value, tuple) else () if value is None else (value,)


def test_names_are_those_of_the_package() -> None:
    options = {field.name for field in fields(AttentionOptions)}
    assert {field.name for field in fields(schema.Options)} <= options
    assert get_args(schema.TensorName) == TENSOR_NAMES
    assert schema.ARGUMENTS == DIFFERENTIABLE


def test_axes_expand_into_addressable_cases() -> None:
    axes = {
        "dtype": ["float16", "float32"],
        "sizes": [{"seqlen_q": 3, "head_dim": 4}, {"batch": 1}],
    }
    cases = spec.expand("family", VALID | {"axes": axes})
    assert [case.id for case in cases] == [
        "family/a-case[float16,seqlen_q=3+head_dim=4]",
        "family/a-case[float16,batch=1]",
        "family/a-case[float32,seqlen_q=3+head_dim=4]",
        "family/a-case[float32,batch=1]",
    ]
    assert [case.sizes.batch for case in cases] == [2, 1, 2, 1]
    assert [case.sizes.seqlen_q for case in cases] == [3, 5, 3, 5]
    assert cases[0].dtype == "float16"


def test_what_a_case_leaves_out_is_filled_in() -> None:
    (case,) = spec.expand("family", VALID)
    assert (case.sizes.seqlen_k, case.sizes.head_dim_v, case.form) == (5, 8, "batched")
    assert case.grads == ("q", "k", "v")
    lengths = {"lengths_q": [2, 3], "lengths_k": [4, 1]}
    sizes = {"heads_q": 2, "head_dim": 8}
    (packed,) = spec.expand("family", VALID | {"sizes": sizes, "packed": lengths})
    assert (packed.sizes.batch, packed.sizes.seqlen_q, packed.sizes.seqlen_k) == (2, 5, 5)
    assert packed.form == "packed"
    assert packed.work == 2 * (2 * 4 + 3 * 1)


def test_cases_are_frozen() -> None:
    (case,) = spec.expand("family", VALID)
    with pytest.raises(FrozenInstanceError):
        case.seed = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        spec.cases()["a"] = case  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": "x"}, "unknown keys"),
        ({"sizes": SIZES | {"heads": 3}}, "unknown keys"),
        ({"options": {"casual": True}}, "unknown keys"),
        ({"mask": {"shape": "1 1 1 Sk", "density": 1}}, "unknown keys"),
        ({"axes": {"sizes.heads": [1]}}, "unknown keys"),
        ({"axes": {"dtype": []}}, "each axis is a list"),
        ({"axes": {"dtype": "float32"}}, "each axis is a list"),
        ({"id": "A case"}, "an id is made of"),
        ({"rule": "S9"}, "rules are among"),
        ({"also": ["Z1"]}, "rules are among"),
        ({"dtype": "float8"}, "expected one of"),
        ({"seed": "one"}, "expected <class 'int'>"),
        ({"seed": True}, "expected <class 'int'>"),
        ({"sizes": SIZES | {"batch": -1}}, "out of range"),
        ({"sizes": SIZES | {"heads_kv": 3}}, "multiple of heads_kv"),
        ({"sizes": {"batch": 1}}, "missing"),
        ({"options": {"causal": 1}}, "expected <class 'bool'>"),
        ({"options": {"sinks": -1}}, "out of range"),
        ({"options": {"softmax_threshold": 2.0}}, "out of range"),
        ({"mask": {}}, "missing"),
        ({"mask": {"shape": "1 1 1"}}, "each symbol"),
        ({"mask": {"shape": "B Sq Hq Sk"}}, "each symbol"),
        ({"mask": {"shape": "1 1 1 Sk", "fill": "odd"}}, "expected one of"),
        ({"bias": {"shape": "1 1 1 Sk", "dtype": "float16"}}, "expected one of"),
        ({"intervals": {"shape": "B Sk"}}, "each symbol"),
        ({"block_map": {"block_size": [4]}}, "two sides"),
        ({"block_map": {"block_size": [0, 4]}}, "out of range"),
        ({"grads": ["bias"]}, "arguments that are given"),
        ({"grads": ["mask"]}, "expected one of"),
        ({"sizes": SIZES | {"seqlen_q": 4096}}, "size small means"),
        ({"packed": {"lengths_q": [1], "lengths_k": [1]}}, "follow from the packed lengths"),
        ({"cache": {"lengths": [1]}}, "one a sequence"),
        ({"cache": {"lengths": [1, 6]}}, "fit the cache"),
        ({"cache": {"lengths": [1, 5], "page": 2}}, "pages need lengths"),
        ({"cache": {"page": 5}}, "pages need lengths"),
        ({"reject": {}}, "missing"),
        ({"reject": {"exception": "KeyError"}}, "expected one of"),
        ({"reject": {"exception": "TypeError", "set": {"colour": 1}}}, "expected one of"),
        ({"reject": {"exception": "TypeError"}, "grads": ["q"]}, "asks for no gradient"),
    ],
)
def test_loader_refuses(change: dict[str, Any], message: str) -> None:
    """And says where and why."""
    with pytest.raises(spec.SpecError, match=message):
        spec.expand("family", VALID | change)


def test_loader_refuses_a_case_without_a_rule() -> None:
    with pytest.raises(spec.SpecError, match="rule"):
        spec.expand("family", {key: value for key, value in VALID.items() if key != "rule"})


def test_tolerances_are_complete_and_ordered() -> None:
    """A coarser dtype never has the smaller floor; lse has one floor below float64."""
    table = spec.tolerances()
    assert tuple(table) == schema.DTYPES
    for quantity in schema.QUANTITIES:
        bfloat16, float16, float32, float64 = (
            table[dtype][quantity] for dtype in ("bfloat16", "float16", "float32", "float64")
        )
        assert bfloat16 >= float16 >= float32 > float64 > 0
    assert table["bfloat16"]["lse"] == table["float32"]["lse"]


def test_loading_needs_no_torch() -> None:
    """The folder, taken alone, imports where torch cannot be imported."""
    code = (
        "import sys, importlib.util as u; sys.modules['torch'] = None; "
        "file, folder = sys.argv[1:]; "
        "spec = u.spec_from_file_location('alone', file, submodule_search_locations=[folder]); "
        "module = u.module_from_spec(spec); sys.modules['alone'] = module; "
        "spec.loader.exec_module(module); print(len(module.cases()))"
    )
    arguments = [spec.__file__, str(spec.FOLDER)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(spec.cases())), done.stderr
