"""The features: every case is the question that it says, and what is asked of it is derived."""

import json
import re
from contextlib import nullcontext

import pytest
import torch

from bench import cases, check, derived, features, report, results, runner, timing
from bench.__main__ import main
from bench.features import block, decode, gated, packed, streaming, threshold
from flash_sparse_attn import BlockMap, IntervalMask, flash_sparse_attn_func, reference
from flash_sparse_attn.modules import DynamicMaskCache

CPU = torch.device("cpu")
COMMANDS = tuple(features.MODULES)
SIZES = {"seqlen": 64, "heads_q": 4, "heads_kv": 2, "head_dim": 16, "dtype": "float32"}


def smoke(command):
    return [(command, case) for case in cases.load("smoke", command).cases]


BASELINES = {
    "decode": {"contiguous"},
    "varlen": {"batched"},
    "threshold": {"dense"},
    "gated": {"dense", "unpruned"},
    "block": set(),
    "streaming": {"short", "full"},
}
EVERY = [entry for command in COMMANDS for entry in smoke(command)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_figure_asked_is_of_a_case_and_every_case_has_one(command):
    suite = cases.load(cases.DEFAULT_SUITES[command], command)
    names = {case.name for case in suite.cases}
    assert len(names) == len(suite.cases)
    contenders = [peer.name for peer in features.of(command).peers()]
    for asked in suite.asked:
        assert any(re.search(asked.cases, name) for name in names), asked
        assert asked.quantity in runner.QUANTITIES[command]
        if asked.against.startswith("own-"):
            assert "fsa-triton" + asked.against.removeprefix("own") in contenders
        elif asked.against:
            assert any(re.fullmatch(asked.against, name) for name in contenders)
    # Of decoding several rows nothing is asked; of small blocks neither.
    free = [case for case in suite.cases if not suite.asked_of(case)]
    assert all(getattr(case, "seqlen_q", 1) > 1 or getattr(case, "block", 0) == 64 for case in free)


def test_features_are_timed_as_graphs_and_nothing_else_is():
    for command, name in cases.DEFAULT_SUITES.items():
        assert cases.load(name, command).graph is (command in COMMANDS)


def test_a_graph_has_the_time_of_the_host_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "captured", lambda call: call)
    monkeypatch.setattr(timing, "side_stream", nullcontext)
    settings = runner.Settings("gated", seconds=0.001, only="gates$", graph=True)
    (record,) = runner.run(cases.load("smoke", "gated"), settings, CPU, tmp_path)["cases"]
    rows = {row["contender"]: row["figures"] for row in record["rows"] if row["times"]}
    assert rows["fsa-reference-dense"] == {}
    of_host = {f"{quantity} without a graph (ms)" for quantity in gated.QUANTITIES}
    assert set(rows["fsa-reference"]) == of_host
    assert all(value > 0 for value in rows["fsa-reference"].values())


