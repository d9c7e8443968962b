"""T1: what a backend kept is replayed in the reference, and judged.

A backend that drops blocks offers `kept_blocks(problem, tensors) -> (map, (rows, keys))`: the
blocks that it keeps for a call, bool `[B, Hq, ⌈Sq/rows⌉, ⌈Sk/keys⌉]` (B = 1 when packed, rows and
keys counted on the packed axes). One without it drops nothing and is held to that.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from flash_sparse_attn.spec.schema import Case
from torch import Tensor

from flash_sparse_attn import reference, registry

from . import eager, oracle
from .calls import Call
from .compare import Results
from .inputs import Inputs
from .leaves import Leaves

RTOL = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Relative error of the probabilities that an implementation compares with a / n."""


def kept_pairs(backend: str, case: Case, inputs: Inputs) -> Tensor:
    """The visible pairs that a backend keeps, once judged: bool `[B, Hq, Sq, Sk]`."""
    module = registry.load(backend)
    if not hasattr(module, "kept_blocks"):
        return inputs.visible
    call = Call(case, inputs, inputs.tensors, backend)
    kept, block_size = module.kept_blocks(call.problem(), call.attention_tensors())
    broken = failures(case, inputs, kept, block_size)
    if broken:
        raise AssertionError(f"T1: {'; '.join(broken)}")
    return expand(case, kept, block_size) & inputs.visible


def failures(case: Case, inputs: Inputs, kept: Tensor, block_size: tuple[int, int]) -> list[str]:
    """Every way in which a set of kept blocks breaks T1; empty = it does not."""
    share, rtol = case.options.softmax_threshold, RTOL[case.dtype]
    probability = full_probability(case, inputs)
    elements = expand(case, kept, block_size)
    found = []
    allowed = reference.check_kept(elements, probability, inputs.visible, share, rtol)
    if not allowed.all():
        found.append(f"{int((~allowed).sum())} rows lost elements of probability a / n or more")
    lost = probability.masked_fill(elements, 0).sum(3).max() if probability.numel() else 0.0
    if lost >= share * (1 + rtol):
        found.append(f"a row lost {float(lost):.3g} of its mass, allowed is {share}")
    certain = reference.droppable(probability, inputs.visible, share * (1 - rtol), block_size)
    seen = any_visible(inputs.visible, block_size)
    spared = certain & seen & kept
    if spared.any():
        found.append(f"{int(spared.sum())} of {int((certain & seen).sum())} droppable blocks kept")
    return found


def full_probability(case: Case, inputs: Inputs) -> Tensor:
    """P of the full softmax in float64, `[B, Hq, Sq, Sk]`; 0 in empty rows."""
    leaves = Leaves(replace(case, grads=()), inputs, torch.float64, inputs.clean)
    return eager.scores(case, leaves.tensors, inputs.visible).softmax(3).nan_to_num(0)


def expand(case: Case, kept: Tensor, block_size: tuple[int, int]) -> Tensor:
    """The pairs of a map of blocks."""
    return reference.expand_kept(kept, block_size, case.sizes.seqlen_q, case.sizes.seqlen_k)


def any_visible(visible: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Which blocks hold a visible pair."""
    (rows, keys), (seqlen_q, seqlen_k) = block_size, visible.shape[2:]
    padding = (0, -seqlen_k % keys, 0, -seqlen_q % rows)
    whole = torch.nn.functional.pad(visible, padding)
    return whole.unflatten(3, (-1, keys)).unflatten(2, (-1, rows)).any(5).any(3)


def replay(case: Case, inputs: Inputs, kept: Tensor) -> tuple[Results, Results]:
    """x64 and x_eager of the kept set."""
    narrowed = replace(inputs, visible=inputs.visible & kept)
    return oracle.run(case, inputs, kept), eager.run(case, narrowed)
