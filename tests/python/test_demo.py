"""`python -m flash_sparse_attn demo`: what it computes, what it tells, how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_sparse_attn import demo, registry

SMALL = replace(demo.SETTINGS["cpu"], seqlen=96, window_size=16)
ARGUMENTS = ["--device", "cpu", "--seqlen", "96"]


@pytest.fixture(scope="module")
def found() -> dict:
    return demo.run(SMALL, backend=None)


def test_the_command_runs_and_says_what_it_did() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "flash_sparse_attn", "demo", *ARGUMENTS],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    told = answer.stdout
    assert "B1 S96 H4/2 D64 float32 on cpu" in told
    assert "ran on    reference" in told
    assert "O(N^2) definition" in told
    assert all(f"not on    {name}: " in told for name in registry.names())
    assert all(f" {name} " in told for name in ("o", "dq", "dk", "dv", "dbias"))
    assert "TOO LARGE" not in told
    assert "scaled_dot_product_attention" in told


def test_json_is_what_run_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([*ARGUMENTS, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["backend"] == "reference"
    assert told["setting"]["seqlen"] == 96
    assert told["check"]["passed"] is True


def test_on_a_cpu_the_reference_runs_and_every_backend_has_a_reason(found: dict) -> None:
    assert found["backend"] == registry.REFERENCE
    assert tuple(found["not_run"]) == registry.names()
    assert all(found["not_run"].values())


def test_the_check_compares_every_gradient(found: dict) -> None:
    errors = found["check"]["errors"]
    assert set(errors) == {"o", "dq", "dk", "dv", "dbias"}
    assert all(0 < x["error"] <= x["bound"] < 1e-3 for x in errors.values())
    assert found["check"]["passed"]


def test_time_and_memory_are_measured_for_both(found: dict) -> None:
    for name in ("sparse", "dense"):
        assert all(found[name][x] > 0 for x in ("mask_ms", "forward_ms", "backward_ms"))
        assert found[name]["peak_bytes"] > 96 * 96 * 4  # on a CPU both form N x N scores
    assert found["mask_bytes"] == {"intervals": 2 * 2 * 96 * 4, "dense": 2 * 96 * 96}


@pytest.mark.parametrize("other", [demo.dense, demo.eager])
def test_the_computations_beside_it_are_of_the_same_function(other: Callable) -> None:
    inputs = demo.make_inputs(replace(SMALL, dtype="float64"))
    mask = demo.keep_best(inputs, SMALL)
    assert 0 < mask.to_dense(SMALL.seqlen).double().mean() < 0.3
    do = torch.randn_like(inputs["q"])
    results = []
    for o in (demo.sparse(inputs, mask, None), other(inputs, demo.dense_bias(inputs, mask))):
        results.append([o, *torch.autograd.grad(o, list(inputs.values()), do)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_rows_see_their_best_keys_so_far() -> None:
    inputs = demo.make_inputs(SMALL)
    dense = demo.keep_best(inputs, SMALL).to_dense(SMALL.seqlen)
    for i in (0, 10, 50, 95):
        best = inputs["bias"][:, :, 0, : i + 1].topk(min(16, i + 1)).indices
        expected = torch.zeros(1, 2, 96, dtype=torch.bool).scatter(-1, best, True)
        assert torch.equal(dense[:, :, i], expected)


@pytest.mark.parametrize("wrong", ["o", "dbias"])
def test_a_wrong_result_fails(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = demo.sparse

    def off(inputs: dict[str, Tensor], *rest: object) -> Tensor:
        if wrong == "o":
            return right(inputs, *rest) * 1.001
        bias = inputs["bias"]
        return right(inputs | {"bias": bias.detach() + 1.001 * (bias - bias.detach())}, *rest)

    monkeypatch.setattr(demo, "sparse", off)
    assert demo.main(ARGUMENTS) == 1
    lines = [x for x in capsys.readouterr().out.splitlines() if "TOO LARGE" in x]
    assert any(line.split()[0] == wrong for line in lines)


def test_a_backend_that_cannot_run_is_named_with_its_reasons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "availability", lambda name: [f"no {name} today"])
    assert demo.main([*ARGUMENTS, "--backend", "triton"]) == 2
    told = capsys.readouterr()
    assert "no triton today" in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("option", "value"),
    [("backend", "flex"), ("device", "tpu"), ("seqlen", "0"), ("seqlen", "-1"), ("seqlen", "many")],
)
def test_bad_options_are_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main([*ARGUMENTS, f"--{option}", value])
    assert ended.value.code == 2
    assert f"--{option}" in capsys.readouterr().err


def test_running_out_of_memory_is_told(found: dict) -> None:
    def exhausted(_: object) -> Tensor:
        raise torch.OutOfMemoryError

    inputs = demo.make_inputs(SMALL)
    nothing = demo.measure(lambda: None, exhausted, inputs)
    assert set(nothing) == set(found["dense"])
    assert set(nothing.values()) == {None}
    told = demo.render(found | {"dense": nothing}).splitlines()
    assert ["dense", "out", "of", "memory"] in [line.split() for line in told]


def test_the_peak_counts_what_is_alive_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.zeros(2**18)

    def together() -> None:
        kept = [torch.zeros(2**18) for _ in range(3)]
        assert len(kept) == 3

    device = torch.device("cpu")
    assert demo._peak_bytes(one_after_the_other, device) == 2**20
    assert demo._peak_bytes(together, device) == 3 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_kernel_runs_and_passes_the_check() -> None:
    found = demo.run(replace(demo.SETTINGS["cuda"], seqlen=2048), backend=None)
    assert found["backend"] in registry.names()
    assert found["check"]["passed"], found["check"]
    assert 0 < found["sparse"]["peak_bytes"] < found["dense"]["peak_bytes"]
