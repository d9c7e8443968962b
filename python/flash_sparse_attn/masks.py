"""Structured masks: objects that a call accepts as `attn_mask` beside a boolean tensor.

`IntervalMask` is two integers a key (V4) and is how every mask whose rows per key are one run
should be given; `BlockMap` is one bit a block (V5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .packed_mask import PackedMask, pack_bits, words_of
from .reference import selection
from .selection import topk_intervals
from .validation import message, require_int, require_tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Key j is visible to the rows start_j <= i < end_j (V4): O(Sk) memory.

    Args:
        start: int32 `[{B,1}, {Hkv,1}, Sk]`, first row that sees the key.
        end: int32, same shape, row after the last that sees it; an empty interval hides the key.
        keys_per_row: w if any n consecutive rows see at most w + n - 1 keys by these intervals;
            None = unknown. Kernels cut rows into segments and size their memory by it, so that
            scattered keys cost what a window costs; rows for which it does not hold give NaN.

    Raises:
        TypeError: not int32 tensors, or `keys_per_row` is not an int (E1, E3).
        ValueError: shapes differ or are not 3-D, or `keys_per_row` is negative (E5, E6).
    """

    start: Tensor
    end: Tensor
    keys_per_row: int | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("start", self.start), ("end", self.end)):
            require_tensor(name, tensor)
            if tensor.dtype != torch.int32:
                raise TypeError(message("E3", f"dtype of {name}", tensor.dtype, "torch.int32"))
        if self.start.shape != self.end.shape or self.start.dim() != 3:
            shapes = (tuple(self.start.shape), tuple(self.end.shape))
            raise ValueError(
                message(
                    "E5",
                    "interval start and end",
                    shapes,
                    "two tensors of one shape [{B,1}, {Hkv,1}, Sk]",
                )
            )
        if self.keys_per_row is not None:
            require_int("keys_per_row", self.keys_per_row, 0, "None or an int >= 0")

    @classmethod
    def causal(
        cls, seqlen_q: int, seqlen_k: int, device: torch.device | str | None = None
    ) -> IntervalMask:
        """V1 as intervals (M1): row i sees keys j <= i + Sk - Sq.

        Args:
            seqlen_q: Sq, rows.
            seqlen_k: Sk, keys.
            device: where the mask lives; default: torch's.
        """
        return cls(*selection.causal_intervals(seqlen_q, seqlen_k, device=device))

    @classmethod
    def window(
        cls,
        seqlen_q: int,
        seqlen_k: int,
        left: int | None,
        right: int | None = 0,
        sinks: int = 0,
        device: torch.device | str | None = None,
    ) -> IntervalMask:
        """V2 as intervals (M2): row i sees the keys from p_i - left to p_i + right, and sinks.

        Args:
            seqlen_q: Sq, rows.
            seqlen_k: Sk, keys.
            left: keys to the left of the aligned one, None = unbounded.
            right: keys to its right, None = unbounded; the default 0 looks at no later key.
            sinks: first keys that every row sees. A sink is exempt from the right bound too:
                intersect with `causal` for rows before it.
            device: where the mask lives; default: torch's.

        Raises:
            ValueError: a bound is negative (E6).
        """
        for name, value in (("left", left), ("right", right), ("sinks", sinks)):
            if value is not None and value < 0:
                raise ValueError(
                    message(
                        "E6",
                        name,
                        value,
                        "None or an int >= 0" if name != "sinks" else "an int >= 0",
                    )
                )
        bounded = left is not None and right is not None
        return cls(
            *selection.window_intervals(seqlen_q, seqlen_k, left, right, sinks, device=device),
            keys_per_row=min(left + right + 1 + sinks, seqlen_k) if bounded else None,
        )

    @classmethod
    def documents(cls, cu_seqlens: Tensor, seqlen: int) -> IntervalMask:
        """Block-diagonal visibility of documents laid end to end in one sequence (M3).

        Args:
            cu_seqlens: int32 `[documents + 1]`, boundaries from 0 to `seqlen`.
            seqlen: S; Sq = Sk = S.
        """
        require_tensor("cu_seqlens", cu_seqlens)
        return cls(*selection.document_intervals(cu_seqlens, seqlen))

    @classmethod
    def keys(cls, keep: Tensor, seqlen_q: int) -> IntervalMask:
        """The same keys for every row (M4).

        Args:
            keep: bool `[{B,1}, {Hkv,1}, Sk]`, or `[B, Sk]` for a padding mask; true = attend.
            seqlen_q: Sq, rows.

        Raises:
            TypeError: `keep` is not a bool tensor (E1, E3).
            ValueError: `keep` is neither 2-D nor 3-D (E5).
        """
        require_tensor("keep", keep)
        if keep.dtype != torch.bool:
            raise TypeError(message("E3", "dtype of keep", keep.dtype, "torch.bool"))
        if keep.dim() not in (2, 3):
            raise ValueError(message("E5", "rank of keep", keep.dim(), "2 or 3"))
        return cls(*selection.key_intervals(keep[:, None] if keep.dim() == 2 else keep, seqlen_q))

    @classmethod
    def topk(
        cls,
        scores: Tensor,
        window_size: int,
        causal: bool = True,
        key_padding_mask: Tensor | None = None,
        seqlen_q: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> IntervalMask:
        """The w best keys of every row, for scores that do not depend on the query (M5).

        The mask of dynamic mask attention (arXiv 2508.02124), made causal.

        Exact, in O(Sk) memory: with causality a key is evicted once and never returns, so its rows
        are one interval. On a GPU that a backend serves, float16, bfloat16 and float32 scores are
        ranked by its kernels; other devices and float64 by PyTorch's operations, to the same
        result.

        Args:
            scores: floating `[{B,1}, {Hkv,1}, Sk]`, or `[1, {Hkv,1}, Tk]` of packed sequences;
                larger is better, ties are won by the more recent key, NaN is worst. No gradient
                flows through the choice.
            window_size: w >= 1, keys a row keeps.
            causal: row i chooses among keys j <= i + Sk - Sq; otherwise among all keys.
            key_padding_mask: bool, broadcastable with `scores`, or `[B, Sk]`; keys that are False
                take no part.
            seqlen_q: Sq; default Sk.
            cu_seqlens: int32 `[sequences + 1]`, boundaries of packed sequences (V6), for rows and
                keys alike. Every sequence keeps its own w best; its rows are counted inside it, as
                `flash_sparse_attn_varlen_func` reads intervals. A token of no sequence is hidden.

        Raises:
            TypeError: `scores` is not a floating tensor, `key_padding_mask` not a bool one,
                `cu_seqlens` not an int32 one, `window_size` or `seqlen_q` not an int (E1, E3).
            ValueError: `window_size` < 1, `seqlen_q` < 0, `scores` is not 3-D, a batch of more than
                one is packed, `cu_seqlens` is not 1-D or has no boundary, it or the mask is on
                another device, the mask does not broadcast (E4, E5, E6), or `seqlen_q` and
                `cu_seqlens` are both given (E8).
        """
        require_tensor("scores", scores)
        require_tensor("key_padding_mask", key_padding_mask, optional=True)
        require_tensor("cu_seqlens", cu_seqlens, optional=True)
        if not scores.is_floating_point():
            raise TypeError(message("E3", "dtype of scores", scores.dtype, "a floating dtype"))
        if scores.dim() != 3:
            raise ValueError(
                message("E5", "rank of scores", scores.dim(), "3: [{B,1}, {Hkv,1}, Sk]")
            )
        require_int("window_size", window_size, 1, "an int >= 1")
        if seqlen_q is not None:
            require_int("seqlen_q", seqlen_q, 0, "None or an int >= 0")
        if key_padding_mask is not None:
            if key_padding_mask.dim() == 2:
                key_padding_mask = key_padding_mask[:, None]
            _require_padding(key_padding_mask, scores)
        if cu_seqlens is not None:
            _require_boundaries(cu_seqlens, scores, key_padding_mask, seqlen_q)
        seqlen_k = scores.shape[-1]
        return cls(
            *topk_intervals(
                scores.detach(),
                seqlen_k if seqlen_q is None else seqlen_q,
                window_size,
                causal,
                key_padding_mask,
                cu_seqlens,
            ),
            keys_per_row=min(window_size, seqlen_k),
        )

    def __and__(self, other: IntervalMask) -> IntervalMask:
        """Intersection: a row sees a key if both masks let it (M)."""
        known = [x for x in (self.keys_per_row, other.keys_per_row) if x is not None]
        return IntervalMask(
            torch.maximum(self.start, other.start),
            torch.minimum(self.end, other.end),
            min(known) if known else None,
        )

    def to_dense(self, seqlen_q: int) -> Tensor:
        """The bool mask `[{B,1}, {Hkv,1}, Sq, Sk]` it stands for: O(Sq Sk) memory, for tests."""
        i = torch.arange(seqlen_q, device=self.start.device)[:, None]
        return (self.start[..., None, :] <= i) & (i < self.end[..., None, :])


def _require_padding(mask: Tensor, scores: Tensor) -> None:
    """E3, E4 and E5 for the padding mask of M5."""
    name = "key_padding_mask"
    if mask.dtype != torch.bool:
        raise TypeError(message("E3", f"dtype of {name}", mask.dtype, "torch.bool"))
    if mask.device != scores.device:
        expected = f"{scores.device}, where the scores are"
        raise ValueError(message("E4", f"device of {name}", mask.device, expected))
    sizes = zip(reversed(mask.shape), reversed(scores.shape), strict=False)
    fits = all(1 in pair or pair[0] == pair[1] for pair in sizes)
    if not (1 <= mask.dim() <= 3 and mask.shape[-1] in (1, scores.shape[-1]) and fits):
        words = f"[B, Sk], or one that broadcasts with {tuple(scores.shape)}"
        raise ValueError(message("E5", f"shape of {name}", tuple(mask.shape), words))


def _require_boundaries(
    cu_seqlens: Tensor, scores: Tensor, padding: Tensor | None, seqlen_q: int | None
) -> None:
    """E3, E4, E5 and E8 for M5 of packed sequences."""
    name = "cu_seqlens"
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(message("E3", f"dtype of {name}", cu_seqlens.dtype, "torch.int32"))
    if cu_seqlens.device != scores.device:
        expected = f"{scores.device}, where the scores are"
        raise ValueError(message("E4", f"device of {name}", cu_seqlens.device, expected))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        expected = "[sequences + 1]"
        raise ValueError(message("E5", f"shape of {name}", tuple(cu_seqlens.shape), expected))
    for what, x in (("scores", scores), ("key_padding_mask", padding)):
        if x is not None and x.dim() == 3 and x.shape[0] != 1:
            expected = f"[1, {{Hkv,1}}, Tk] with {name}"
            raise ValueError(message("E5", f"shape of {what}", tuple(x.shape), expected))
    if seqlen_q is not None:
        expected = f"None with {name}, whose sequences have as many rows as keys"
        raise ValueError(message("E8", "seqlen_q", seqlen_q, expected))


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Which blocks of a fixed size may attend (V5).

    Args:
        active: bool `[{B,1}, {Hq,Hkv,1}, ceil(Sq / rows), ceil(Sk / keys)]`.
        block_size: `(rows, keys)` of a block.

    Raises:
        TypeError: `active` is not a bool tensor (E1, E3).
    """

    active: Tensor
    block_size: tuple[int, int] = (128, 128)

    def __post_init__(self) -> None:
        require_tensor("active", self.active)
        if self.active.dtype != torch.bool:
            raise TypeError(message("E3", "dtype of active", self.active.dtype, "torch.bool"))

    @classmethod
    def from_lists(
        cls,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        block_size: tuple[int, int] = (128, 128),
        num_key_blocks: int | None = None,
    ) -> BlockMap:
        """The blocks that lists name, one list for each row of blocks, as FlexAttention has them.

        Args:
            kv_num_blocks: int32 `[{B,1}, {Hq,Hkv,1}, ceil(Sq / rows)]`, lengths of the lists.
            kv_indices: int32 `[{B,1}, {Hq,Hkv,1}, ceil(Sq / rows), n]`, blocks of keys; what
                stands past the length of a list is not read.
            block_size: `(rows, keys)` of a block.
            num_key_blocks: ceil(Sk / keys); default n.

        Raises:
            TypeError: the lists are not int32 tensors, `num_key_blocks` is not an int (E1, E3).
            ValueError: `kv_indices` is not 4-D, `kv_num_blocks` does not count its rows, or
                `num_key_blocks` is negative (E5, E6).
        """
        for name, tensor in (("kv_num_blocks", kv_num_blocks), ("kv_indices", kv_indices)):
            require_tensor(name, tensor)
            if tensor.dtype != torch.int32:
                raise TypeError(message("E3", f"dtype of {name}", tensor.dtype, torch.int32))
        if kv_indices.dim() != 4 or kv_num_blocks.shape != kv_indices.shape[:3]:
            shapes = (tuple(kv_num_blocks.shape), tuple(kv_indices.shape))
            expected = "one shape of three dims, and a fourth in kv_indices"
            raise ValueError(message("E5", "kv_num_blocks and kv_indices", shapes, expected))
        length = kv_indices.shape[3]
        width = length if num_key_blocks is None else num_key_blocks
        require_int("num_key_blocks", width, 0, "None or an int >= 0")
        listed = torch.arange(length, device=kv_indices.device) < kv_num_blocks[..., None]
        # What is not listed goes to a column of its own.
        columns = torch.where(listed, kv_indices, width).long()
        active = listed.new_zeros((*kv_indices.shape[:3], width + 1))
        return cls(active.scatter(3, columns, True)[..., :width].contiguous(), block_size)


_EVALUATED: WeakKeyDictionary[BlockMask, tuple[BlockMap, PackedMask | None]] = WeakKeyDictionary()
"""What `from_block_mask` found, for as long as the `BlockMask` lives."""
EVALUATED_AT_ONCE = 1 << 24
"""Pairs for which a `mask_mod` is evaluated at a time."""


def from_block_mask(block_mask: BlockMask) -> tuple[BlockMap, PackedMask | None]:
    """A FlexAttention `BlockMask` as V5 reads it: its blocks, and what partial blocks hold.

    Its `mask_mod` is evaluated by the first call that is given the object, on its device and the
    current stream, without waiting for either; later calls get the same tensors. A tensor that
    `mask_mod` captures is therefore read once: if it changes, make a new `BlockMask`. Nothing is
    remembered of an evaluation inside a CUDA graph's capture or inside `torch.compile`, where it is
    part of the graph: to keep it out, give the call the two masks that this function returns.

    Args:
        block_mask: `torch.nn.attention.flex_attention.BlockMask`.

    Returns:
        The block map, and the mask that `mask_mod` gives inside partial blocks, true elsewhere, in
        the batch and head dims of the `BlockMask`; None when there is no `mask_mod` to speak of.
    """
    if torch.compiler.is_compiling():
        return _evaluate(block_mask)
    found = _EVALUATED.get(block_mask)
    if found is None:
        # Tensors made in inference mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            found = _evaluate(block_mask)
        # A capture only records: its tensors hold nothing until it is replayed.
        if not (block_mask.kv_indices.is_cuda and torch.cuda.is_current_stream_capturing()):
            _EVALUATED[block_mask] = found
    return found


def _evaluate(block_mask: BlockMask) -> tuple[BlockMap, PackedMask | None]:
    from torch.nn.attention.flex_attention import noop_mask

    size = tuple(block_mask.BLOCK_SIZE)
    key_blocks = -(-block_mask.seq_lengths[1] // size[1])
    partial = active = BlockMap.from_lists(
        block_mask.kv_num_blocks, block_mask.kv_indices, size, key_blocks
    )
    if block_mask.full_kv_num_blocks is not None:
        full = BlockMap.from_lists(
            block_mask.full_kv_num_blocks, block_mask.full_kv_indices, size, key_blocks
        )
        active = BlockMap(partial.active | full.active, size)
    if block_mask.mask_mod is noop_mask:
        return active, None
    return active, _elements(block_mask, partial)


def _elements(block_mask: BlockMask, partial: BlockMap) -> PackedMask:
    """What `mask_mod` says inside `partial` blocks; true outside."""
    from torch.nn.attention.flex_attention import create_mask

    (seqlen_q, seqlen_k), (rows, keys) = block_mask.seq_lengths, partial.block_size
    batch, heads = partial.active.shape[:2]
    device = partial.active.device
    shape = (batch, heads, seqlen_q, words_of(seqlen_k))
    words = torch.empty(shape, dtype=torch.int32, device=device)
    column = torch.arange(seqlen_k, device=device) // keys
    step = max(1, EVALUATED_AT_ONCE // max(1, batch * heads * seqlen_k))
    for first in range(0, seqlen_q, step):
        count = min(step, seqlen_q - first)
        mask_mod = _from_row(block_mask.mask_mod, first)
        elements = create_mask(mask_mod, batch, heads, count, seqlen_k, device=device)
        row = torch.arange(first, first + count, device=device) // rows
        inside = partial.active[:, :, row[:, None], column]
        words[:, :, first : first + count] = pack_bits(elements | ~inside)
    return PackedMask(words, seqlen_k)


def _from_row(mask_mod: Callable[..., Tensor], first: int) -> Callable[..., Tensor]:
    """`mask_mod` with rows counted from `first`."""
    return lambda b, h, i, j: mask_mod(b, h, i + first, j)
