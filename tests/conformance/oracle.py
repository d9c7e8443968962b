"""x64 of N1: the reference in float64 on the rounded inputs, differentiated by autograd."""

from __future__ import annotations

import torch
from flash_sparse_attn.spec.schema import Case
from torch import Tensor

from flash_sparse_attn import reference

from . import pairs
from .inputs import Inputs
from .leaves import Leaves

_FORMS = {
    "batched": reference.attention,
    "packed": reference.attention_packed,
    "cache": reference.attention_cached,
}


def run(case: Case, inputs: Inputs, kept: Tensor | None = None) -> dict[str, Tensor]:
    """o, lse and the gradients of a case, in float64.

    Args:
        case: the case.
        inputs: its inputs.
        kept: T1, the elements that an implementation kept, bool `[B, Hq, Sq, Sk]`.
    """
    leaves = Leaves(case, inputs, torch.float64)
    if case.packed and inputs.selected is not None:  # V of packed sequences takes no dense mask
        selected = pairs.heads(inputs.selected, case)
        kept = selected if kept is None else kept & selected
    if kept is not None and case.packed:
        kept = _by_sequence(case, kept)
    o, lse = _FORMS[case.form](**leaves.tensors, **terms(case, inputs), kept=kept)
    return leaves.results(o, lse)


def terms(case: Case, inputs: Inputs) -> dict[str, object]:
    """The keywords of the reference, tensors of `AttentionTensors` aside.

    What structured masks select is given as pairs: the constructors do not judge themselves.
    """
    options = case.options
    keywords: dict[str, object] = {
        "softmax_scale": options.softmax_scale,
        "softcap": options.softcap,
        "causal": options.causal,
        "window": (options.window_left, options.window_right),
        "sinks": options.sinks,
        "gate_threshold": options.gate_threshold,
    }
    if case.gates:
        keywords["gate"] = case.gates.gate
    if "block_map" in inputs.tensors:
        keywords["block_size"] = case.block_map.block_size
    if inputs.selected is not None and not case.packed:
        mask = inputs.tensors.get("mask")
        both = pairs.heads(inputs.selected, case)
        keywords["mask"] = both if mask is None else both & pairs.heads(mask, case)
    return keywords


def _by_sequence(case: Case, kept: Tensor) -> list[Tensor]:
    """The pairs of each packed sequence, cut from those of all tokens."""
    found, row, key = [], 0, 0
    for rows, keys in zip(case.packed.lengths_q, case.packed.lengths_k, strict=True):
        found.append(kept[:, :, row : row + rows, key : key + keys])
        row, key = row + rows, key + keys
    return found
