"""Which pairs are visible, worked out pair by pair from the text of V1 to V7 and M1 to M5.

A second transcription, apart from the reference: everything is dense, rows are `[.., Sq, 1]`, keys
`[.., 1, Sk]`, packed sequences stay on one axis. Integers are int64 and gates float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from flash_sparse_attn.spec.schema import Case
from torch import Tensor

MARGIN = 1e-4
"""V7 must not be decided by rounding: no gate may lie this near to its threshold."""


@dataclass(frozen=True, eq=False)
class Axes:
    """Where rows and keys are: i and j inside their sequence, off = Sk − Sq of the sequence.

    Attributes:
        i: `[1, 1, Sq, 1]`.
        j: `[1, 1, 1, Sk]`.
        off: `[B|1, 1, Sq|1, 1]`.
        own: V6, `[B|1, 1, Sq|1, Sk]`: the pair is of one sequence and the key is in use.
    """

    i: Tensor
    j: Tensor
    off: Tensor
    own: Tensor


def axes(case: Case, device: torch.device) -> Axes:
    """V6: rows, keys and alignment of a case."""
    sizes = case.sizes
    if case.packed:
        rows, row_of = _places(case.packed.lengths_q, case.packed.spare_q)
        keys, key_of = _places(case.packed.lengths_k, case.packed.spare_k)
        pairs = zip(case.packed.lengths_q, case.packed.lengths_k, strict=True)
        offsets = torch.tensor([*(n_k - n_q for n_q, n_k in pairs), 0], dtype=torch.int64)
        off = offsets[row_of].view(1, 1, -1, 1)
        own = row_of.view(-1, 1) == key_of.view(1, -1)
        own = (own & (row_of < len(case.packed.lengths_q)).view(-1, 1))[None, None]
    else:
        rows, keys = torch.arange(sizes.seqlen_q), torch.arange(sizes.seqlen_k)
        lengths = (case.cache.lengths if case.cache else ()) or [sizes.seqlen_k] * sizes.batch
        length = torch.tensor(lengths, dtype=torch.int64).view(-1, 1, 1, 1)
        off, own = length - sizes.seqlen_q, keys < length
    parts = (rows.view(1, 1, -1, 1), keys.view(1, 1, 1, -1), off, own)
    return Axes(*(part.to(device) for part in parts))


def _places(lengths: tuple[int, ...], spare: int) -> tuple[Tensor, Tensor]:
    """Of every token: its place in its sequence, and its sequence; spare ones are in one more."""
    lengths = (*lengths, spare)
    place = [n for length in lengths for n in range(length)]
    sequence = [b for b, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(place, dtype=torch.int64), torch.tensor(sequence, dtype=torch.int64)


def heads(x: Tensor, case: Case) -> Tensor:
    """A term with a head dim (dim 1) of 1, Hkv or Hq, read by the query heads: h // G."""
    count = case.sizes.heads_q
    if x.shape[1] == 1:
        return x
    return x[:, torch.arange(count, device=x.device) // (count // x.shape[1])]


def visible_pairs(case: Case, tensors: dict[str, Tensor], selected: Tensor | None) -> Tensor:
    """The conjunction of the V rules: bool `[B, Hq, Sq, Sk]`, B = 1 when packed.

    Args:
        case: the case.
        tensors: its tensors, by their names in `AttentionTensors`.
        selected: pairs that its structured masks select, `[B|1, Hkv|1, Sq, Sk]`.
    """
    sizes, options = case.sizes, case.options
    device = tensors["q"].device
    at = axes(case, device)
    p = at.i + at.off
    shape = (case.extent("B"), sizes.heads_q, sizes.seqlen_q, sizes.seqlen_k)
    visible = at.own.expand(shape).clone()
    if options.causal:
        visible &= at.j <= p
    outside = torch.zeros_like(at.j - p, dtype=torch.bool)
    if options.window_left is not None:
        outside |= p - at.j > options.window_left
    if options.window_right is not None:
        outside |= at.j - p > options.window_right
    visible &= ~outside | (at.j < options.sinks)
    if "mask" in tensors:
        visible &= heads(tensors["mask"], case)
    if selected is not None:
        visible &= heads(selected, case)
    if "interval_start" in tensors:
        start, end = (tensors[f"interval_{x}"].long().unsqueeze(2) for x in ("start", "end"))
        visible &= heads(start <= at.i, case) & heads(at.i < end, case)
    if "block_map" in tensors:
        rows, keys = case.block_map.block_size
        blocks = tensors["block_map"]
        blocks = blocks.repeat_interleave(rows, 2).repeat_interleave(keys, 3)
        visible &= heads(blocks[:, :, : sizes.seqlen_q, : sizes.seqlen_k], case)
    if "key_indices" in tensors:
        visible &= heads(listed_keys(tensors["key_indices"], sizes.seqlen_k).unsqueeze(2), case)
    if options.gate_threshold > 0:
        visible &= _gate_threshold(case, tensors, visible)
    return visible


def listed_keys(key_indices: Tensor, seqlen_k: int) -> Tensor:
    """V6: bool `[B, Hkv, Sk]`, true where `key_indices` `[B, Hkv, n]` lists the key."""
    found = [
        [[key in set(listed) for key in range(seqlen_k)] for listed in head]
        for head in key_indices.tolist()
    ]
    return torch.tensor(found, dtype=torch.bool, device=key_indices.device)


def gate_values(case: Case, alpha: Tensor, delta: Tensor) -> Tensor:
    """S3 before its scale: g `[B, Hq, Sq, Sk]` of `[B, Sq, Hq]` and `[B, Sk, Hkv]`."""
    delta = heads(delta.transpose(1, 2), case)
    product = alpha.transpose(1, 2).unsqueeze(3) * delta.unsqueeze(2)
    identity = case.gates.gate == "identity"
    return product if identity else torch.nn.functional.logsigmoid(product)


def _gate_threshold(case: Case, tensors: dict[str, Tensor], visible: Tensor) -> Tensor:
    """V7, over the pairs that the other rules leave visible."""
    scale = case.options.softmax_scale
    scale = case.sizes.head_dim**-0.5 if scale is None else scale
    alpha, delta = (with_batch(case, tensors[x]).double() for x in ("gate_q", "gate_k"))
    gate = scale * gate_values(case, alpha, delta)
    hidden = gate.masked_fill(~visible, -math.inf)
    above = gate - (hidden.amax(3, keepdim=True) + math.log(case.options.gate_threshold))
    near = visible & (above.abs() < MARGIN) & (above != 0)
    if near.any():
        raise ValueError(f"{case.id}: {int(near.sum())} gates lie at the threshold of V7")
    return above >= 0


def with_batch(case: Case, x: Tensor) -> Tensor:
    """A packed tensor with a batch dim of 1; others as they are."""
    return x.unsqueeze(0) if case.packed else x


def best_keys(
    scores: Tensor, excluded: Tensor, seqlen_q: int, window_size: int, causal: bool
) -> Tensor:
    """M5: the `window_size` best of the keys that a row may choose from, `[.., Sq, Sk]`.

    scores, excluded `[.., Sk]`. Key j is kept when fewer than w of the candidates are better.
    """
    seqlen_k = scores.shape[-1]
    i = torch.arange(seqlen_q, device=scores.device).view(-1, 1)
    j = torch.arange(seqlen_k, device=scores.device)
    joined = j <= i + seqlen_k - seqlen_q if causal else (j >= 0).expand(seqlen_q, -1)
    nan = scores.isnan()
    mine, other = scores.unsqueeze(-2), scores.unsqueeze(-1)  # j along the last dim
    my_nan, other_nan = nan.unsqueeze(-2), nan.unsqueeze(-1)
    higher = ~other_nan & (my_nan | (other > mine))
    equal = (other == mine) | (my_nan & other_nan)
    better = (higher | (equal & (j.view(-1, 1) > j))) & ~excluded.unsqueeze(-1)
    ahead = joined.double() @ better.double()
    return joined & ~excluded.unsqueeze(-2) & (ahead < window_size)
