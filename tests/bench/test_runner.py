"""A run: rows for every contender whatever befalls it, and the file that it leaves."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from bench import cases, peers, results, runner
from bench.__main__ import main
from bench.peers import Prepared
from bench.results import Row

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMOKE = cases.load("smoke", "forward")
TOPK = "intervals$"
"""What the names of cases without a bias end in that select."""


class Broken:
    """A peer that goes wrong in the way that its name says."""

    ours = False

    def __init__(self, name):
        self.name = name

    def unavailable(self, case, device):
        return "not here" if self.name == "unavailable" else None

    def prepare(self, case, inputs):
        if self.name == "raises":
            raise RuntimeError("no kernel\nfor this")
        if self.name == "unsupported":
            raise NotImplementedError("head dim 16")
        return Prepared(lambda: torch.zeros_like(inputs.q))


@pytest.fixture
def with_broken_peers(monkeypatch):
    good = peers.all_peers()
    broken = tuple(Broken(name) for name in ("unavailable", "raises", "unsupported", "zeros"))
    monkeypatch.setattr(peers, "all_peers", lambda: (*broken, *good))


def test_what_befalls_a_peer_is_its_row(with_broken_peers, tmp_path, capsys):
    settings = runner.Settings("forward", seconds=0.001, only="fp32 causal$")
    result = runner.run(SMOKE, settings, CPU, tmp_path)
    rows = {row["contender"]: row for row in result["cases"][0]["rows"]}
    assert (rows["unavailable"]["status"], rows["unavailable"]["reason"]) == (
        results.UNAVAILABLE,
        "not here",
    )
    assert rows["raises"]["status"] == results.FAILED
    assert rows["raises"]["reason"] == "RuntimeError: no kernel for this"
    assert rows["unsupported"]["status"] == results.UNSUPPORTED
    assert rows["zeros"]["status"] == results.WRONG
    assert "o is off by 1 " in rows["zeros"]["reason"]
    assert rows["fsa-reference"]["status"] == results.OK
    assert rows["sdpa-flash"]["status"] == results.OK
    assert all(bool(row["times"]) == (row["status"] == results.OK) for row in rows.values())
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in rows)


def test_the_file_is_written_after_each_case(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(results, "save", lambda result, where: seen.append(len(result["cases"])))
    settings = runner.Settings("forward", seconds=0.001, only="topk", contenders="reference")
    runner.run(SMOKE, settings, CPU, tmp_path)
    assert seen == [1, 2]


def test_inputs_that_cannot_be_made_are_rows_too(monkeypatch, tmp_path):
    def no_room(*arguments, **keywords):
        raise torch.OutOfMemoryError("2 TiB")

    monkeypatch.setattr(runner, "build", no_room)
    settings = runner.Settings("forward", seconds=0.001, only="topk")
    result = runner.run(SMOKE, settings, CPU, tmp_path)
    assert len(result["cases"]) == 2
    rows = [row for record in result["cases"] for row in record["rows"]]
    assert all(row["status"] == results.FAILED and "2 TiB" in row["reason"] for row in rows)


def test_nothing_selected(tmp_path):
    for settings in (
        runner.Settings("forward", only="no such case"),
        runner.Settings("forward", contenders="no such peer"),
    ):
        with pytest.raises(ValueError, match="matches 'no such"):
            runner.run(SMOKE, settings, CPU, tmp_path)
    assert main(["forward", "--suite", "smoke", "--only", "nothing", "--device", "cpu"]) == 2


def check_schema(result, command):
    assert list(result) == [
        "schema",
        "command",
        "suite",
        "about",
        "settings",
        "environment",
        "readings_after",
        "cases",
    ]
    assert (result["schema"], result["command"]) == (results.SCHEMA, command)
    environment = result["environment"]
    assert {"date", "device", "gpu", "torch", "cuda", "commit", "dirty"} <= set(environment)
    assert environment["packages"].keys() >= {"triton", "flash-attn-4"}
    for record in result["cases"]:
        assert cases.Case(**record["case"]).name == record["name"]
        assert record["rows"]
        for row in record["rows"]:
            assert set(row) == {field.name for field in fields(Row)}
            assert row["status"] in results.STATUSES
            assert (row["reason"] is None) == (row["status"] == results.OK)
            if row["status"] == results.OK:
                assert tuple(row["times"]) == offered(command, record, row)
            for quantity, times in row["times"].items():
                assert times["q1_ms"] <= times["median_ms"] <= times["q3_ms"]
                if quantity == "selection":
                    assert times["tflops"] is None
                    continue
                rate = record["flops"][quantity] / times["median_ms"] / 1e9
                assert times["tflops"] == pytest.approx(rate)


def offered(command, record, row):
    """The quantities that a contender has on a case."""
    quantities = runner.QUANTITIES[command]
    if row["contender"] == "torch-topk":
        return ("selection",)
    if record["case"]["mask_form"] == "intervals" and row["ours"]:
        return quantities
    return tuple(q for q in quantities if q not in ("selection", "end to end"))


def test_forward_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "bench", "forward", "--suite", "smoke", "--device", "cpu"]
    command += ["--seconds", "0.005", "--out", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("*.json")
    assert file.name == "forward-smoke.json"
    result = results.load(file)
    check_schema(result, "forward")
    assert result["environment"]["commit"] == "abc"
    assert [record["name"] for record in result["cases"]] == [case.name for case in SMOKE.cases]


def test_backward(tmp_path):
    arguments = ["backward", "--suite", "smoke", "--device", "cpu", "--seconds", "0.005"]
    assert main([*arguments, "--only", "dbias", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("*.json")
    result = results.load(file)
    check_schema(result, "backward")
    for record in result["cases"]:
        rows = {row["contender"]: row for row in record["rows"]}
        assert set(rows["fsa-reference"]["errors"]) == {"o", "q", "k", "v", "bias"}
        assert rows["sdpa-masked"]["status"] == results.OK


def test_dynamic(tmp_path):
    arguments = ["dynamic", "--suite", "smoke", "--device", "cpu", "--seconds", "0.005"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("*.json")
    assert file.name == "dynamic-smoke.json"
    result = results.load(file)
    check_schema(result, "dynamic")
    assert [record["name"] for record in result["cases"]] == [
        case.name for case in cases.load("smoke", "dynamic").cases
    ]
    for record in result["cases"]:
        rows = {row["contender"]: row for row in record["rows"]}
        leaves = ["q", "k", "v"] + ["bias"] * record["case"]["bias_grad"]
        selects = record["case"]["mask_form"] == "intervals"
        assert list(rows["fsa-reference"]["errors"]) == ["o", *leaves] + ["selection"] * selects
        assert rows["torch-topk"]["status"] == (results.OK if selects else results.UNAVAILABLE)
        assert rows["sdpa-masked"]["status"] == results.UNAVAILABLE
        dense = record["case"]["mask"] is None
        assert (rows["sdpa-flash"]["status"] == results.OK) == dense
        assert record["memory"]["inputs"] >= record["memory"]["results"] > 0


def test_selection_has_no_place_elsewhere(tmp_path):
    settings = runner.Settings("backward", seconds=0.001, only="dbias", contenders="reference")
    result = runner.run(cases.load("smoke", "backward"), settings, CPU, tmp_path)
    assert {row["contender"] for record in result["cases"] for row in record["rows"]} == {
        "fsa-reference"
    }
    arguments = ["forward", "--suite", "smoke", "--device", "cpu", "--peers", "torch-topk"]
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    with pytest.raises(SystemExit):
        main(["forward", "--suite", "smoke", "--scores", "x.npy"])


def test_a_wrong_selection_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(
        runner.check, "selection_error", lambda expected, mask: 1 / mask.start.numel()
    )
    settings = runner.Settings("dynamic", seconds=0.001, only=f"S32 .*{TOPK}", contenders="ref")
    (record,) = runner.run(cases.load("smoke", "dynamic"), settings, CPU, tmp_path)["cases"]
    (row,) = record["rows"]
    assert row["status"] == results.WRONG
    assert "the selection is off by" in row["reason"]


def test_whom_the_suite_leaves_out_has_its_reason(tmp_path):
    limit = cases.Limit(peers="^sdpa-flash$", cases="causal$", seqlen=32, reason="it is slow")
    suite = replace(cases.load("smoke", "dynamic"), limits=(limit,))
    settings = runner.Settings("dynamic", seconds=0.001, only="causal$", contenders="sdpa-flash")
    first, second = runner.run(suite, settings, CPU, tmp_path)["cases"]
    assert first["rows"][0]["status"] == results.OK
    assert second["rows"][0]["status"] == results.UNAVAILABLE
    assert second["rows"][0]["reason"] == "left out by the suite above S 32: it is slow"


def test_scores_of_a_file(tmp_path, capsys):
    file = tmp_path / "trained.pt"
    torch.save(torch.arange(64.0).flip(0).expand(3, 2, 64).clone(), file)
    arguments = ["dynamic", "--suite", "smoke", "--device", "cpu", "--seconds", "0.001"]
    arguments += ["--peers", "reference", "--only", TOPK, "--out", str(tmp_path)]
    assert main([*arguments, "--scores", str(file)]) == 0
    (written,) = tmp_path.rglob("*.json")
    assert written.name == "dynamic-smoke-scores.json"
    result = results.load(written)
    assert result["settings"]["scores"] == {"file": "trained.pt", "shape": [3, 2, 64]}
    assert {record["case"]["seqlen"] for record in result["cases"]} == {32, 64}
    printed = capsys.readouterr().out
    assert "left out, longer than the scores: B1 S128" in printed
    assert "Key scores of trained.pt, [3, 2, 64]." in printed
    for nothing in ("S128", "causal$"):
        assert main([*arguments, "--only", nothing, "--scores", str(file)]) == 2


TABLE = {"forward_kernel": {"us": 1.0, "launches": 1.0}}


@pytest.fixture
def timed_row(tmp_path):
    """A smoke case and its row, timed."""
    settings = runner.Settings("dynamic", seconds=0.001, only=f"S32 .*{TOPK}", contenders="ref")
    result = runner.run(cases.load("smoke", "dynamic"), settings, CPU, tmp_path)
    (record,) = result["cases"]
    return cases.Case(**record["case"]), record["rows"], settings


def test_our_kernels_are_profiled(timed_row, monkeypatch):
    case, rows, settings = timed_row
    other = rows[0] | {"contender": "other", "ours": False, "kernels": {}}
    called = []

    def profile(call, device):
        called.append(call())
        return TABLE

    monkeypatch.setattr(runner.kernels, "profile", profile)
    entered = [peer for peer in peers.all_peers() if peer.name == "fsa-reference"]
    runner._profile(case, [*rows, other], entered, settings, CPU)
    assert rows[0]["kernels"] == dict.fromkeys(("selection", "forward", "backward"), TABLE)
    assert other["kernels"] == {}
    selected, o, gradients = called
    assert selected.start.shape == (1, 2, 32)
    assert not o.requires_grad
    assert len(gradients) == 3


def test_without_a_profiler_the_row_says_so(timed_row, monkeypatch, capsys):
    case, rows, settings = timed_row

    def profile(call, device):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(runner.kernels, "profile", profile)
    entered = [peer for peer in peers.all_peers() if peer.name == "fsa-reference"]
    runner._profile(case, rows, entered, settings, CPU)
    assert rows[0]["status"] == results.OK
    assert "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES" in rows[0]["notes"][-1]
    assert "not profiled" in capsys.readouterr().out


def test_results_of_another_schema_are_refused(tmp_path):
    file = tmp_path / "old.json"
    file.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="got 0"):
        results.load(file)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("contenders", "arguments"),
    [({"fsa-reference", "sdpa-masked"}, []), ({"sdpa-masked"}, ["--graph"])],
    ids=["events", "graph"],
)
@pytest.mark.parametrize("command", cases.USUAL_COMMANDS)
def test_on_a_gpu(command, contenders, arguments, tmp_path):
    selection = ["--suite", "smoke", "--device", "cuda", "--peers", "|".join(contenders)]
    assert main([command, *selection, "--seconds", "0.01", "--out", str(tmp_path), *arguments]) == 0
    (file,) = tmp_path.rglob("*.json")
    result = results.load(file)
    check_schema(result, command)
    timed = [row for record in result["cases"] for row in record["rows"] if row["times"]]
    assert {row["contender"] for row in timed} == contenders
    assert all(row["memory_call"] > 0 for row in timed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dynamic_on_a_gpu(tmp_path):
    selection = ["--suite", "smoke", "--device", "cuda", "--peers", "fsa-reference|torch-topk"]
    assert main(["dynamic", *selection, "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("*.json")
    result = results.load(file)
    check_schema(result, "dynamic")
    for record in result["cases"]:
        (row,) = (row for row in record["rows"] if row["ours"])
        assert row["memory_call"] >= record["memory"]["results"]
        assert set(row["kernels"]) == set(row["times"]) - {"end to end"}
        for table in row["kernels"].values():
            assert all(entry["us"] > 0 and entry["launches"] > 0 for entry in table.values())
