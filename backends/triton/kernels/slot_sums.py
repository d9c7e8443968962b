"""Gradients of keys from gradients of slots.

A key has a slot in every segment of rows that sees it, and the rows of a slot may be shared out
among programs. Each part of the work stores its own sums in float32; here they are added up, by
the key that they belong to and always in the same order (G2): no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_sparse_attn.problem import AttentionProblem

from . import arguments
from .arguments import Place, Sequences, Slots
from .primitives import ALWAYS, NEVER, store_rows
from .segment_keys import live_count_of
from .sequences import place_tile
from .sizes import ceil_div, power_of_2
from .slots import keys_of_segment, place_slot, plane_of

COUNT_CHUNK = 1024
"""Keys that one program counts."""
INDEX_CHUNK = 128
"""Slots that one program enters into the index; every segment owns a multiple."""
KEYS = 16
"""Keys that one program clears, and adds up."""


def parts_of_plane(slots: Slots, block_n: int) -> int:
    """Programs of a plane: one for each tile of slots or, with one segment, as many as are wanted
    at least.
    """
    return max(slots.total // block_n, slots.parts)


@triton.jit
def _shares(slots, plane, BLOCK_N: tl.constexpr):
    """Into how many parts the work on each tile of keys is cut, with one segment."""
    used = tl.minimum(tl.load(slots.count + plane), slots.capacity)
    return tl.maximum(slots.parts // tl.maximum(tl.cdiv(used, BLOCK_N), 1), 1)


@triton.jit
def part_of_plane(slots, sequences, b, n, part, seqlen_q, seqlen_k, BLOCK_N: tl.constexpr):
    """(place, seqlen_q, start_q, tile, share, shares): where a part's rows lie, how many rows its
    sequence has, the first of its segment, and which of how many shares of which tile of slots it
    is; 0 shares if the tile holds no key.
    """
    plane = plane_of(slots, b, n)
    if slots.shared:
        shares = _shares(slots, plane, BLOCK_N)
        tile = part // shares
        share = part % shares
    else:
        tile = part
        share = 0
        shares = 1
    place, seqlen_q, _n_k, segment, exists = place_slot(
        slots, sequences, seqlen_q, seqlen_k, tile * BLOCK_N
    )
    count = keys_of_segment(slots, plane, segment, exists)
    shares = tl.where(tile * BLOCK_N - segment.slot < count, shares, 0)
    place = Place(b, place.row, 0, place.row_record, 0, 0)
    return place, seqlen_q, segment.row, tile, share, shares


@triton.jit
def _segments_of_key(slots, at, exists):
    """The first segment of its sequence that sees a key, and how many do."""
    first = tl.load(slots.first + at, mask=exists, other=NEVER)
    last = tl.load(slots.last + at, mask=exists, other=ALWAYS)
    seen = first <= last
    start = tl.where(seen, first, 0) // slots.rows
    return start, tl.where(seen, last // slots.rows - start + 1, 0)


@triton.jit(do_not_specialize=["length"])
def count_slots_kernel(offset, slots, length, CHUNK: tl.constexpr):
    """Where each key's slots start in the index, a record; grid planes * chunks.

    Chunks take their places as they come: where a key's slots are noted does not change what they
    are, nor the order in which they are added up.
    """
    chunks = tl.cdiv(length, CHUNK)
    plane = (tl.program_id(0) // chunks).to(tl.int64)
    at = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    _, times = _segments_of_key(slots, plane * length + at, at < length)
    taken = slots.count + tl.num_programs(0) // chunks * slots.segments + plane
    before = tl.atomic_add(taken, tl.sum(times, 0), sem="relaxed")
    tl.store(offset + plane * length + at, before + tl.cumsum(times, 0) - times, mask=at < length)


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "length"])
def index_slots_kernel(
    index, offset, slots, sequences, seqlen_q, seqlen_k, length, CHUNK: tl.constexpr
):
    """Enter CHUNK slots under their keys, by segment; grid planes * chunks."""
    chunks = slots.total // CHUNK
    plane = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    slot = chunk * CHUNK + tl.arange(0, CHUNK)
    place, _n_q, _n_k, segment, exists = place_slot(
        slots, sequences, seqlen_q, seqlen_k, chunk * CHUNK
    )
    used = slot - segment.slot < keys_of_segment(slots, plane, segment, exists)
    key = tl.load(slots.key + plane * slots.total + slot, mask=used, other=0)
    at = plane * length + place.key_record + key
    start, _times = _segments_of_key(slots, at, used)
    nth = tl.load(offset + at, mask=used, other=0) + segment.row // slots.rows - start
    tl.store(index + plane * slots.total + nth, slot, mask=used & (nth < slots.total))


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "length", "n_targets", "heads_kv"])
def sum_slots_kernel(
    dk_parts,
    dv_parts,
    dbias_parts,
    ddelta_parts,
    dk,
    dv,
    dbias,
    ddelta,
    slots,
    sequences,
    offset,
    index,
    seqlen_q,
    seqlen_k,
    length,
    n_targets,
    heads_kv,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    RECORD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """dk, dv, dbias and ddelta, None if not wanted; grid tiles of the record * batch * kv heads.

    A program clears the gradients of those of KEYS keys that no row sees, and adds up those of KEYS
    others of the sequence: the nth live ones, since live keys that lie far apart would leave it
    idle.
    """
    n = tl.program_id(0) % heads_kv
    tiles = length // KEYS
    start = tl.program_id(0) // heads_kv % tiles * KEYS
    b = tl.program_id(0) // (heads_kv * tiles)
    plane = plane_of(slots, b, n)
    place, _n_q, n_k, block, _exists = place_tile(
        seqlen_q, seqlen_k, sequences, start // RECORD, length // RECORD, RECORD, True
    )
    record = plane * length + place.key_record
    plane_kv = tl.cast(b, tl.int64) * heads_kv + n
    head = plane_kv * GROUP
    g = tl.arange(0, BLOCK_G)
    nth_key = block * RECORD + start % RECORD + tl.arange(0, KEYS)
    dk_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    dbias_acc = tl.zeros([KEYS, BLOCK_G], tl.float32)
    ddelta_acc = tl.zeros([KEYS], tl.float32)

    exists = nth_key < n_k
    _, times = _segments_of_key(slots, record + nth_key, exists)
    dead = exists & (times == 0)
    key = place.key + nth_key
    if dk is not None:
        store_rows(dk, b, n, key, dead, dk_acc, D, BLOCK_D)
    if dv is not None:
        store_rows(dv, b, n, key, dead, dv_acc, DV, BLOCK_DV)
    if dbias is not None:
        keep = dead[:, None] & (g < GROUP)[None, :]
        tl.store(dbias + (head + g)[None, :] * seqlen_k + key[:, None], dbias_acc, mask=keep)
    if ddelta is not None:
        tl.store(ddelta + plane_kv * seqlen_k + key, ddelta_acc, mask=dead)

    exists = nth_key < tl.load(live_count_of(slots.live_count, sequences, plane, place))
    j = tl.load(slots.live + record + nth_key, mask=exists, other=0)
    _, times = _segments_of_key(slots, record + j, exists)
    start = tl.load(offset + record + j, mask=exists, other=0)
    times = tl.minimum(times, slots.total - start)  # where keys_per_row left some no slot
    start += plane * slots.total
    key = place.key + j
    shares = 1
    if slots.shared:
        shares = _shares(slots, plane, BLOCK_N)
    for nth in range(tl.max(times, 0) * shares):
        target, has = _target(index, start, times, nth, shares, n_targets, BLOCK_N)
        if dbias is not None:
            part = dbias_parts + (head * n_targets + target[:, None].to(tl.int64) * GROUP + g)
            dbias_acc += tl.load(part, mask=has[:, None] & (g < GROUP)[None, :], other=0.0)
        if ddelta is not None:
            part = ddelta_parts + (plane_kv * n_targets + target)
            ddelta_acc += tl.load(part, mask=has, other=0.0)
        if dk is not None:
            dk_acc += _load_rows(dk_parts, b, n, target, has, D, BLOCK_D)
        if dv is not None:
            dv_acc += _load_rows(dv_parts, b, n, target, has, DV, BLOCK_DV)
    if dk is not None:
        store_rows(dk, b, n, key, exists, dk_acc, D, BLOCK_D)
    if dv is not None:
        store_rows(dv, b, n, key, exists, dv_acc, DV, BLOCK_DV)
    if dbias is not None:
        keep = exists[:, None] & (g < GROUP)[None, :]
        tl.store(dbias + (head + g)[None, :] * seqlen_k + key[:, None], dbias_acc, mask=keep)
    if ddelta is not None:
        tl.store(ddelta + plane_kv * seqlen_k + key, ddelta_acc, mask=exists)


@triton.jit
def _target(index, start, times, nth, shares, n_targets, BLOCK_N: tl.constexpr):
    """Where the nth share of each key's slots was stored, and whether there is one."""
    has = nth // shares < times
    slot = tl.load(index + start + nth // shares, mask=has, other=0)
    target = (slot // BLOCK_N * shares + nth % shares) * BLOCK_N + slot % BLOCK_N
    # A key that keys_per_row left no slot for has no entry in the index.
    return target, has & (slot >= 0) & (target >= 0) & (target < n_targets)


@triton.jit
def _load_rows(x, b, n, rows, has, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    base = x.pointer + tl.cast(b, tl.int64) * x.batch + tl.cast(n, tl.int64) * x.head
    at = rows.to(tl.int64)[:, None] * x.row + columns[None, :]
    return tl.load(base + at, mask=has[:, None] & (columns < D)[None, :], other=0.0)


def add_up(
    problem: AttentionProblem,
    slots: Slots,
    sequences: Sequences | None,
    block_n: int,
    dk_parts: Tensor | None,
    dv_parts: Tensor | None,
    dbias_parts: Tensor | None,
    ddelta_parts: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dk `[B, Sk, Hkv, D]`, dv `[B, Sk, Hkv, Dv]` in the dtype of the call, dbias float32
    `[B, Hq, Sk]` and ddelta `[B, Hkv, Sk]`.

    Args:
        problem: of the call.
        slots: of its keys.
        sequences: of a packed call, for which B is 1 and Sk counts the keys of all.
        block_n: keys of a tile of `key_gradients_kernel`.
        dk_parts, dv_parts: float32 `[B, parts * block_n, Hkv, {D,Dv}]`, or None.
        dbias_parts: float32 `[B, Hkv, parts * block_n, G]`, or None.
        ddelta_parts: float32 `[B, Hkv, parts * block_n]`, or None.
    """
    planes, length = slots.first[..., 0].numel(), slots.first.shape[-1]
    lengths = (problem.seqlen_q, problem.seqlen_k, length)
    sizes = (planes * length, planes * slots.total)
    offset, index = slots.key.new_empty(sum(sizes)).split(sizes)
    count_slots_kernel[(planes * ceil_div(length, COUNT_CHUNK),)](
        offset, slots, length, CHUNK=COUNT_CHUNK
    )
    index_slots_kernel[(planes * (slots.total // INDEX_CHUNK),)](
        index, offset, slots, sequences, *lengths, CHUNK=INDEX_CHUNK
    )
    batch = arguments.records(problem)
    keys = (batch, problem.seqlen_k, problem.heads_kv)
    dk, dv = (
        None if part is None else part.new_empty((*keys, part.shape[3]), dtype=problem.dtype)
        for part in (dk_parts, dv_parts)
    )
    dbias = None
    if dbias_parts is not None:
        dbias = dbias_parts.new_empty((batch, problem.heads_q, problem.seqlen_k))
    ddelta = None
    if ddelta_parts is not None:
        ddelta = ddelta_parts.new_empty((batch, problem.heads_kv, problem.seqlen_k))
    targets = parts_of_plane(slots, block_n) * block_n
    sum_slots_kernel[(length // KEYS * batch * problem.heads_kv,)](
        *(None if x is None else arguments.operand(x) for x in (dk_parts, dv_parts)),
        dbias_parts,
        ddelta_parts,
        *(None if x is None else arguments.operand(x) for x in (dk, dv)),
        dbias,
        ddelta,
        slots,
        sequences,
        offset,
        index,
        *lengths,
        targets,
        problem.heads_kv,
        D=problem.head_dim,
        BLOCK_D=arguments.block_width(problem.head_dim),
        DV=problem.head_dim_v,
        BLOCK_DV=arguments.block_width(problem.head_dim_v),
        BLOCK_N=block_n,
        KEYS=KEYS,
        RECORD=arguments.RECORD_BLOCK,
        GROUP=problem.group,
        BLOCK_G=power_of_2(problem.group),
    )
    return dk, dv, dbias, ddelta
