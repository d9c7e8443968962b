"""Tables and plots from a small committed result."""

import copy
import struct
from pathlib import Path

import pytest

from bench import plot, report, results
from bench.__main__ import main

FIXTURE = Path(__file__).with_name("backward-smoke.json")
BLOCK = "before\n<!-- bench: backward-smoke -->\nstale\n<!-- /bench -->\nafter\n"


@pytest.fixture(scope="module")
def result():
    return results.load(FIXTURE)


def test_table_has_every_case_and_every_timed_contender(result):
    text = report.table(result)
    assert "| backward | fsa-reference | sdpa-flash | sdpa-masked |" in text
    assert "| forward+backward | fsa-reference | sdpa-flash | sdpa-masked |" in text
    for record in result["cases"]:
        assert text.count(f"| {record['name']} |") == 2
    assert "flex" not in text


def test_fastest_is_bold_and_absent_is_a_dash(result):
    record = next(record for record in result["cases"] if record["case"]["bias"])
    line = next(x for x in report.table(result).split("\n") if x.startswith(f"| {record['name']}"))
    times = {
        row["contender"]: row["times"]["backward"]["median_ms"]
        for row in record["rows"]
        if row["times"]
    }
    assert f"**{min(times.values()):.3g} (" in line
    assert line.count("**") == 2
    assert "| – |" in line  # sdpa-flash takes no bias


def test_readme_block_is_generated_and_stays(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(BLOCK, encoding="utf-8")
    arguments = ["report", str(readme), "--results", str(FIXTURE.parent)]
    assert main([*arguments, "--check"]) == 1
    assert readme.read_text(encoding="utf-8") == BLOCK
    assert main(arguments) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- bench: backward-smoke -->\n")
    assert text.endswith("<!-- /bench -->\nafter\n")
    assert "stale" not in text
    assert main([*arguments, "--check"]) == 0


def test_readme_without_block_or_with_unknown_results():
    with pytest.raises(ValueError, match="no block"):
        report.refresh("nothing here", FIXTURE.parent)
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        report.refresh(BLOCK.replace("backward-smoke", "nowhere"), FIXTURE.parent)


def test_table_says_why_a_contender_that_tried_was_not_timed(result):
    bad = copy.deepcopy(result)
    record = bad["cases"][0]
    record["rows"][-1] |= {"status": results.FAILED, "reason": "no kernel"}
    contender = record["rows"][-1]["contender"]
    assert f"- {contender}, {record['name']}: failed: no kernel" in report.table(bad)
    assert "failed" not in report.table(result)


def test_plot(tmp_path, capsys):
    assert main(["plot", str(FIXTURE), "--to", str(tmp_path)]) == 0
    png = (tmp_path / "backward-smoke.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    # Two quantities across; down, bars for the cases of no sweep and lines for the one sweep.
    assert (width, height) == (2 * plot.PANEL[0] * 150, 2 * plot.PANEL[1] * 150)


def test_plot_of_nothing(result, tmp_path):
    empty = result | {"cases": []}
    with pytest.raises(ValueError, match="nothing was timed"):
        plot.draw(empty, tmp_path / "empty.png")
