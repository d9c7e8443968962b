"""T1: what a backend kept is replayed in the reference, and judged.

A call says with `return_kept` which blocks of `KEPT_BLOCK` rows and keys it kept. Everything that
it dropped must have been droppable. Dropping is a permission, but where keys of great probability
stand at the front of a sequence (`sinks`), a backend that drops must have dropped a fair share of
what is certain to be droppable in blocks so large that every tile fits in.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from flash_sparse_attn.spec.schema import Case
from torch import Tensor

from flash_sparse_attn import BlockMap, reference, registry

from . import eager, oracle
from .compare import Results
from .inputs import Inputs
from .leaves import Leaves

RTOL = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Relative error of the probabilities that an implementation compares with a / n."""


LARGE = (128, 128)
"""Rows and keys of a block that no tile of a backend exceeds."""
FAIR_SHARE = 0.9
"""Of the certainly droppable pairs; tiles that are visited before anything is known are kept."""


def judge(backend: str, case: Case, inputs: Inputs, kept: BlockMap) -> Tensor:
    """The visible pairs that a backend kept, bool `[B, Hq, Sq, Sk]`, if it kept to T1."""
    elements = expand(case, kept)
    broken = failures(case, inputs, elements, drops=backend != registry.REFERENCE)
    if broken:
        raise AssertionError(f"T1: {'; '.join(broken)}")
    return elements & inputs.visible


def failures(case: Case, inputs: Inputs, elements: Tensor, drops: bool) -> list[str]:
    """Every way in which a set of kept pairs breaks T1; empty = it does not.

    Args:
        case, inputs: of the call.
        elements: bool `[B, Hq, Sq, Sk]`, true = kept.
        drops: whether it must drop at all.
    """
    share, rtol = case.options.softmax_threshold, RTOL[case.dtype]
    probability = full_probability(case, inputs)
    found = []
    allowed = reference.check_kept(elements, probability, inputs.visible, share, rtol)
    if not allowed.all():
        found.append(f"{int((~allowed).sum())} rows lost elements of probability a / n or more")
    lost = probability.masked_fill(elements, 0).sum(3).max() if probability.numel() else 0.0
    if lost >= share * (1 + rtol):
        found.append(f"a row lost {float(lost):.3g} of its mass, allowed is {share}")
    if drops and case.data.values == "sinks" and not case.packed:
        certain = reference.droppable(probability, inputs.visible, share * (1 - rtol), LARGE)
        sizes = (case.sizes.seqlen_q, case.sizes.seqlen_k)
        certain = reference.expand_kept(certain, LARGE, *sizes) & inputs.visible
        spared, all_ = int((certain & elements).sum()), int(certain.sum())
        if all_ >= math.prod(LARGE) and spared > (1 - FAIR_SHARE) * all_:
            found.append(f"{spared} of {all_} certainly droppable pairs kept")
    return found


def full_probability(case: Case, inputs: Inputs) -> Tensor:
    """P of the full softmax in float64, `[B, Hq, Sq, Sk]`; 0 in empty rows."""
    leaves = Leaves(replace(case, grads=()), inputs, torch.float64, inputs.clean)
    return eager.scores(case, leaves.tensors, inputs.visible).softmax(3).nan_to_num(0)


def expand(case: Case, kept: BlockMap) -> Tensor:
    """The pairs of a map of blocks, `[B, Hq, Sq, Sk]`; B = 1 when packed."""
    if not case.packed:
        sizes = (case.sizes.seqlen_q, case.sizes.seqlen_k)
        return reference.expand_kept(kept.active, kept.block_size, *sizes)
    shape = (1, case.sizes.heads_q, case.sizes.seqlen_q, case.sizes.seqlen_k)
    found = torch.zeros(shape, dtype=torch.bool, device=kept.active.device)
    row, key = 0, 0
    lengths = zip(case.packed.lengths_q, case.packed.lengths_k, strict=True)
    for active, (rows, keys) in zip(kept.active, lengths, strict=True):
        own = reference.expand_kept(active[None], kept.block_size, rows, keys)
        found[..., row : row + rows, key : key + keys] = own
        row, key = row + rows, key + keys
    return found


def replay(case: Case, inputs: Inputs, kept: Tensor) -> tuple[Results, Results]:
    """x64 and x_eager of the kept set."""
    narrowed = replace(inputs, visible=inputs.visible & kept)
    return oracle.run(case, inputs, kept), eager.run(case, narrowed)
