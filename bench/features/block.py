"""Block masks (V5): plain maps of blocks, and FlexAttention's `BlockMask`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flash_sparse_attn import BlockMap, flash_sparse_attn_func

from ..peers import Peer, Prepared
from ..timing import synchronize
from .contenders import Other, cuda_only, flex, ours
from .question import FeatureCase, Normal, Question

QUANTITIES = ("forward", "backward")

FORMS = ("map", "mask", "documents")

FLEX_BLOCK = 128
"""Least block of FlexAttention: the tiles of its backward at D 64 to 128 divide no smaller one, and
options of a call do not change which tiles it tries.
"""


@dataclass(frozen=True, kw_only=True)
class Case(FeatureCase):
    """Self-attention inside blocks shared by all heads.

    Attributes:
        block: rows and keys of a block.
        form: "map", blocks active at random, given to us as a `BlockMap`; "mask", the same given as
            a `BlockMask`; "documents", a `BlockMask` whose `mask_mod` is causal inside documents of
            random lengths.
        active: share of the blocks that is active, of "map" and "mask".
        documents: how many, of "documents".
    """

    block: int
    form: str = "map"
    active: float | None = None
    documents: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise ValueError(f"form: got {self.form!r}, expected one of {FORMS}")
        of_documents = self.form == "documents"
        if (self.documents is not None) != of_documents or self.causal != of_documents:
            raise ValueError(f"documents: got {self.documents}, causal {self.causal}, {self.form}")
        if (self.active is not None) == of_documents:
            raise ValueError(f"active: got {self.active} with form {self.form!r}")
        if self.seqlen % self.block:
            raise ValueError(f"block: got {self.block} beside seqlen {self.seqlen}")

    @property
    def name(self) -> str:
        """One line that tells cases apart."""
        words = [f"B{self.batch} S{self.seqlen} {self.heads}"]
        if self.form == "documents":
            words.append(f"causal documents({self.documents})")
        else:
            words.append(f"random({self.active:g})")
        form = "BlockMap" if self.form == "map" else "BlockMask"
        return " ".join([*words, f"as {form} {self.block}x{self.block}"])


@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks(Question):
    """Which blocks are active, or which tokens are of one document.

    Attributes:
        active: bool `[1, 1, S / block, S / block]`, None of documents.
        block: rows and keys of a block.
        document: int64 `[S]`, the document of a token, None of blocks.
    """

    active: Tensor | None
    block: int
    document: Tensor | None

    def visibility(self, rows: Tensor) -> Tensor:
        """V5, or V1 and documents."""
        if self.active is not None:
            return self.active[:, :, rows // self.block].repeat_interleave(self.block, 3)
        return super().visibility(rows) & (self.document[rows][:, None] == self.document)

    @property
    def seeing(self) -> Tensor:
        """Rows of a block row with an active block."""
        if self.active is None:
            return super().seeing
        return self.active[0, 0].any(1).repeat_interleave(self.block)


def build(case: Case, device: torch.device, requires_grad: bool) -> Blocks:
    """Random tensors and blocks."""
    normal = Normal(case, device, requires_grad)
    tensors = normal.qkv(case.batch, case.seqlen, case.seqlen)
    active = document = None
    if case.form == "documents":
        order = torch.rand(case.seqlen - 1, generator=normal.generator, device=device)
        starts = order.topk(case.documents - 1).indices + 1
        first = torch.zeros(case.seqlen, dtype=torch.int64, device=device)
        document = first.index_fill(0, starts, 1).cumsum(0)
    else:
        count = case.seqlen // case.block
        chance = torch.rand((1, 1, count, count), generator=normal.generator, device=device)
        active = chance < case.active
    return Blocks(**tensors, causal=case.causal, active=active, block=case.block, document=document)


def block_mask(inputs: Blocks, size: int | None = None) -> tuple[BlockMask, float]:
    """FlexAttention's form of it, and the milliseconds of building it a second time.

    Its blocks are of `size`, by default the question's own; larger ones look theirs up.
    """
    length, device, own = inputs.q.shape[1], inputs.q.device, inputs.block
    size = size or own

    def of_documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (inputs.document[i] == inputs.document[j]) & (j <= i)

    def of_blocks(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return inputs.active[0, 0, i // own, j // own]

    rule = of_documents if inputs.active is None else of_blocks
    for _ in range(2):
        synchronize(device)
        start = time.perf_counter()
        if inputs.active is not None and size == own:
            built = _of_full_blocks(inputs.active, own, length)
        else:
            built = create_block_mask(
                rule, None, None, length, length, device=device, BLOCK_SIZE=size
            )
        synchronize(device)
        setup_ms = 1e3 * (time.perf_counter() - start)
    return built, setup_ms


def peers() -> tuple[Peer, ...]:
    """Ours, and FlexAttention with the same blocks, full ones marked as such."""
    return (*ours(_ours), Other("flex", _flex, lambda case, device: cuda_only(device)))


def _of_full_blocks(active: Tensor, block: int, length: int) -> BlockMask:
    counts = active.sum(3, dtype=torch.int32)
    indices = active.int().argsort(dim=3, descending=True, stable=True).int()
    partial = torch.zeros_like(counts), torch.zeros_like(indices)
    return BlockMask.from_kv_blocks(
        *partial, counts, indices, BLOCK_SIZE=block, seq_lengths=(length, length)
    )


def _ours(case: Case, inputs: Blocks, backend: str) -> Prepared:
    if case.form == "map":
        mask, setup_ms = BlockMap(inputs.active, (case.block, case.block)), None
    else:
        mask, setup_ms = block_mask(inputs)

    def forward() -> Tensor:
        return flash_sparse_attn_func(inputs.q, inputs.k, inputs.v, attn_mask=mask, backend=backend)

    return Prepared(forward, setup_ms=setup_ms)


def _flex(case: Case, inputs: Blocks) -> Prepared:
    if case.block >= FLEX_BLOCK:
        return flex(inputs, *block_mask(inputs))
    ready = flex(inputs, *block_mask(inputs, FLEX_BLOCK))
    note = f"its blocks are {FLEX_BLOCK}x{FLEX_BLOCK}: it compiles no backward for smaller ones"
    return replace(ready, notes=(*ready.notes, note))
