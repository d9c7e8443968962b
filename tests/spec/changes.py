"""Wrong functions, and ways to make one from a right one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from flash_sparse_attn.reference import forward, layout, score
from torch import Tensor

Function = Callable[..., Any]
Change = Callable[[Function], Function]


def on_result(change: Callable[..., Any]) -> Change:
    """A function whose result is `change(result, *arguments)`."""
    return lambda f: lambda *a, **k: change(f(*a, **k), *a)


def instead(function: Function) -> Change:
    return lambda _: function


def on_arguments(change: Callable[..., tuple[Any, ...]]) -> Change:
    """A function that gets `change(*arguments)`."""
    return lambda f: lambda *a, **k: f(*change(*a), **k)


def scaled(name: str) -> Change:
    """`gradients` with the scale of one of them taken out."""

    def change(found: dict[str, Tensor], *arguments: Any) -> dict[str, Tensor]:
        q, terms = arguments[2], arguments[5]
        return found | {name: found[name] / terms.scale(q.shape[3])}

    return on_result(change)


def modulo(x: Tensor, heads_q: int) -> Tensor:
    return x if x.shape[1] in (1, heads_q) else x.repeat(1, heads_q // x.shape[1], 1, 1)


def first_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(1, (heads, -1))[:, :, 0]


def not_reduced(grad: Tensor, shape: torch.Size) -> Tensor:
    return grad[tuple(slice(0, size) for size in shape)]


def mean_reduced(result: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    return result * result.numel() / grad.numel()


def unguarded_softmax(s: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Without O2: an empty row divides 0 by 0."""
    masked = torch.where(visible, s, -math.inf)
    return masked.softmax(3), masked.logsumexp(3)


