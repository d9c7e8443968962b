"""A run: rows for every contender whatever befalls it, and the file that it leaves."""

import json
import subprocess
import sys
from dataclasses import fields
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
                assert tuple(row["times"]) == runner.QUANTITIES[command]
            for quantity, times in row["times"].items():
                assert times["q1_ms"] <= times["median_ms"] <= times["q3_ms"]
                rate = record["flops"][quantity] / times["median_ms"] / 1e9
                assert times["tflops"] == pytest.approx(rate)


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
@pytest.mark.parametrize("command", cases.COMMANDS)
def test_on_a_gpu(command, contenders, arguments, tmp_path):
    selection = ["--suite", "smoke", "--device", "cuda", "--peers", "|".join(contenders)]
    assert main([command, *selection, "--seconds", "0.01", "--out", str(tmp_path), *arguments]) == 0
    (file,) = tmp_path.rglob("*.json")
    result = results.load(file)
    check_schema(result, command)
    timed = [row for record in result["cases"] for row in record["rows"] if row["times"]]
    assert {row["contender"] for row in timed} == contenders
    assert all(row["memory_call"] > 0 for row in timed)