def test_a_call_that_cannot_be_captured_has_a_row_that_says_so(tmp_path, monkeypatch):
    def refuse(call):
        raise RuntimeError("not captured as a CUDA graph: it waits")

    monkeypatch.setattr(timing, "captured", refuse)
    settings = runner.Settings("gated", seconds=0.001, only="gates$", graph=True)
    (record,) = runner.run(cases.load("smoke", "gated"), settings, CPU, tmp_path)["cases"]
    row = next(row for row in record["rows"] if row["contender"] == "fsa-reference")
    assert row["status"] == results.FAILED
    assert row["reason"] == "RuntimeError: not captured as a CUDA graph: it waits"
    assert not row["times"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run(command, tmp_path):
    arguments = [command, "--suite", "smoke", "--device", "cpu", "--seconds", "0.001"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.rglob("*.json")
    assert file.name == f"{command}-smoke.json"
    result = results.load(file)
    kind = features.of(command).Case
    for record in result["cases"]:
        fields = {n: tuple(x) if isinstance(x, list) else x for n, x in record["case"].items()}
        assert kind(**fields).name == record["name"]
        rows = {row["contender"]: row for row in record["rows"]}
        ours = rows["fsa-reference"]
        assert ours["status"] == results.OK
        assert tuple(ours["times"]) == runner.QUANTITIES[command]
        assert max(value for name, value in ours["errors"].items() if name != "mass") < 1e-4
        baselines = {row["question"] for name, row in rows.items() if "reference-" in name}
        assert baselines == BASELINES[command]
        assert not rows["fsa-reference"]["question"]
    assert f"| {record['name']} |" in report.table(result)


@pytest.mark.parametrize(("command", "case"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_pairs_are_those_that_the_reference_sees(command, case):
    question = features.of(command).build(case, CPU, False)
    rows = torch.arange(question.q.shape[1])
    terms = question.terms(rows, torch.float32) | {"softmax_scale": case.head_dim**-0.5}
    _, visible = reference.final_probability(question.q, question.k, **terms)
    assert question.pairs == int(visible.expand(case.batch, -1, -1, -1).sum())
    assert torch.equal(question.seeing, visible.any(3).all(1).all(0))


def test_traffic_of_a_cache():
    common = SIZES | {"batch": 3, "dtype": "bfloat16"}
    dense = decode.build(decode.Case(**common), CPU, False)
    assert dense.traffic == dense.k.nbytes + dense.v.nbytes
    some = decode.build(decode.Case(**common, indices=10), CPU, False)
    assert some.traffic == 2 * 3 * 2 * 10 * 16 * 2
    assert some.indices.dtype == torch.int32
    assert all(len(set(row.tolist())) == 10 for row in some.indices.flatten(0, 1))


def test_pages_hold_the_cache_in_another_order():
    x = torch.arange(2 * 8 * 3).view(2, 8, 3, 1)
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    pages = decode.paged(x, 4, table)
    assert pages.shape == (4, 4, 3, 1)
    assert torch.equal(pages[table.long()].flatten(1, 2), x)


def test_lengths_of_the_packed_suite_are_those_of_the_issue():
    for case in cases.load("packed", "varlen").cases:
        assert len(case.lengths) == 64
        assert (min(case.lengths), max(case.lengths)) == (128, 8192)
        assert abs(case.seqlen - 100_000) < 100
        other = case.batched
        assert other.seqlen % packed.STEP == 0
        assert abs(other.pairs / case.pairs - 1) < 0.02
        assert abs(other.batch * other.seqlen / case.seqlen - 1) < 0.05


def test_packed_top_w_is_that_of_each_sequence():
    case = packed.Case(**SIZES | {"seqlen": 60}, lengths=(20, 1, 39), window_size=5)
    question = packed.build(case, CPU, False)
    seen = question.visibility(torch.arange(60))[0]
    first = 0
    for length in case.lengths:
        own = slice(first, first + length)
        mask = IntervalMask.topk(question.scores[:, :, own], 5).to_dense(length)[0]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        assert torch.equal(seen[:, own, own], mask & causal)
        assert int(seen[:, own].sum()) == int(seen[:, own, own].sum())
        first += length


def dropping(every):
    """A stand-in for a backend: drops what T1 lets it drop, or, with `every`, all but a block."""

    def attend(q, k, v, is_causal=False, softmax_threshold=0.0, return_kept=False, backend=None):
        if not softmax_threshold:
            return flash_sparse_attn_func(q, k, v, is_causal=is_causal)
        p, visible = reference.final_probability(q, k, causal=is_causal)
        kept = ~reference.droppable(p, visible, softmax_threshold, (16, 32))
        if every:
            kept = torch.zeros_like(kept).index_fill(3, torch.tensor([0]), True)
        elements = reference.expand_kept(kept, (16, 32), q.shape[1], k.shape[1])
        o, _ = reference.attention(q, k, v, causal=is_causal, kept=elements)
        return (o, BlockMap(kept, (16, 32))) if return_kept else o

    return attend


def run_threshold(tmp_path, monkeypatch, every):
    monkeypatch.setattr(threshold, "flash_sparse_attn_func", dropping(every))
    settings = runner.Settings("threshold", seconds=0.001, only="structured")
    (record,) = runner.run(cases.load("smoke", "threshold"), settings, CPU, tmp_path)["cases"]
    return next(row for row in record["rows"] if row["contender"] == "fsa-reference")


def test_what_is_dropped_is_measured_and_replayed(tmp_path, monkeypatch):
    row = run_threshold(tmp_path, monkeypatch, every=False)
    assert row["status"] == results.OK
    assert 0 < row["errors"]["mass"] < 1
    assert row["figures"]["dropped"] == pytest.approx(row["figures"]["droppable"], abs=0.1)
    assert row["figures"]["dropped"] > 0.3
    assert max(row["errors"][name] for name in "oqkv") < 1e-5


def test_a_row_that_loses_its_mass_is_wrong(tmp_path, monkeypatch):
    row = run_threshold(tmp_path, monkeypatch, every=True)
    assert row["status"] == results.WRONG
    assert "the lost mass is off" in row["reason"]


def test_structured_inputs_leave_70_percent_of_the_blocks_droppable():
    case = threshold.Case(
        seqlen=4096, heads_q=1, heads_kv=1, head_dim=128, dtype="float32", threshold=0.01,
        structured=True,
    )  # fmt: skip
    question = threshold.build(case, CPU, False)
    p, visible = reference.final_probability(question.q, question.k, causal=True)
    spare = reference.droppable(p, visible, case.threshold, (16, 32))
    empty = reference.droppable(p, visible, 0.0, (16, 32))
    assert 0.66 < float((spare & ~empty).sum() / (~empty).sum()) < 0.74


@pytest.mark.parametrize("pruned", ["runs", "iid"])
def test_three_quarters_of_the_keys_are_pruned(pruned):
    case = gated.Case(
        seqlen=2048, heads_q=4, heads_kv=4, head_dim=128, dtype="float32", pruned=pruned,
        gate_threshold=0.6,
    )  # fmt: skip
    question = gated.build(case, CPU, False)
    closed = question.gate_k == gated.CLOSED
    assert (closed.double().mean(1) == 0.75).all()
    # What is pruned is exactly what is closed, in rows that see an open key.
    _, visible = reference.final_probability(
        question.q, question.k, **question.terms(torch.arange(2048), torch.float32)
    )
    opened = (question.gate_k[0] > gated.CLOSED).T[:, None] & torch.ones(2048, 2048).tril().bool()
    some = opened.any(2)
    assert torch.equal(visible[0][some], opened[some])


def test_gradients_of_gates_are_checked():
    case = gated.Case(**SIZES)
    question = gated.build(case, CPU, True)
    expected = check.expect(case, question, backward=True)
    assert {"gate_q", "gate_k"} < set(expected.values)
    o = flash_sparse_attn_func(
        question.q, question.k, question.v, is_causal=True,
        gates=(question.gate_q, question.gate_k),
    )  # fmt: skip
    found = torch.autograd.grad(o, question.leaves(case.leaves), expected.do)
    got = {"o": o} | dict(zip(case.leaves, found, strict=True))
    assert check.wrong(case, check.errors(expected, got)) is None
    for name, title in (("gate_q", "dα is off"), ("gate_k", "dδ is off")):
        assert title in check.wrong(case, check.errors(expected, got | {name: 1.1 * got[name]}))


def test_larger_blocks_of_a_block_mask_look_the_small_ones_up():
    case = block.Case(**SIZES | {"seqlen": 256}, block=16, form="map", causal=False, active=0.1)
    question = block.build(case, CPU, False)
    mask, _ = block.block_mask(question, 128)
    assert tuple(mask.BLOCK_SIZE) == (128, 128)
    i = torch.arange(256)
    seen = mask.mask_mod(0, 0, i[:, None], i)
    assert torch.equal(seen, question.visibility(i)[0, 0])
    assert int(mask.full_kv_num_blocks.sum()) == 0


@pytest.mark.parametrize("form", ["mask", "documents"])
def test_a_block_mask_holds_what_the_case_says(form):
    more = {"active": 0.4} if form == "mask" else {"documents": 4}
    case = block.Case(**SIZES, block=16, form=form, causal=form == "documents", **more)
    question = block.build(case, CPU, False)
    mask, setup_ms = block.block_mask(question)
    assert setup_ms > 0
    assert tuple(mask.BLOCK_SIZE) == (16, 16)
    seen = question.visibility(torch.arange(64))
    blocks = seen.unfold(2, 16, 16).unfold(3, 16, 16).any(-1).any(-1)
    assert torch.equal(mask.to_dense().bool(), blocks)
    if form == "documents":
        assert int(question.document.max()) == 3


def test_a_step_is_that_of_a_full_cache_after_its_context():
    case = streaming.Case(**SIZES | {"batch": 3}, window_size=8, short=32)
    step = streaming.build(case, CPU, False)
    assert step.traffic == 2 * 3 * 2 * 8 * 16 * 4
    cache = streaming.cache_before(case, step)
    assert cache.held.tolist() == [8] * 3
    assert all(len(set(row.tolist())) == 8 for row in cache.position.flatten(0, 1))
    assert 0 <= int(cache.position.min()) <= int(cache.position.max()) < 64
    new = step.q, step.k[:, -1:], step.v[:, -1:], step.scores[..., -1:]
    for token in range(64, 64 + 20):  # admitted by every call, in the end beside nothing else
        assert cache.seqlen.tolist() == [token] * 3
        o = cache.attend(*new, backend="reference")
        assert (cache.position == token).any(2).all()
    assert int(cache.position.min()) == 64 + 20 - 8
    assert torch.allclose(o, step.v[:, -1:].repeat_interleave(2, 2), atol=1e-5)


def run_streaming(tmp_path):
    settings = runner.Settings("streaming", seconds=0.001, only="S96")
    (record,) = runner.run(cases.load("smoke", "streaming"), settings, CPU, tmp_path)["cases"]
    return {row["contender"]: row for row in record["rows"]}


def test_the_memory_of_a_cache_stands_beside_that_of_its_baselines(tmp_path):
    rows = run_streaming(tmp_path)
    own, short, full = (
        rows[f"fsa-reference{x}"]["figures"]["cache (MiB)"] for x in ("", "-short", "-full")
    )
    assert own == short
    assert full == 2 * 2 * 96 * 2 * 16 * 4 / 2**20


def test_a_cache_that_rejects_the_new_token_is_wrong(tmp_path, monkeypatch):
    class Rejecting(DynamicMaskCache):
        def _admit(self, key, *more):
            if key.shape[1] > 1:
                super()._admit(key, *more)

    monkeypatch.setattr(streaming, "DynamicMaskCache", Rejecting)
    rows = run_streaming(tmp_path)
    assert rows["fsa-reference"]["status"] == results.WRONG
    assert rows["fsa-reference-full"]["status"] == results.OK


def test_contexts_of_the_streaming_suite_are_those_of_the_issue():
    suite = cases.load("constant-cost", "streaming")
    sizes = {(case.batch, case.seqlen, case.short) for case in suite.cases}
    assert sizes == {(batch, seqlen, 4096) for batch in (1, 16) for seqlen in (4096, 1048576)}
    (bound,) = (asked for asked in suite.asked if asked.most is not None)
    assert (bound.figure, bound.against, bound.most) == ("time", "own-short", 1.05)
    for case in suite.cases:
        assert (re.search(bound.cases, case.name) is None) is (case.seqlen == case.short)
        left_out = suite.left_out("fsa-triton-full", case)
        assert (left_out is not None) is (case.batch * case.seqlen == 2**24)
        assert suite.left_out("fsa-triton-short", case) is None


def made(own, other, **asked):
    """A record of two rows, and what is shown of it."""

    def row(name, ours, question, times):
        return results.Row(name, ours, question, times={"forward": times}).asdict()

    asked = {"quantity": "forward", "against": "", "least": None, "most": None} | asked
    rows = [row("fsa-x", True, "", own), row("fsa-x-dense", True, "dense", other)]
    rows += [row("slow", False, "", other | {"median_ms": 100.0})]
    rows += [row("peer", False, "", other)]
    record = {"name": "the case", "asked": [asked], "rows": rows}
    line = derived.compared(record, rows[0], asked)
    return line and line["contender"], derived.shown(rows[0], line, asked), asked, record


@pytest.mark.parametrize(
    ("asked", "against", "value", "met"),
    [
        ({"figure": "speed", "against": "own-dense", "least": 1.4}, "fsa-x-dense", 1.5, True),
        ({"figure": "speed", "against": "own-dense", "least": 1.6}, "fsa-x-dense", 1.5, False),
        ({"figure": "time", "against": "peer|slow", "most": 0.7}, "peer", 2 / 3, True),
        ({"figure": "rate", "against": "peer", "least": 0.6}, "peer", 0.5, False),
        ({"figure": "speed", "against": "own-dense"}, "fsa-x-dense", 1.5, False),
        ({"figure": "us", "most": 12.0}, None, 2000.0, False),
    ],
)
def test_figures_asked(asked, against, value, met):
    own = {"median_ms": 2.0, "tflops": 5.0}
    got, shown, full, _ = made(own, {"median_ms": 3.0, "tflops": 10.0}, **asked)
    assert got == against
    assert shown == pytest.approx(value)
    assert derived.met(shown, full) is met


def test_bytes_are_the_rate_where_they_are_counted():
    own = {"median_ms": 2.0, "tflops": 5.0, "tb_s": 4.0}
    other = {"median_ms": 3.0, "tflops": None, "tb_s": 5.0}
    _, shown, _, _ = made(own, other, figure="rate", against="peer", least=0.9)
    assert shown == pytest.approx(0.8)


def test_the_first_table_is_what_is_asked(tmp_path):
    suite = cases.load("smoke", "gated")
    asked = cases.Asked(
        cases="gates$", quantity="forward", figure="speed", against="own-dense", least=1e-9
    )
    unmet = cases.Asked(
        cases="gates$", quantity="backward", figure="time", against="own-dense", most=1e-9
    )
    shown = cases.Asked(cases="gates$", quantity="forward", figure="speed", against="own-dense")
    suite = cases.Suite(suite.name, suite.about, suite.cases, asked=(asked, unmet, shown))
    settings = runner.Settings("gated", seconds=0.001, only="gates$", contenders="fsa-ref")
    result = runner.run(suite, settings, CPU, tmp_path)
    text = report.table(json.loads(json.dumps(result)))
    lines = [line for line in text.split("\n") if line.startswith("| B1 S64")]
    first, second, third = lines[:3]
    assert "| × as fast | **" in first
    assert first.endswith("| ≥ 1e-09 |")
    assert "| × the time | " in second
    assert "**" not in second
    assert third.endswith("| – |")
    assert "**" not in third


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (decode.Case, {"page": 5}),
        (decode.Case, {"indices": 65}),
        (decode.Case, {"causal": False}),
        (packed.Case, {"lengths": (1, 2)}),
        (packed.Case, {"causal": False}),
        (gated.Case, {"pruned": "most"}),
        (gated.Case, {"gate_threshold": 0.5, "gated": False}),
        (block.Case, {"form": "list", "block": 16}),
        (block.Case, {"block": 24, "active": 0.5, "causal": False}),
        (block.Case, {"documents": 3, "block": 16}),
        (block.Case, {"active": None, "block": 16, "causal": False}),
        (gated.Case, {"dtype": "float8"}),
        (streaming.Case, {"short": 65, "window_size": 8}),
        (streaming.Case, {"window_size": 9, "short": 8}),
        (streaming.Case, {"causal": False, "window_size": 8, "short": 8}),
    ],
)
def test_a_case_without_meaning_is_refused(kind, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        kind(**(SIZES | fields))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"figure": "slope", "least": 1.0}, "figure"),
        ({"figure": "speed", "against": "flex", "least": 1.0, "most": 2.0}, "least and most"),
        ({"figure": "speed", "least": 1.0}, "against"),
        ({"figure": "us", "against": "flex", "most": 1.0}, "against"),
    ],
)
def test_what_is_asked_without_meaning_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        cases.Asked(cases="", quantity="forward", **fields)
