"""Which backend runs: order, reasons, no fallback for a named one, one warning otherwise (E9)."""

from __future__ import annotations

import warnings

import pytest
import torch

from flash_sparse_attn import capability, dispatch, get_available_backends, registry
from flash_sparse_attn.problem import AttentionOptions
from flash_sparse_attn.tensors import AttentionTensors
from flash_sparse_attn.validation import describe


class Backend:
    """A backend with given reasons."""

    def __init__(self, absent=(), against=()):
        self.absent, self.against = list(absent), list(against)

    def availability(self):
        return self.absent

    def unsupported(self, problem):
        return self.against


@pytest.fixture
def problem():
    from dataclasses import replace

    q = torch.zeros(1, 4, 2, 8)
    made = describe(AttentionTensors(q, q, q), AttentionOptions(softmax_scale=1.0))
    dispatch.select.cache_clear()
    yield replace(made, device="cuda", arch=90)
    dispatch.select.cache_clear()


@pytest.fixture
def backends(monkeypatch):
    """Replace the registered backends by given ones."""

    def install(**given):
        load = registry.load
        monkeypatch.setattr(registry, "names", lambda: tuple(given))
        monkeypatch.setattr(registry, "load", lambda name: given.get(name) or load(name))
        monkeypatch.setattr(registry, "availability", lambda name: given[name].availability())
        return given

    return install


def test_first_backend_without_reasons(problem, backends):
    given = backends(a=Backend(absent=["not built"]), b=Backend(against=["no"]), c=Backend())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.select(problem, None) is given["c"]


def test_reference_with_one_warning_and_every_reason(problem, backends):
    backends(a=Backend(absent=["not built"]), b=Backend(against=["too wide", "too old"]))
    with pytest.warns(UserWarning, match=r"a: not built; b: too wide, too old"):
        chosen = dispatch.select(problem, None)
    assert chosen is registry.load(registry.REFERENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.select(problem, None)


def test_named_backend_never_falls_back(problem, backends):
    backends(a=Backend(absent=["not built"]), b=Backend(against=["too wide", "too old"]))
    with pytest.raises(ImportError, match="not built"):
        dispatch.select(problem, "a")
    with pytest.raises(NotImplementedError, match="too wide; too old"):
        dispatch.select(problem, "b")


def test_cpu_tensors_go_to_the_reference(problem, backends):
    from dataclasses import replace

    backends(a=Backend())
    cpu = replace(problem, device="cpu", arch=None)
    assert dispatch.select(cpu, None) is registry.load(registry.REFERENCE)


def test_gradients_through_a_cache_are_refused_with_the_reason(problem):
    from dataclasses import replace

    cache = replace(problem, form="cache", device="cpu", arch=None, grads=("q",))
    with pytest.raises(NotImplementedError, match="cache form"):
        dispatch.select(cache, None)


def test_reference_is_always_available():
    assert get_available_backends()[-1] == registry.REFERENCE


def test_capability_gives_every_reason(problem, tmp_path):
    from dataclasses import replace

    table = tmp_path / "capability.toml"
    table.write_text(
        'forms = ["packed"]\nterms = []\ndtypes = ["float16"]\nhead_dim_max = 4\n'
        'head_dim_v_differs = false\ndevices = ["cpu"]\narch_min = 100\narch_max = 80\n'
        "backward = false\n"
    )
    narrow = capability.load(table)
    hard = replace(problem, softcap=1.0, causal=True, head_dim_v=2, grads=("q",))
    found = capability.reasons(narrow, hard)
    words = ("form", "'causal'", "'softcap'", "dtype", "head dim 8", "head dim of v", "'cuda'")
    for word in (*words, "below 100", "above 80", "gradients of q"):
        assert any(word in reason for reason in found), word
    assert len(found) == 10
    assert hash(hard) == hash(replace(hard))
    assert "sm_90" in str(hard)


def test_capability_fields_are_checked(tmp_path):
    table = tmp_path / "capability.toml"
    table.write_text("forms = []\n")
    with pytest.raises(TypeError, match="missing"):
        capability.load(table)
