"""The loop: one model of each kind on the same data, and what is recorded of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import Decoder, ModelConfig
from .task import Batch, Recall

Report = Callable[[str, bool], None]
"""Takes a line about the progress, and whether it is the last of its run."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, the device aside.

    Attributes:
        task: at its full length.
        model: sizes.
        curriculum: divisors of the sequence length, one for each equal share of the first half of
            the steps; the second half is at full length. Recall is learned where the window still
            holds the sequence, and kept as it ceases to.
        steps: updates.
        batch_size: sequences an update at full length; as many tokens at every length.
        learning_rate: at its peak; linear warm-up over `warmup` steps, then half a cosine to 0.
        selection_rate: the learning rate of Δ and A over that of the others. They learn from the
            bias alone, which is at most 1 while A is negative, and only from keys that are kept.
        warmup: steps.
        eval_sequences: full-length sequences that accuracy is measured on, the same every time.
        evaluations: how often on the way.
        bfloat16: autocast to it.
        seed: of parameters and data.
    """

    task: Recall
    model: ModelConfig
    curriculum: tuple[int, ...]
    steps: int
    batch_size: int
    learning_rate: float
    selection_rate: float
    warmup: int
    eval_sequences: int
    evaluations: int
    bfloat16: bool
    seed: int = 0

    def batch_at(self, step: int, generator: torch.Generator) -> Batch:
        """What a step learns from: shorter sequences at first, with the pairs they can hold."""
        stage = 2 * len(self.curriculum) * step // self.steps
        divisor = (*self.curriculum, 1)[min(stage, len(self.curriculum))]
        seqlen = self.task.seqlen // divisor
        task = replace(
            self.task,
            seqlen=seqlen,
            pairs=min(self.task.pairs, seqlen // 4),
            queries=max(1, self.task.queries // divisor),
        )
        return task.batch(divisor * self.batch_size, generator)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step over its peak."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return min(1.0, (step + 1) / self.warmup) * cosine


def parameter_groups(model: Decoder, settings: Settings) -> list[dict[str, Any]]:
    """What the optimizer is given: by what dynamic masks choose, and everything else."""
    choosing: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        chooses = name.endswith((".dt_proj.weight", ".A"))
        (choosing if chooses else others).append(parameter)
    groups = [{"params": others}]
    if choosing:
        rate = settings.learning_rate * settings.selection_rate
        groups.append({"params": choosing, "lr": rate})
    return groups


def train(
    settings: Settings, kind: str, device: torch.device, backend: str | None, report: Report
) -> tuple[Decoder, dict[str, Any]]:
    """Train one model.

    Args:
        settings: of the run; the data are the same for every kind.
        kind: of attention.
        device: where.
        backend: as in `flash_sparse_attn_func`.
        report: is given a line about the progress at every evaluation.

    Returns:
        The model, and its record: "loss" of every update, "accuracy" as pairs (updates done, share
        of queries answered) and the last of it, "final_accuracy", "seconds" and "parameters".
    """
    torch.manual_seed(settings.seed)
    task = settings.task
    with torch.device(device):
        model = Decoder(settings.model, kind, task.vocab_size, task.num_values, backend)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings),
        settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, settings.rate_at)
    data, held_out = (torch.Generator(device).manual_seed(2 * settings.seed + x) for x in (0, 1))
    tests = evaluation_set(settings, held_out)
    losses = torch.zeros(settings.steps, device=device)
    accuracies = [(0, accuracy(model, tests, settings))]
    every = math.ceil(settings.steps / settings.evaluations)
    started = time.perf_counter()
    for step in range(settings.steps):
        batch = settings.batch_at(step, data)
        with autocast(settings, device):
            logits = model(batch.tokens, batch.positions)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.answers.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses[step] = loss.detach()
        done = step + 1
        if done % every == 0 or done == settings.steps:
            accuracies.append((done, accuracy(model, tests, settings)))
            seconds = time.perf_counter() - started
            report(
                f"{kind:<15}{_bar(done / settings.steps)} {done:>5}/{settings.steps}  "
                f"loss {losses[step].item():6.3f}  accuracy {accuracies[-1][1]:6.1%}  "
                f"{seconds:5.1f} s",
                done == settings.steps,
            )
    record = {
        "loss": [round(x, 5) for x in losses.tolist()],
        "accuracy": accuracies,
        "final_accuracy": accuracies[-1][1],
        "seconds": time.perf_counter() - started,
        "parameters": sum(x.numel() for x in model.parameters()),
    }
    return model, record


def evaluation_set(settings: Settings, generator: torch.Generator) -> list[Batch]:
    """The held-out sequences, in batches of the size trained with."""
    sizes = [settings.batch_size] * (settings.eval_sequences // settings.batch_size)
    if settings.eval_sequences % settings.batch_size:
        sizes.append(settings.eval_sequences % settings.batch_size)
    return [settings.task.batch(size, generator) for size in sizes]


@torch.no_grad()
def accuracy(model: Decoder, tests: list[Batch], settings: Settings) -> float:
    """Share of the queries whose value has the largest logit."""
    right: list[Tensor] = []
    for batch in tests:
        with autocast(settings, batch.tokens.device):
            logits = model(batch.tokens, batch.positions)
        right.append((logits.argmax(2) == batch.answers).float().mean(1))
    return torch.cat(right).mean().item()


def autocast(settings: Settings, device: torch.device) -> torch.autocast:
    """To bfloat16, if the settings say so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16)


def _bar(share: float, width: int = 24) -> str:
    filled = round(share * width)
    return f"[{'#' * filled}{'.' * (width - filled)}]"
