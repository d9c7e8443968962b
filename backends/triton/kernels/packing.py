"""Masks that depend on the row (V3), read once: a bit an element, a class a block."""

import triton
import triton.language as tl

EMPTY: tl.constexpr = tl.constexpr(0)
PARTIAL: tl.constexpr = tl.constexpr(1)
FULL: tl.constexpr = tl.constexpr(2)


@triton.jit(do_not_specialize=["heads"])
def pack_mask_kernel(
    source,
    source_batch,
    source_head,
    source_row,
    source_key,
    words,
    classes,
    seqlen_q,
    seqlen_k,
    n_rows,
    n_words,
    heads,
    SUB: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    ONE_KEY: tl.constexpr,
    COPIED: tl.constexpr,
):
    """Bits and block classes of one [SUB, CHUNK] piece of a mask, read KEYS keys at a time: 1 or 4
    bytes of a boolean one, or 32 bits; strides count such pieces.

    Grid batch * heads * row blocks * chunks, over rows padded to n_rows and keys to 32 * n_words:
    bits of what does not exist are 0. With ONE_KEY the mask has one column, which stands for every
    key: a word is all ones or all zeros. Without COPIED the source is all this already, and only
    its classes are stored.
    """
    chunks = tl.cdiv(n_words * 32, CHUNK)
    row_blocks = n_rows // SUB
    chunk = tl.program_id(0) % chunks
    row_block = tl.program_id(0) // chunks % row_blocks
    plane = tl.program_id(0) // (chunks * row_blocks)
    b = plane // heads
    h = plane % heads
    rows = row_block * SUB + tl.arange(0, SUB)
    piece = chunk * (CHUNK // KEYS) + tl.arange(0, CHUNK // KEYS)
    exists = (rows < seqlen_q)[:, None] & (piece * KEYS < seqlen_k)[None, :]
    base = source + tl.cast(b, tl.int64) * source_batch + tl.cast(h, tl.int64) * source_head
    at = rows.to(tl.int64)[:, None] * source_row + piece.to(tl.int64)[None, :] * source_key
    value = tl.load(base + at, mask=exists, other=0)
    if KEYS == 4:  # the product moves the low bit of byte i to bit 28 + i
        value = (value * 0x10204080) >> 28 & 15
    bits = tl.reshape(value.to(tl.int32), [SUB, CHUNK // 32, 32 // KEYS])
    packed = tl.sum(bits << (tl.arange(0, 32 // KEYS) * KEYS)[None, None, :], axis=2)
    word = chunk * (CHUNK // 32) + tl.arange(0, CHUNK // 32)
    past = _missing_bits(word, seqlen_k)
    if KEYS == 32:
        packed = packed & ~past
    if ONE_KEY:
        packed = -packed
    plane = plane.to(tl.int64)
    if COPIED:
        target = words + (plane * n_rows + rows[:, None]) * n_words + word[None, :]
        tl.store(target, packed, mask=(word < n_words)[None, :])

    # A block holds 2 words a row: whether any bit is set, and whether all bits that exist are.
    missing = tl.where((rows < seqlen_q)[:, None], past, -1)
    some = tl.max(tl.reshape((packed != 0).to(tl.int32), [SUB, CHUNK // SUB, SUB // 32]), axis=2)
    whole = ((packed | missing) == -1).to(tl.int32)
    every = tl.min(tl.reshape(whole, [SUB, CHUNK // SUB, SUB // 32]), axis=2)
    some = tl.max(some, axis=0)
    every = tl.min(every, axis=0)
    n_columns = tl.cdiv(n_words * 32, SUB)
    column = chunk * (CHUNK // SUB) + tl.arange(0, CHUNK // SUB)
    entry = classes + (plane * row_blocks + row_block) * n_columns + column
    tl.store(entry, (some + some * every).to(tl.int8), mask=column < n_columns)


@triton.jit
def _missing_bits(word, seqlen_k):
    """[1, words]: the bits of each word whose keys are not below seqlen_k."""
    left = tl.minimum(tl.maximum(seqlen_k - word * 32, 0), 32)
    present = tl.where(left == 32, -1, (1 << tl.minimum(left, 31)) - 1)
    return (~present)[None, :]
