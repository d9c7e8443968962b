"""The recall example: its data have the answers, its loop trains, its files are well formed."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.recall import __main__ as recall
from examples.recall import plot
from examples.recall.model import DENSE, DYNAMIC, KINDS, SLIDING, Decoder, ModelConfig
from examples.recall.task import Batch, Recall
from examples.recall.training import Settings, parameter_groups, train
from flash_sparse_attn import IntervalMask
from flash_sparse_attn.modules import DynamicMaskAttention

TASK = Recall(seqlen=32, pairs=4, queries=8, num_keys=8, num_values=16, num_fillers=4)
TINY = Settings(
    task=TASK,
    model=ModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, window_size=8),
    curriculum=(4, 2),
    steps=12,
    batch_size=8,
    learning_rate=1e-2,
    selection_rate=2.0,
    warmup=3,
    eval_sequences=20,
    evaluations=3,
    bfloat16=False,
)
CPU = torch.device("cpu")


def data(seed: int = 0, task: Recall = TASK, batch_size: int = 64) -> Batch:
    return task.batch(batch_size, torch.Generator().manual_seed(seed))


def oracle(task: Recall, tokens: torch.Tensor, position: int) -> int:
    """The answer to a query, read off the tokens before it."""
    key, before = tokens[position].item(), tokens[:position].tolist()
    assert key < task.num_keys
    values = range(task.num_keys, task.num_keys + task.num_values)
    found = [y for x, y in itertools.pairwise(before) if x == key and y in values]
    assert len(found) == 1
    return found[0] - task.num_keys


# --- data


def test_an_oracle_answers_every_query_and_a_guess_few():
    batch = data()
    right = guessed = total = 0
    for tokens, positions, answers in zip(*batch, strict=True):
        assert len(set(positions.tolist())) == TASK.queries
        for position, answer in zip(positions.tolist(), answers.tolist(), strict=True):
            right += oracle(TASK, tokens, position) == answer
            guessed += answer == 0
            total += 1
    assert right == total == 64 * TASK.queries
    assert guessed < 2 * total / TASK.num_values


def test_a_sequence_is_pairs_then_queries_among_fillers():
    batch = data()
    half, fillers = TASK.seqlen // 2, TASK.num_keys + TASK.num_values
    assert batch.tokens.shape == (64, TASK.seqlen)
    assert 0 <= batch.tokens.min() <= batch.tokens.max() < TASK.vocab_size
    assert batch.positions.min() >= half
    first, second = batch.tokens[:, :half], batch.tokens[:, half:]
    assert ((first < TASK.num_keys).sum(1) == TASK.pairs).all()
    assert ((first < fillers).sum(1) == 2 * TASK.pairs).all()
    assert ((second < fillers).sum(1) == TASK.queries).all()
    assert (second < TASK.num_keys).sum() == (second < fillers).sum()


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data():
    assert all(torch.equal(x, y) for x, y in zip(data(3), data(3), strict=True))
    assert not torch.equal(data(3).tokens, data(4).tokens)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seqlen": 30}, "seqlen: got 30, expected a multiple of 4"),
        ({"pairs": 9}, "pairs: got 9, expected 1 to 8"),
        ({"queries": 17}, "queries: got 17, expected 1 to 16"),
        ({"queries": 0}, "queries: got 0, expected 1 to 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(TASK, **changes)


# --- model


def test_kinds_differ_in_what_a_row_sees_and_in_nothing_else():
    """Outputs at the last token depend on the first one as each kind of attention lets them."""
    config = replace(TINY.model, num_layers=1, window_size=4)
    positions = torch.tensor([[TASK.seqlen - 1]])
    tokens = data(batch_size=1).tokens
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % TASK.vocab_size
    sizes = set()
    for kind, sees in ((DENSE, True), (SLIDING, False)):
        torch.manual_seed(0)
        model = Decoder(config, kind, TASK.vocab_size, TASK.num_values)
        assert torch.equal(model(tokens, positions), model(other, positions)) is not sees
        sizes.add(sum(x.numel() for x in model.parameters()))
    assert len(sizes) == 1
    torch.manual_seed(0)
    dynamic = Decoder(config, DYNAMIC, TASK.vocab_size, TASK.num_values)
    (layer,) = (x for x in dynamic.modules() if isinstance(x, DynamicMaskAttention))
    own = layer.A.numel() + layer.dt_proj.weight.numel()
    assert sum(x.numel() for x in dynamic.parameters()) - own == sizes.pop()
    with pytest.raises(ValueError, match="kind: got 'linear'"):
        Decoder(config, "linear", TASK.vocab_size, TASK.num_values)


def test_selection_scores_are_those_that_the_layers_choose_by(monkeypatch):
    model = Decoder(TINY.model, DYNAMIC, TASK.vocab_size, TASK.num_values)
    batch, seen = data(batch_size=3), []
    topk = IntervalMask.topk

    def watched(scores, *arguments, **keywords):
        seen.append(scores)
        return topk(scores, *arguments, **keywords)

    monkeypatch.setattr(IntervalMask, "topk", watched)
    model(batch.tokens, batch.positions)
    scores = model.selection_scores(batch.tokens)
    assert scores.shape == (2, 3, 1, TASK.seqlen)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, torch.stack(seen[:2]))


# --- training


def test_the_curriculum_keeps_the_tokens_and_ends_at_full_length():
    generator = torch.Generator()
    shapes = [TINY.batch_at(step, generator).tokens.shape for step in range(TINY.steps)]
    assert shapes == [(32, 8)] * 3 + [(16, 16)] * 3 + [(8, 32)] * 6
    assert TINY.batch_at(0, generator).positions.shape == (32, 2)


@pytest.mark.parametrize("preset", recall.PRESETS)
def test_presets_start_inside_the_window_and_end_far_outside(preset):
    settings = recall.PRESETS[preset]
    task, window = settings.task, settings.model.window_size
    assert task.seqlen // settings.curriculum[0] <= window
    assert settings.model.num_layers * window < task.seqlen / 2
    assert task.pairs < window
    assert task.seqlen % (4 * settings.curriculum[0]) == 0


def test_what_chooses_has_its_own_rate():
    for kind in KINDS:
        model = Decoder(TINY.model, kind, TASK.vocab_size, TASK.num_values)
        others, *choosing = parameter_groups(model, TINY)
        assert "lr" not in others
        found = {id(x) for group in choosing for x in group["params"]}
        names = {name.split(".", 3)[3] for name, x in model.named_parameters() if id(x) in found}
        assert names == ({"A", "dt_proj.weight"} if kind == DYNAMIC else set())
        assert all(group["lr"] == 2 * TINY.learning_rate for group in choosing)
        count = len(found) + len(others["params"])
        assert count == len(list(model.parameters()))


def test_every_kind_sees_the_same_data(monkeypatch):
    seen = {}
    make = Recall.batch
    for kind in KINDS:
        batches = seen[kind] = []

        def batch(self, batch_size, generator, kept=batches):
            kept.append(make(self, batch_size, generator))
            return kept[-1]

        monkeypatch.setattr(Recall, "batch", batch)
        train(TINY, kind, CPU, None, lambda line, last: None)
    for kind in (SLIDING, DYNAMIC):
        for mine, dense in zip(seen[kind], seen[DENSE], strict=True):
            assert torch.equal(mine.tokens, dense.tokens)


def test_a_model_learns():
    """The dense model, on sequences so short that it needs few steps."""
    task = replace(TASK, seqlen=8, pairs=2, queries=4, num_keys=4, num_values=4)
    settings = replace(TINY, task=task, curriculum=(), steps=60, batch_size=64)
    _, record = train(settings, DENSE, CPU, None, lambda line, last: None)
    assert record["accuracy"][0][1] < 0.5
    assert record["final_accuracy"] > 0.8


def test_a_tiny_run_writes_well_formed_results(monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setitem(recall.PRESETS, "small", TINY)
    scores = tmp_path / "scores.pt"
    arguments = ["--preset", "small", "--device", "cpu", "--seed", "5", "--out", str(tmp_path)]
    status = recall.main([*arguments, "--scores", str(scores), "--scores-seqlen", "128"])
    (path,) = tmp_path.glob("cpu-*/small.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert status == (0 if recall.shown(result) else 1)
    assert result["settings"]["seed"] == 5
    assert result["settings"]["model"]["window_size"] == 8
    assert {"device", "torch", "packages", "commit"} <= set(result["environment"])
    assert list(result["runs"]) == list(KINDS)
    for record in result["runs"].values():
        assert len(record["loss"]) == TINY.steps
        assert all(loss > 0 for loss in record["loss"])
        assert [done for done, _ in record["accuracy"]] == [0, 4, 8, 12]
        assert all(0 <= share <= 1 for _, share in record["accuracy"])
        assert record["final_accuracy"] == record["accuracy"][-1][1]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    saved = torch.load(scores, weights_only=True)
    assert (saved.shape, saved.dtype) == ((2, 1, 128), torch.float32)
    said = capsys.readouterr().out
    assert said.count("12/12") == len(KINDS)


def test_a_seed_repeats_a_run():
    records = [train(TINY, DYNAMIC, CPU, None, lambda line, last: None)[1] for _ in range(2)]
    assert records[0]["loss"] == records[1]["loss"]
    other = train(replace(TINY, seed=1), DYNAMIC, CPU, None, lambda line, last: None)[1]
    assert other["loss"] != records[0]["loss"]


@pytest.mark.parametrize(
    ("dense", "sliding", "dynamic", "expected"),
    [
        (0.99, 0.10, 0.98, True),
        (0.99, 0.10, 0.96, False),  # the mask loses too much
        (0.99, 0.98, 0.99, False),  # the window loses nothing
        (0.90, 0.10, 0.95, True),
    ],
)
def test_what_counts_as_shown(dense, sliding, dynamic, expected):
    final = {DENSE: dense, SLIDING: sliding, DYNAMIC: dynamic}
    runs = {kind: {"final_accuracy": accuracy} for kind, accuracy in final.items()}
    assert recall.shown({"runs": runs}) is expected


def test_the_drawn_loss_is_a_running_mean():
    ends, means = plot._running_mean([float(x) for x in range(100)])
    assert (ends[0], ends[-1]) == (2, 100)
    assert (means[0], means[-1]) == (0.5, 98.5)


def test_a_long_sequence_is_whole_sequences():
    tokens = recall.long_sequence(TINY, 128, CPU)
    assert tokens.shape == (1, 128)
    fillers = TASK.num_keys + TASK.num_values
    pairs = ((tokens.view(4, 32)[:, :16]) < fillers).sum(1)
    assert (pairs == 2 * TASK.pairs).all()
    with pytest.raises(ValueError, match="--scores-seqlen: got 100, expected a multiple of 32"):
        recall.long_sequence(TINY, 100, CPU)