def uniform_softmax(s: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """With the most negative number in place of minus infinity."""
    masked = torch.where(visible, s, torch.finfo(s.dtype).min)
    return masked.softmax(3), masked.logsumexp(3)


def leaky_softmax(s: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden pairs multiplied by 0 rather than left out."""
    e = (s - s.amax(3, keepdim=True)).exp() * visible
    return e / e.sum(3, keepdim=True), s.amax(3) + e.sum(3).log()


def unshifted_softmax(s: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentials of the scores as they are."""
    e = torch.where(visible, s, -math.inf).exp()
    return e / e.sum(3, keepdim=True), e.sum(3).log()


def score_cap_last(q: Tensor, k: Tensor, terms: Any, visible: Tensor) -> Tensor:
    scale = terms.scale(q.shape[3])
    s = scale * (q @ k.transpose(2, 3)) + terms.bias.to(q.dtype)
    return terms.softcap * torch.tanh(s / terms.softcap)


def window(
    p: Tensor, j: Tensor, bounds: tuple[int | None, int | None], sinks: int, **wrong: Any
) -> Tensor:
    left, right = bounds
    inside = torch.ones_like(j <= p)
    if left is not None:
        inside = inside & (j >= p - left - wrong.get("left", 0))
    if wrong.get("sinks_left_only"):
        inside = inside | (j < sinks)
    if right is not None and not wrong.get("right_ignored"):
        inside = inside & (j <= p + right)
    return inside if wrong.get("sinks_left_only") else inside | (j < sinks)


def wrong_window(**wrong: Any) -> Change:
    return instead(lambda *arguments: window(*arguments, **wrong))


def intervals(start_shift: int, end_shift: int) -> Change:
    return on_arguments(lambda start, end, rows: (start + start_shift, end + end_shift, rows))


def terms_without(**fields: Any) -> Change:
    return on_arguments(lambda q, k, terms: (q, k, replace(terms, **fields)))


def sinks_beat_causal(visible: Tensor, q: Tensor, k: Tensor, terms: Any) -> Tensor:
    return visible | (torch.arange(k.shape[1], device=k.device) < terms.sinks)


def blocks_of_swapped_sides(
    block_map: Tensor, size: tuple[int, int], seqlen_q: int, seqlen_k: int
) -> Tensor:
    i, j = torch.arange(seqlen_q)[:, None] // size[1], torch.arange(seqlen_k) // size[0]
    rows, keys = block_map.shape[2:]
    return block_map[:, :, i.clamp(max=rows - 1), j.clamp(max=keys - 1)]


def without_ragged_blocks(
    seen: Tensor, block_map: Tensor, size: tuple[int, int], seqlen_q: int, seqlen_k: int
) -> Tensor:
    return seen & (torch.arange(seqlen_k) < seqlen_k // size[1] * size[1])


def first_block_map(terms: Any, b: int, length: int) -> tuple[Any, int, int]:
    return replace(terms, block_map=terms.block_map[:1]), b, length


def aligned_by_capacity(capacity: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """`attend` in which p_i is what it would be if the whole capacity were in use."""

    def attend(q: Tensor, k: Tensor, v: Tensor, terms: Any) -> tuple[Tensor, Tensor]:
        p = torch.arange(q.shape[1])[:, None] + capacity - q.shape[1]
        seen = (torch.arange(k.shape[1]) <= p)[None, None]
        return forward.attend(q, k, v, replace(terms, causal=False, mask=seen))

    return attend


def without_maximum(kept: Tensor, gate: Tensor, visible: Tensor, threshold: float) -> Tensor:
    largest = torch.where(visible, gate, -math.inf).amax(3, keepdim=True)
    return kept & (gate < largest)


def one_threshold(gate: Tensor, visible: Tensor, threshold: float) -> Tensor:
    largest = torch.where(visible, gate, -math.inf).amax((2, 3), keepdim=True)
    return gate >= largest + math.log(threshold)


def first_gates(f: Function) -> Function:
    def first(terms: Any, rows: slice, keys: slice, kept: Any) -> Any:
        own = f(terms, rows, keys, kept)
        return replace(own, gate_q=terms.gate_q[None, : rows.stop - rows.start])

    return first


def first_alpha(found: dict[str, Tensor], ds: Tensor, terms: Any, *_: Any) -> dict[str, Tensor]:
    group = terms.gate_q.shape[2] // terms.gate_k.shape[2]
    alpha = found["gate_q"]
    return found | {"gate_q": alpha[:, :, ::group].repeat_interleave(group, 2)}


def sequences_shift(f: Function) -> Function:
    def shifted(terms: Any, rows: slice, keys: slice, kept: Any) -> Any:
        own = f(terms, rows, keys, kept)
        start, end = own.interval_start - rows.start, own.interval_end - rows.start
        return replace(own, interval_start=start, interval_end=end)

    return shifted


def one_sequence(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    return [(slice(0, int(cu_q[-1])), slice(0, int(cu_k[-1])))]


def without_last_key(own: Any, terms: Any, b: int, length: int) -> Any:
    last = torch.arange(length) == length - 1
    return replace(own, mask=~last[None, None, None])


class Counted:
    """Two changes that together count a key as often as it is listed."""

    def __init__(self) -> None:
        self.bias = torch.zeros(0)

    def listed(self, f: Function) -> Function:
        def remember(key_indices: Tensor, length: int) -> Tensor:
            j = torch.arange(length, device=key_indices.device)
            times = (key_indices.unsqueeze(2) == j).sum(1)
            self.bias = times.clamp(min=1).double().log().float()[None, :, None]
            return f(key_indices, length)

        return remember

    def attend(self, f: Function) -> Function:
        return lambda q, k, v, terms: f(q, k, v, replace(terms, bias=self.bias))


counted = Counted()


def late_boundaries(cu_seqlens: Tensor, seqlen: int) -> tuple[Tensor, int]:
    return torch.cat((cu_seqlens[:1], cu_seqlens[1:-1] + 1, cu_seqlens[-1:])), seqlen


def wider(f: Function) -> Function:
    """`window_intervals` with a left bound of one more."""

    def wider(n: int, m: int, left: int | None, *rest: Any, **named: Any) -> Any:
        return f(n, m, None if left is None else left + 1, *rest, **named)

    return wider


def older_first(scores: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    return scores.argsort(dim=-1, descending=True, stable=True)


def swapped_gates(ds: Tensor, terms: Any, scale: float, visible: Tensor) -> dict[str, Tensor]:
    alpha, delta = score.gate_operands(terms, visible, ds.dtype)
    dx = scale * ds * score.gate_derivative(alpha * delta, terms.gate)
    ddelta = layout.from_query_heads((dx * delta).sum(2), terms.gate_k.shape[2])
    return {"gate_q": (dx * alpha).sum(3).transpose(1, 2), "gate_k": ddelta.transpose(1, 2)}


def everywhere(visible: Tensor) -> Tensor:
    return torch.ones_like(visible)


def squeezed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)
