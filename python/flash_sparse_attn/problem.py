"""`AttentionProblem`: everything about a call but its data.

Built once from the arguments, it is the dispatch key, the compile-cache key, the log line and the
test id. Building it checks the call against the E rules of `spec/attention.md` (the checks
themselves are in `validation.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import StrEnum

import torch

from .tensors import DIFFERENTIABLE

KEPT_BLOCK = (16, 32)
"""Rows and keys of a block of the set kept under T1; every tile of a backend is made of such."""
WORD_BITS = 32
"""Bits of a word, where bools are kept as bits: bit n % 32 of int32 word n // 32 is the n-th."""


class Form(StrEnum):
    """How sequences are laid out in memory (V6)."""

    BATCHED = "batched"
    PACKED = "packed"
    CACHE = "cache"


class Gate(StrEnum):
    """The function g of S3."""

    LOGSIGMOID = "logsigmoid"
    IDENTITY = "identity"


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """The scalar arguments of a call, in the order in which the operators take them.

    Attributes:
        form: layout of the sequences.
        softmax_scale: c of S1.
        softcap: t of S2; 0 = none.
        causal: V1.
        window_left: keys to the left of the aligned one (V2); None = unbounded.
        window_right: keys to its right (V2); None = unbounded.
        sinks: first keys exempt from the window (V2).
        mask_keys: keys of a mask that is given in bits (V3); None where it is bool.
        keys_per_row: w if the intervals (V4) show at most w + n - 1 keys to any n consecutive rows;
            0 = unknown. Not a rule but a promise that bounds memory.
        block_size_q: rows of a block of the block map (V5); 0 without one.
        block_size_k: keys of a block of the block map (V5); 0 without one.
        gate: g of S3; None without gates.
        gate_threshold: γ of V7; 0 = none.
        softmax_threshold: a of T1; 0 = none.
        max_seqlen_q: longest packed query sequence; 0 in other forms.
        max_seqlen_k: longest packed key sequence; 0 in other forms.
        deterministic: G2.
    """

    form: str = Form.BATCHED
    softmax_scale: float = 1.0
    softcap: float = 0.0
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    sinks: int = 0
    mask_keys: int | None = None
    keys_per_row: int = 0
    block_size_q: int = 0
    block_size_k: int = 0
    gate: str | None = None
    gate_threshold: float = 0.0
    softmax_threshold: float = 0.0
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    deterministic: bool = False


OPTION_NAMES = tuple(field.name for field in fields(AttentionOptions))
"""Field names, in the order in which the operators take them."""


@dataclass(frozen=True, kw_only=True)
class AttentionProblem(AttentionOptions):
    """Options, shapes, dtypes and device of one call: hashable, no tensors.

    `seqlen_q` and `seqlen_k` are Sq and Sk; in the packed form they are the total numbers of rows
    and keys and `batch` is the number of sequences; in the cache form `seqlen_k` is the logical
    capacity of a sequence.

    Attributes:
        batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, head_dim_v: sizes.
        dtype: dtype of q, k and v.
        device: device type, "cpu" or "cuda".
        arch: compute capability as major * 10 + minor, None off the GPU.
        mask, bias: sizes of the 4-D broadcast term, None if absent; of a mask in bits, those of the
            bool mask it stands for.
        bias_dtype: dtype of the bias.
        intervals: sizes of the batch and head dims of the intervals.
        block_map: sizes of the block map.
        page_size: keys of a page, None without a page table.
        entries: of a list of key indices, None without lists.
        grads: which inputs need a gradient, a subset of `DIFFERENTIABLE` in its order.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: str
    arch: int | None
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    bias_dtype: torch.dtype | None = None
    intervals: tuple[int, int] | None = None
    block_map: tuple[int, ...] | None = None
    page_size: int | None = None
    entries: int | None = None
    grads: tuple[str, ...] = ()

    @property
    def group(self) -> int:
        """G, the number of query heads that share a key-value head."""
        return self.heads_q // self.heads_kv

    @property
    def window(self) -> tuple[int | None, int | None]:
        """`(left, right)` of V2."""
        return self.window_left, self.window_right

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Shape of the set kept under T1 as bits, int32 `[B, Hq, row blocks, words]`; without a
        threshold `[0]`.

        A bit stands for `KEPT_BLOCK` rows and keys, in words of `WORD_BITS`. Packed: `[1, Hq, row
        blocks, words]`, rows of sequence b from block cu_seqlens_q[b] // 16 + b on.
        """
        if self.softmax_threshold == 0:
            return (0,)
        rows, keys = KEPT_BLOCK
        if self.form == Form.PACKED:
            row_blocks = self.seqlen_q // rows + self.batch + 1
            return 1, self.heads_q, row_blocks, -(-self.max_seqlen_k // (WORD_BITS * keys))
        row_blocks = -(-self.seqlen_q // rows)
        return self.batch, self.heads_q, row_blocks, -(-self.seqlen_k // (WORD_BITS * keys))

    def needs(self, *names: str) -> bool:
        """Whether any of the named inputs needs a gradient."""
        return any(name in self.grads for name in names)

    def terms(self) -> frozenset[str]:
        """Names of the optional terms that are present, as capability tables list them."""
        present = {
            "softcap": self.softcap > 0,
            "gate": self.gate is not None,
            "bias": self.bias is not None,
            "causal": self.causal,
            "window": self.window != (None, None),
            "sinks": self.sinks > 0,
            "mask": self.mask is not None,
            "intervals": self.intervals is not None,
            "block_map": self.block_map is not None,
            "gate_threshold": self.gate_threshold > 0,
            "softmax_threshold": self.softmax_threshold > 0,
            "pages": self.page_size is not None,
            "indices": self.entries is not None,
        }
        return frozenset(name for name, given in present.items() if given)

    def with_grads(self, grads: tuple[str, ...]) -> AttentionProblem:
        """The same problem with another set of required gradients, put into order."""
        return replace(self, grads=tuple(name for name in DIFFERENTIABLE if name in grads))

    def __str__(self) -> str:
        """One line for logs and error messages."""
        kv = "" if self.heads_kv == self.heads_q else f"/{self.heads_kv}"
        dims = f"D{self.head_dim}" + (
            "" if self.head_dim_v == self.head_dim else f"/{self.head_dim_v}"
        )
        dtype = str(self.dtype).removeprefix("torch.")
        where = self.device if self.arch is None else f"sm_{self.arch}"
        terms = "+".join(sorted(self.terms())) or "dense"
        sizes = f"B{self.batch} Sq{self.seqlen_q} Sk{self.seqlen_k} H{self.heads_q}{kv} {dims}"
        return f"{self.form} {sizes} {dtype} {where} {terms}"
