"""Device functions of the selection: grades, ranks, cuts of lists, and lists.

A *grade* is an int32 that orders as scores do. A *rank* is a grade and an index, which decides
between equal grades: the later key is the better. A *cut* is the rank that the w best of a list
reach, and no other. Lists hold keys in order of position; a place without a key has the grade
`LOWEST`.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
"""Grade of a place without a key, and of keys that take no part."""
WORST: tl.constexpr = tl.constexpr(-(2**31) + 2**16)
"""Grade of NaN, below that of -inf."""
NO_CUT: tl.constexpr = tl.constexpr((-(2**31) + 1) * 2**32)
"""A cut that every key is above."""
WIDTH: tl.constexpr = tl.constexpr(4)
"""Grades that a thread loads at once."""


@triton.jit
def grade_of(score):
    """int32 in the order of the scores: -0 equals 0, NaN is below -inf."""
    bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    grade = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, WORST, grade)


@triton.jit
def rank_of(grade, index):
    """int64 in the order of grades, of equal ones by index."""
    return (grade.to(tl.int64) << 32) | index.to(tl.int64)


@triton.jit
def index_of(rank):
    """The index in a rank."""
    return (rank & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def chunk_indices(CHUNK: tl.constexpr):
    """0 to CHUNK - 1, in rows of what a thread loads at once: sums and scans of rows are its own
    affair.
    """
    return tl.arange(0, CHUNK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def total(flags):
    """Sum of a chunk."""
    return tl.sum(tl.sum(flags, 1), 0)


@triton.jit
def count_earlier(flags):
    """How many flags of a chunk are set before each, and in all."""
    rows = tl.sum(flags, 1)
    earlier = (tl.cumsum(rows, 0) - rows)[:, None] + tl.cumsum(flags, 1) - flags
    return earlier, tl.sum(rows, 0)


@triton.jit
def load_grades(grades, begin, end, CHUNK: tl.constexpr):
    """grades[begin:end], filled up to a chunk with places without a key."""
    i = chunk_indices(CHUNK)
    return tl.load((grades + begin) + i, mask=i < end - begin, other=LOWEST)


@triton.jit
def count_reaching(grades, begin, end, grade, CHUNK: tl.constexpr):
    """How many of grades[begin:end] reach a grade above `LOWEST`."""
    whole = begin + (end - begin) // CHUNK * CHUNK
    count = (load_grades(grades, whole, end, CHUNK) >= grade).to(tl.int32)
    for at in range(begin, whole, CHUNK):  # without a mask, half the instructions
        count += (tl.load((grades + at) + chunk_indices(CHUNK)) >= grade).to(tl.int32)
    return total(count)


@triton.jit
def find_cut(grades, begin, end, window, low_bits, CHUNK: tl.constexpr):
    """A rank that the `window` best of grades[begin:end] reach and no other; `NO_CUT` if there are
    fewer. Indices count from `grades`; the later, the more recent.
    """
    grade = tl.full([], LOWEST, tl.int32)
    reached = 0  # by how many, once `window` keys reach it
    bit = tl.where(end - begin < window, low_bits, 32)
    while bit > low_bits:
        bit -= 1
        higher = grade ^ (tl.full([], 1, tl.int32) << bit)
        count = count_reaching(grades, begin, end, higher, CHUNK)
        grade = tl.where(count >= window, higher, grade)
        reached = tl.where(count >= window, count, reached)
        bit = tl.where(count == window, low_bits, bit)

    index = 0
    if reached > window:  # of the keys of this very grade the oldest are below the cut
        below = reached - window
        chunk = -1
        here = 0
        while here < below:
            below -= here
            chunk += 1
            equal = load_grades(grades, begin + chunk * CHUNK, end, CHUNK) == grade
            here = total(equal.to(tl.int32))
        i = begin + chunk * CHUNK
        equal = load_grades(grades, i, end, CHUNK) == grade
        earlier, _ = count_earlier(equal.to(tl.int32))
        index = i + 1 + total(tl.where(equal & (earlier == below - 1), chunk_indices(CHUNK), 0))
    return tl.maximum(rank_of(grade, index), NO_CUT)


@triton.jit
def append(grades, positions, length, grade, position, keep):
    """Write the kept keys of a chunk behind the first `length` of a list; its new length."""
    earlier, count = count_earlier(keep.to(tl.int32))
    tl.store((grades + length) + earlier, grade, mask=keep)
    tl.store((positions + length) + earlier, position, mask=keep)
    return length + count


@triton.jit
def clear(grades, begin, end, CHUNK: tl.constexpr):
    """Places from `begin` to `end` hold no key."""
    for at in range(begin, end, CHUNK):
        i = at + chunk_indices(CHUNK)
        tl.store(grades + i, tl.full(i.shape, LOWEST, tl.int32), mask=i < end)
