"""The yardstick: two transcriptions of the specification agree, and inputs are what they claim.

A wrong or sloppy textbook computation would widen the bound of N1 for every backend.
"""

from __future__ import annotations

import pytest
import torch
from flash_sparse_attn.spec import cases
from flash_sparse_attn.spec.schema import QUANTITIES, Case

from ..conformance import compare, eager, inputs, oracle

VALID = [case for case in cases().values() if not case.reject and case.size == "small"]
# In float64 the dtype of the inputs matters no more than their rounding does.
ONE_DTYPE = [case for case in VALID if case.dtype in ("float32", "float64")]
ONLY_HALF = [
    case
    for case in VALID
    if case.dtype == "float16"
    and not any(f"{case.id.partition('[')[0]}[float32" in other.id for other in ONE_DTYPE)
]
AGREE = dict.fromkeys(QUANTITIES, 1e-8)


@pytest.mark.parametrize("case", ONE_DTYPE + ONLY_HALF, ids=lambda case: case.id)
def test_eager_agrees_with_reference(case: Case) -> None:
    """In float64 both give the same, so a bound of N1 is rounding and nothing else."""
    data = inputs.materialise(case, "cpu")
    exact = oracle.run(case, data)
    assert compare.failures(eager.run(case, data, torch.float64), exact, exact, AGREE) == []


def test_inputs_repeat() -> None:
    case = cases()["packed/intervals-bias-window[float32]"]
    one, other = (inputs.materialise(case, "cpu") for _ in range(2))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(x, other.tensors[name]) for name, x in one.tensors.items())
    assert torch.equal(one.do, other.do)


def test_dtypes_share_their_data() -> None:
    wide, half = (
        inputs.materialise(cases()[f"score/dot-product[{dtype}]"], "cpu").tensors["q"]
        for dtype in ("float32", "bfloat16")
    )
    assert torch.equal(wide.bfloat16(), half)


@pytest.mark.parametrize(
    ("layout", "holds"),
    [
        ("heads_first", lambda t: not t["k"].is_contiguous() and t["k"].stride(-1) == 1),
        ("fused", lambda t: t["q"].stride(1) == t["v"].stride(1) == 8 * t["q"].shape[-1]),
        ("padded", lambda t: t["q"].stride(-2) == t["q"].shape[-1] + 3),
        ("strided", lambda t: t["q"].stride(-1) == 2),
        ("expanded", lambda t: t["k"].stride(2) == 0 and t["v"].stride(2) == 0),
        ("offset", lambda t: t["q"].storage_offset() == 1),
    ],
)  # fmt: skip
def test_layouts(layout: str, holds) -> None:
    data = inputs.materialise(cases()[f"layout/strides[float32,{layout}]"], "cpu")
    assert holds(data.tensors)


@pytest.mark.parametrize(("name", "same"), [("q-is-k", "qk"), ("k-is-v", "kv"), ("all-one", "qkv")])
def test_shared_tensors(name: str, same: str) -> None:
    tensors = inputs.materialise(cases()[f"layout/{name}[float32]"], "cpu").tensors
    assert len({id(tensors[x]) for x in same}) == 1
    assert len({id(tensors[x]) for x in "qkv"}) == 3 - len(same) + 1


def test_cache_hides_what_may_not_be_read() -> None:
    """N2: NaN past a length, in unused pages, and at keys that no list holds."""
    case = cases()["cache/indices-pages[float32,random]"]
    data = inputs.materialise(case, "cpu")
    table, k = data.tensors["page_table"].long(), data.tensors["k"]
    logical = k[table].flatten(1, 2)
    hidden = logical.isnan().all(-1)
    listed = torch.zeros_like(hidden)
    for b, length in enumerate(case.cache.lengths):
        for n, keys in enumerate(data.tensors["key_indices"][b].tolist()):
            listed[b, [key for key in keys if 0 <= key < length], n] = True
    assert torch.equal(hidden, ~listed)
    unused = [p for p in range(len(k)) if p not in table]
    assert len(unused) == 2
    assert k[unused].isnan().all()


def test_nan_bias_hides_at_invisible_pairs_only() -> None:
    data = inputs.materialise(cases()["numerics/nan-mask[float32]"], "cpu")
    bias = data.tensors["bias"]
    assert torch.equal(bias.isfinite(), data.visible)
    assert bias.isnan().any()
    assert bias.isinf().any()


@pytest.mark.parametrize(
    ("x", "x64", "eager_", "count"),
    [
        (1.0, 1.0, 1.0, 0),
        (1.02, 1.0, 1.01, 0),
        (1.04, 1.0, 1.01, 1),
        (float("nan"), 1.0, 1.0, 1),
        (float("inf"), 1.0, 1.0, 1),
        (float("inf"), -float("inf"), -float("inf"), 1),
        (-float("inf"), -float("inf"), -float("inf"), 0),
        (float("nan"), float("nan"), float("nan"), 0),
        (0.0, float("nan"), float("nan"), 1),
        (1.0, 1.0, float("inf"), 1),
        (1.0, 1.0, float("nan"), 1),
    ],
)
def test_n1(x: float, x64: float, eager_: float, count: int) -> None:
    """Beside an element on which all agree."""
    got, exact, textbook = ({"o": torch.tensor([0.0, y])} for y in (x, x64, eager_))
    assert len(compare.failures(got, exact, textbook, {"o": 1e-3})) == count


def test_n1_wants_the_same_shapes_and_quantities() -> None:
    one = {"o": torch.zeros(2)}
    assert compare.failures({"o": torch.zeros(2, 1)}, one, one, {"o": 1.0})
    assert compare.failures({}, one, one, {"o": 1.0})
    assert compare.failures(one | {"lse": torch.zeros(2)}, one, one, {"o": 1.0})
