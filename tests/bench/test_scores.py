"""Key scores from files."""

from dataclasses import replace

import numpy
import pytest
import torch

from bench import cases, scores

CASE = next(c for c in cases.load("smoke", "dynamic").cases if c.selects and c.seqlen == 64)


@pytest.mark.parametrize("shape", [(3, 4, 64), (4, 64)])
@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_scores_are_read(shape, suffix, tmp_path):
    tensor = torch.randn(shape)
    file = tmp_path / f"scores{suffix}"
    if suffix == ".npy":
        numpy.save(file, tensor.numpy())
    else:
        torch.save(tensor, file)
    found = scores.load(file)
    assert torch.equal(found.heads, tensor.reshape(-1, 64))
    assert found.asdict() == {"file": file.name, "shape": list(shape)}


def test_heads_are_spread_over_the_layers(tmp_path):
    heads = torch.arange(12.0)[:, None].expand(12, 100)
    found = scores.Scores("x", (3, 4, 100), heads)
    chosen = found.of(replace(CASE, heads_kv=4))
    assert chosen.shape == (1, 4, 64)
    assert chosen[0, :, 0].tolist() == [0, 4, 7, 11]
    few = scores.Scores("x", (2, 100), heads[:2])
    assert few.of(replace(CASE, heads_kv=4))[0, :, 0].tolist() == [0, 0, 1, 1]
    dense = next(c for c in cases.load("smoke", "dynamic").cases if c.mask is None)
    assert found.of(dense) is None


def test_who_is_served():
    found = scores.Scores("x", (2, 64), torch.zeros(2, 64))
    assert found.serve(CASE)
    assert not found.serve(replace(CASE, seqlen=65))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.float64), "got torch.float64"),
        ({"scores": torch.zeros(2, 8)}, "got dict"),
        (torch.zeros(8), r"got shape \(8,\)"),
        (torch.full((2, 8), torch.nan), "finite"),
    ],
)
def test_other_contents_are_refused(content, message, tmp_path):
    file = tmp_path / "scores.pt"
    torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        scores.load(file)


def test_what_is_no_file_of_scores(tmp_path):
    text = tmp_path / "scores.npy"
    text.write_text("1, 2, 3")
    for file in (text, tmp_path / "nowhere.pt"):
        with pytest.raises(ValueError, match="cannot read"):
            scores.load(file)
