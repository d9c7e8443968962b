"""Dense masks in bits (V3): an eighth of the memory of a bool tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .problem import WORD_BITS, AttentionProblem
from .tensors import AttentionTensors
from .validation import message, require_int, require_tensor


@dataclass(frozen=True, eq=False)
class PackedMask:
    """Key j is visible to row i where bit j % 32 of word j // 32 of the row is 1 (V3).

    Args:
        words: int32 `[{B,1}, {Hq,Hkv,1}, {Sq,1}, ceil(Sk / 32)]`, any strides; bits from Sk on mean
            nothing.
        seqlen_k: Sk, keys. Unlike a bool mask, one in bits holds every key.

    Raises:
        TypeError: `words` is not an int32 tensor, or `seqlen_k` is not an int (E1, E3).
        ValueError: `words` is not 4-D, or its last dim is not ceil(Sk / 32), or `seqlen_k` is
            negative (E5, E6).
    """

    words: Tensor
    seqlen_k: int

    def __post_init__(self) -> None:
        require_tensor("words", self.words)
        if self.words.dtype != torch.int32:
            raise TypeError(message("E3", "dtype of words", self.words.dtype, torch.int32))
        require_int("seqlen_k", self.seqlen_k, 0, "an int >= 0")
        if self.words.dim() != 4 or self.words.shape[3] != words_of(self.seqlen_k):
            expected = f"[{{B,1}}, {{Hq,Hkv,1}}, {{Sq,1}}, {words_of(self.seqlen_k)}]"
            raise ValueError(message("E5", "shape of words", tuple(self.words.shape), expected))

    @classmethod
    def pack(cls, mask: Tensor) -> PackedMask:
        """The bits of a bool mask, true = attend.

        Args:
            mask: bool `[{B,1}, {Hq,Hkv,1}, {Sq,1}, Sk]`.

        Raises:
            TypeError: `mask` is not a bool tensor (E1, E3).
            ValueError: `mask` is not 4-D (E5).
        """
        require_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(message("E3", "dtype of mask", mask.dtype, torch.bool))
        if mask.dim() != 4:
            raise ValueError(message("E5", "rank of mask", mask.dim(), 4))
        return cls(pack_bits(mask), mask.shape[3])

    def to_dense(self) -> Tensor:
        """The bool mask `[{B,1}, {Hq,Hkv,1}, {Sq,1}, Sk]` it stands for."""
        return unpack_bits(self.words, self.seqlen_k)


def words_of(count: int) -> int:
    """Words that hold `count` bits."""
    return -(-count // WORD_BITS)


def pack_bits(flags: Tensor) -> Tensor:
    """bool `[.., n]` as words of `WORD_BITS`, int32 `[.., ceil(n / 32)]`; bits from n on are 0."""
    count = flags.shape[-1]
    padded = flags.new_zeros((*flags.shape[:-1], words_of(count), WORD_BITS))
    padded.flatten(-2)[..., :count] = flags
    # Eight bytes of 0 or 1: the product moves the low bit of byte i to bit 56 + i, without carries.
    octets = (padded.view(torch.int64) * 0x0102040810204080 >> 56) & 255
    return octets.to(torch.uint8).view(torch.int32).squeeze(-1)


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """bool `[.., count]` of the bits of int32 `[.., at least ceil(count / 32)]`."""
    bit = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=words.device)
    octets = words.contiguous().view(torch.uint8)
    return ((octets[..., None] & bit) != 0).flatten(-2)[..., :count]


def with_dense_mask(
    problem: AttentionProblem, tensors: AttentionTensors
) -> tuple[AttentionProblem, AttentionTensors]:
    """The call with a mask in bits as a bool tensor, for those that read no bits."""
    if problem.mask_keys is None:
        return problem, tensors
    mask = unpack_bits(tensors.mask, problem.mask_keys)
    return replace(problem, mask_keys=None), replace(tensors, mask=mask)
