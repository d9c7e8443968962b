"""PyTorch's FlexAttention, compiled: block mask from the same mask, `score_mod` for the bias."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)

from ..cases import Case
from ..inputs import Inputs
from ..timing import synchronize
from . import Prepared, heads_first


class Flex:
    """`torch.compile(flex_attention)`; the block mask is built, and timed, apart."""

    name = "flex"
    ours = False

    def unavailable(self, case: Case, device: torch.device) -> str | None:
        """It is compiled for CUDA devices here."""
        return None if device.type == "cuda" else "measured compiled, on CUDA devices only"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        """Compile afresh, so that no limit on recompilation turns a case into an eager one."""
        torch._dynamo.reset()
        # The timed backward retains its graph, which donated buffers forbid.
        torch._functorch.config.donated_buffer = False
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        block_mask, setup_ms = timed_block_mask(case, inputs)
        score_mod = _score_mod(inputs)
        grouped = case.heads_q != case.heads_kv

        def forward() -> Tensor:
            q, k, v = (heads_first(x) for x in (inputs.q, inputs.k, inputs.v))
            o = compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped)
            return heads_first(o)

        notes = ("the block mask is built outside of the timing",) if block_mask else ()
        return Prepared(forward, setup_ms=setup_ms, notes=notes)


def mask_mod(inputs: Inputs) -> Callable | None:
    """V1, V3, V4 of the inputs as a function of batch, head, row, key; None if there are none."""
    parts: list[Callable] = []
    if inputs.causal:
        parts.append(lambda b, h, i, j: j <= i)
    if inputs.mask is not None:
        parts.append(_element(inputs, inputs.mask))
    if inputs.intervals is not None:
        start = _element(inputs, inputs.intervals.start[:, :, None])
        end = _element(inputs, inputs.intervals.end[:, :, None])
        parts.append(lambda b, h, i, j: (start(b, h, i, j) <= i) & (i < end(b, h, i, j)))
    return and_masks(*parts) if parts else None


def timed_block_mask(case: Case, inputs: Inputs) -> tuple[BlockMask | None, float | None]:
    """The block mask, and the milliseconds of building it a second time."""
    rule, device = mask_mod(inputs), inputs.q.device
    if rule is None:
        return None, None
    create, heads = create_block_mask, None
    if case.per_head:  # compiled, since a mask of pairs for every head would not fit
        create, heads = torch.compile(create_block_mask, dynamic=False), case.heads_q
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        block_mask = create(rule, None, heads, case.seqlen, case.seqlen, device=device)
        synchronize(device)
        setup_ms = 1e3 * (time.perf_counter() - start)
    return block_mask, setup_ms


def _score_mod(inputs: Inputs) -> Callable | None:
    """S4 as a function of score, batch, head, row and key; None without a bias."""
    if inputs.bias is None:
        return None
    bias = _element(inputs, inputs.bias)
    return lambda score, b, h, i, j: score + bias(b, h, i, j)


def _element(inputs: Inputs, term: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Element (i, j) of head h of a `[1, {Hkv,1}, {S,1}, S]` term."""
    if term.shape[1] > 1:
        group = inputs.q.shape[2] // term.shape[1]
        if term.shape[2] == 1:
            keys_of_heads = term[0, :, 0]
            return lambda b, h, i, j: keys_of_heads[h // group, j]
        pairs_of_heads = term[0]
        return lambda b, h, i, j: pairs_of_heads[h // group, i, j]
    if term.shape[2] == 1:
        keys = term[0, 0, 0]
        return lambda b, h, i, j: keys[j]
    pairs = term[0, 0]
    return lambda b, h, i, j: pairs[i, j]


PEER = Flex()
