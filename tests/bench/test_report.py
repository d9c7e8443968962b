"""Tables and plots from a small committed result."""

import copy
import struct
from pathlib import Path

import pytest

from bench import derived, plot, plot_dynamic, report, results
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


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A run of the smoke suite, as if kernels had been profiled and memory weighed."""
    folder = tmp_path_factory.mktemp("dynamic")
    arguments = ["dynamic", "--suite", "smoke", "--device", "cpu", "--seconds", "0.002"]
    assert main([*arguments, "--out", str(folder)]) == 0
    (file,) = folder.rglob("*.json")
    result = results.load(file)
    for record in result["cases"]:
        for row in record["rows"]:
            if row["ours"] and row["times"]:
                row["memory_call"] = record["memory"]["results"] + 100
                us = 500 * row["times"]["forward"]["median_ms"]
                row["kernels"]["forward"] = {
                    "forward_kernel": {"us": us, "launches": 1.0},
                    "gather_keys_kernel": {"us": us / 2, "launches": 1.0},
                }
    results.save(result, file)
    return file, result


def cells(text, title, label):
    """The cells under a title, in the line of a case."""
    after = text[text.index(f"| {title} |") :]
    line = next(line for line in after.split("\n") if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def line_of(result, label, contender="fsa-reference"):
    record = next(r for r in result["cases"] if derived.label(r["case"]) == label)
    return record, derived.row(record, contender)


MASKED, DENSE = "H4/2 D16, S 64, w 16", "H4/2 D16, S 64"


def test_dynamic_tables_join_our_quantities(dynamic):
    _, result = dynamic
    text = report.table(result)
    record, line = line_of(result, MASKED)
    ms = {quantity: times["median_ms"] for quantity, times in line["times"].items()}
    shown = cells(text, "fsa-reference | selection", MASKED)
    assert shown[0] == f"{ms['selection']:.3g}"
    assert shown[2].startswith(f"{ms['forward']:.3g} (")
    assert shown[4] == f"{ms['end to end']:.3g}"
    assert shown[5] == f"{1e3 * (ms['forward'] + ms['backward']) / 64:.3g}"
    own = record["memory"]["inputs"] + record["memory"]["results"]
    assert shown[6] == f"{100 / own:.2f}"
    assert cells(text, "fsa-reference | selection", "H4/2 D16, S 64, w 24, key mask")[0] == "–"


def test_dynamic_tables_compare_with_dense_attention(dynamic):
    _, result = dynamic
    text = report.table(result)
    _, line = line_of(result, MASKED)
    _, twin = line_of(result, DENSE)
    _, peer = line_of(result, DENSE, "sdpa-flash")
    shown = cells(text, "fsa-reference | rate over own dense", MASKED)

    def pair(figure):
        return " / ".join(figure(quantity) for quantity in ("forward", "backward"))

    def over(above, below, field, form):
        return pair(lambda q: f"{above['times'][q][field] / below['times'][q][field]:{form}}")

    assert shown == [
        over(line, twin, "tflops", ".2f"),
        over(twin, line, "median_ms", ".3g"),
        over(peer, line, "median_ms", ".3g"),
    ]
    # No dense case is as long.
    longest = "| H4/2 D16, S 128, w 16 |"
    assert longest in text[: text.index("| rate over own dense |")]
    assert longest not in text[text.index("| rate over own dense |") : text.index("| where the")]


def test_dynamic_tables_say_where_the_time_goes(dynamic):
    _, result = dynamic
    _, line = line_of(result, MASKED)
    wall = line["times"]["forward"]["median_ms"]
    shown = cells(report.table(result), "where the time goes", MASKED)
    assert shown[1:5] == [
        f"{wall / 2:.3g} / –",
        f"{wall / 4:.3g} / –",
        "0 / –",
        f"{wall / 4:.3g} / –",
    ]
    rate = line["times"]["forward"]["tflops"]
    assert shown[5] == f"{2 * rate:.0f} / –"


def test_dense_attention_has_its_own_table(dynamic):
    _, result = dynamic
    text = report.table(result)
    after = text[text.index("another question:") :]
    assert "| forward | fsa-reference | sdpa-flash |" in after
    assert f"| {DENSE} |" in after
    assert "w 16" not in after


def test_dynamic_plots(dynamic, tmp_path, capsys):
    file, result = dynamic
    assert main(["plot", str(file), "--to", str(tmp_path)]) == 0
    (png,) = tmp_path.iterdir()
    assert png.name == "dynamic-smoke-h4-2-d16.png"
    assert str(png) in capsys.readouterr().out
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert (width, height) == (2 * plot_dynamic.PANEL[0] * 150, 2 * plot_dynamic.PANEL[1] * 150)
    dense = [record for record in result["cases"] if not record["case"]["mask"]]
    with pytest.raises(ValueError, match="no masked case of ours"):
        plot.draw(result | {"cases": dense}, tmp_path / "dense.png")


def test_files_of_before_have_defaults(result):
    assert all(row["kernels"] == {} for record in result["cases"] for row in record["rows"])
