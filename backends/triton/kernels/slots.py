"""Where slots lie: of segments of the rows of a batch element, or of packed sequences (V6).

Segments of packed sequences are numbered as tiles of rows are (`place_tile`): those of sequence b
from cu_q[b] // rows + b on. The slots of a sequence start where no sum over the sequences before it
is needed either: each full segment among their rows has room for `capacity` keys, and each sequence
for one segment more, of `capacity` or of all its keys, whichever is less.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_sparse_attn.problem import AttentionProblem, Form

from . import arguments
from .arguments import RECORD_BLOCK, Place, Segment
from .primitives import uniform
from .sequences import place_sequence

_RECORD: tl.constexpr = tl.constexpr(RECORD_BLOCK)


def segment_count(problem: AttentionProblem, rows: int) -> int:
    """Segments of a plane; packed, some hold no row."""
    return arguments.rows_of_tiles(problem, problem.seqlen_q, rows)


def slot_count(problem: AttentionProblem, rows: int, capacity: int) -> int:
    """Slots of a plane: where those of one more sequence would start."""
    if problem.form != Form.PACKED:
        return segment_count(problem, rows) * capacity
    by_keys = arguments.record_length(problem, problem.seqlen_k)
    return problem.seqlen_q // rows * capacity + min(problem.batch * capacity, by_keys)


def longest(problem: AttentionProblem) -> tuple[int, int]:
    """Rows and keys of the longest sequence, each at least 1."""
    if problem.form != Form.PACKED:
        return problem.seqlen_q, problem.seqlen_k
    return max(problem.max_seqlen_q, 1), max(problem.max_seqlen_k, 1)


@triton.jit
def _first_slot(row, key, sequence, rows, capacity):
    """The first slot of a sequence whose rows and keys start there; numbers may be tensors."""
    by_keys = (key // _RECORD + sequence) * _RECORD
    spare = tl.minimum(sequence.to(tl.int64) * capacity, by_keys.to(tl.int64)).to(tl.int32)
    return row // rows * capacity + spare


@triton.jit
def _own_capacity(n_k, capacity):
    """Slots of each segment of a sequence of n_k keys."""
    return tl.minimum(tl.cdiv(n_k, _RECORD) * _RECORD, capacity)


@triton.jit
def segment_of_row(sequences, sequence, i, rows, capacity):
    """The segment of row i of a sequence; `sequence` means nothing in a batch."""
    nth = i // rows
    if sequences is None:
        segment = Segment(nth, nth * rows, nth * capacity, capacity)
    else:
        place, _n_q, n_k = place_sequence(sequences, sequence)
        own = _own_capacity(n_k, capacity)
        segment = Segment(
            place.row // rows + sequence + nth,
            nth * rows,
            _first_slot(place.row, place.key, sequence, rows, capacity) + nth * own,
            own,
        )
    return segment


@triton.jit
def place_segment(sequences, seqlen_q, seqlen_k, nth, rows, capacity):
    """(place, seqlen_q, seqlen_k, segment, exists) of the nth segment of a plane."""
    if sequences is None:
        place = Place(0, 0, 0, 0, 0, 0)
        segment = segment_of_row(sequences, 0, nth * rows, rows, capacity)
        exists = True
    else:
        b = tl.arange(0, sequences.largest)
        present = b < sequences.count
        first = tl.load(sequences.cu_q + b, mask=present, other=0) // rows + b
        sequence = uniform(tl.sum((present & (first <= nth)).to(tl.int32), 0) - 1)
        place, seqlen_q, seqlen_k = place_sequence(sequences, sequence)
        i = (nth - place.row // rows - sequence) * rows
        segment = segment_of_row(sequences, sequence, i, rows, capacity)
        exists = i < seqlen_q
    return place, seqlen_q, seqlen_k, segment, exists


@triton.jit
def place_slot(slots, sequences, seqlen_q, seqlen_k, slot):
    """(place, seqlen_q, seqlen_k, segment, exists) of the segment that owns a slot, if one does."""
    if sequences is None:
        place = Place(0, 0, 0, 0, 0, 0)
        nth = tl.minimum(slot // slots.capacity, slots.segments - 1)
        segment = segment_of_row(sequences, 0, nth * slots.rows, slots.rows, slots.capacity)
        exists = True
    else:
        b = tl.arange(0, sequences.largest)
        present = b < sequences.count
        row = tl.load(sequences.cu_q + b, mask=present, other=0)
        key = tl.load(sequences.cu_k + b, mask=present, other=0)
        first = _first_slot(row, key, b, slots.rows, slots.capacity)
        sequence = uniform(tl.sum((present & (first <= slot)).to(tl.int32), 0) - 1)
        place, seqlen_q, seqlen_k = place_sequence(sequences, sequence)
        start = _first_slot(place.row, place.key, sequence, slots.rows, slots.capacity)
        own = _own_capacity(seqlen_k, slots.capacity)
        nth = (slot - start) // tl.maximum(own, 1)
        exists = (seqlen_k > 0) & (nth < tl.cdiv(seqlen_q, slots.rows))
        i = tl.where(exists, nth, 0) * slots.rows
        segment = segment_of_row(sequences, sequence, i, slots.rows, slots.capacity)
    return place, seqlen_q, seqlen_k, segment, exists


@triton.jit
def plane_of(slots, b, n):
    """The plane of a key-value head of a batch element."""
    return tl.cast(b * slots.plane_batch + n * slots.plane_head, tl.int64)


@triton.jit
def keys_of_segment(slots, plane, segment, exists):
    """How many keys a segment sees; 0 of one that does not exist."""
    return tl.load(slots.count + plane * slots.segments + segment.nth, mask=exists, other=0)
