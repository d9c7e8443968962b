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
from .arguments import Slots
from .primitives import ALWAYS, NEVER, store_rows
from .sizes import ceil_div, power_of_2

COUNT_CHUNK = 1024
"""Keys that one program counts."""
INDEX_CHUNK = 128
"""Slots that one program enters into the index; every capacity is a multiple."""
KEYS = 16
"""Keys that one program clears, and adds up."""


def parts_of_plane(slots: Slots, block_n: int) -> int:
    """Programs of a plane: one for each tile of slots or, with one segment, as many as are wanted
    at least.
    """
    return max(slots.segments * slots.capacity // block_n, slots.parts)


@triton.jit
def _plane(slots, b, n):
    return tl.cast(b * slots.plane_batch + n * slots.plane_head, tl.int64)


@triton.jit
def _shares(slots, plane, BLOCK_N: tl.constexpr):
    """Into how many parts the work on each tile of keys is cut, with one segment."""
    used = tl.minimum(tl.load(slots.count + plane), slots.capacity)
    return tl.maximum(slots.parts // tl.maximum(tl.cdiv(used, BLOCK_N), 1), 1)


@triton.jit
def part_of_plane(slots, b, n, part, BLOCK_N: tl.constexpr):
    """(tile, share, shares): which of how many shares of which tile of slots a part is; 0 shares if
    the tile holds no key.
    """
    if slots is None:
        tile = part
        share = 0
        shares: tl.constexpr = 1
    else:
        plane = _plane(slots, b, n)
        if slots.shared:
            shares = _shares(slots, plane, BLOCK_N)
            tile = part // shares
            share = part % shares
        else:
            tile = part
            share = 0
            shares = 1
        segment = tl.minimum(tile * BLOCK_N // slots.capacity, slots.segments - 1)
        count = tl.load(slots.count + plane * slots.segments + segment)
        shares = tl.where(tile * BLOCK_N - segment * slots.capacity < count, shares, 0)
    return tile, share, shares


@triton.jit
def _segments_of_key(slots, at, exists, seqlen_q):
    """The first segment that sees a key, and how many do."""
    first = tl.maximum(tl.load(slots.first + at, mask=exists, other=NEVER), 0)
    last = tl.minimum(tl.load(slots.last + at, mask=exists, other=ALWAYS), seqlen_q - 1)
    seen = first <= last
    start = tl.where(seen, first, 0) // slots.rows
    return start, tl.where(seen, last // slots.rows - start + 1, 0)


@triton.jit(do_not_specialize=["seqlen_q", "length"])
def count_slots_kernel(offset, slots, seqlen_q, length, CHUNK: tl.constexpr):
    """Where each key's slots start in the index; grid planes * chunks.

    Chunks take their places as they come: where a key's slots are noted does not change what they
    are, nor the order in which they are added up.
    """
    chunks = tl.cdiv(length, CHUNK)
    plane = (tl.program_id(0) // chunks).to(tl.int64)
    j = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    _, times = _segments_of_key(slots, plane * length + j, j < length, seqlen_q)
    taken = slots.count + tl.num_programs(0) // chunks * slots.segments + plane
    before = tl.atomic_add(taken, tl.sum(times, 0), sem="relaxed")
    tl.store(offset + plane * length + j, before + tl.cumsum(times, 0) - times, mask=j < length)


@triton.jit(do_not_specialize=["seqlen_q", "length"])
def index_slots_kernel(index, offset, slots, seqlen_q, length, CHUNK: tl.constexpr):
    """Enter CHUNK slots under their keys, by segment; grid planes * chunks."""
    total = slots.segments * slots.capacity
    chunks = total // CHUNK
    plane = (tl.program_id(0) // chunks).to(tl.int64)
    slot = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    segment = slot // slots.capacity
    count = tl.load(slots.count + plane * slots.segments + segment)
    used = slot - segment * slots.capacity < count
    key = tl.load(slots.key + plane * total + slot, mask=used, other=0)
    start, times = _segments_of_key(slots, plane * length + key, used, seqlen_q)
    used = used & (times > 0)  # a key may be seen by none but rows that do not exist
    place = tl.load(offset + plane * length + key, mask=used, other=0) + segment - start
    tl.store(index + plane * total + place, slot, mask=used & (place < total))


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "length", "n_targets", "heads_kv"])
def sum_slots_kernel(
    dk_parts,
    dv_parts,
    dbias_parts,
    dk,
    dv,
    dbias,
    slots,
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
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """dk, dv and dbias, each None if not wanted; grid key tiles * batch * kv heads.

    A program clears the gradients of those of KEYS keys that no row sees, and adds up those of KEYS
    others: the nth live ones, since live keys that lie far apart would leave it idle.
    """
    n = tl.program_id(0) % heads_kv
    tiles = tl.cdiv(seqlen_k, KEYS)
    tile = tl.program_id(0) // heads_kv % tiles
    b = tl.program_id(0) // (heads_kv * tiles)
    plane = _plane(slots, b, n)
    head = (tl.cast(b, tl.int64) * heads_kv + n) * GROUP
    g = tl.arange(0, BLOCK_G)
    nth_key = tile * KEYS + tl.arange(0, KEYS)
    dk_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    dbias_acc = tl.zeros([KEYS, BLOCK_G], tl.float32)

    exists = nth_key < seqlen_k
    _, times = _segments_of_key(slots, plane * length + nth_key, exists, seqlen_q)
    dead = exists & (times == 0)
    if dk is not None:
        store_rows(dk, b, n, nth_key, dead, dk_acc, D, BLOCK_D)
    if dv is not None:
        store_rows(dv, b, n, nth_key, dead, dv_acc, DV, BLOCK_DV)
    if dbias is not None:
        keep = dead[:, None] & (g < GROUP)[None, :]
        tl.store(dbias + (head + g)[None, :] * seqlen_k + nth_key[:, None], dbias_acc, mask=keep)

    exists = nth_key < tl.load(slots.live_count + plane)
    j = tl.load(slots.live + plane * length + nth_key, mask=exists, other=0)
    _, times = _segments_of_key(slots, plane * length + j, exists, seqlen_q)
    start = tl.load(offset + plane * length + j, mask=exists, other=0)
    start += plane * slots.segments * slots.capacity
    shares = 1
    if slots.shared:
        shares = _shares(slots, plane, BLOCK_N)
    for nth in range(tl.max(times, 0) * shares):
        target, has = _target(index, start, times, nth, shares, n_targets, BLOCK_N)
        if dbias is not None:
            part = dbias_parts + (head * n_targets + target[:, None].to(tl.int64) * GROUP + g)
            dbias_acc += tl.load(part, mask=has[:, None] & (g < GROUP)[None, :], other=0.0)
        if dk is not None:
            dk_acc += _load_rows(dk_parts, b, n, target, has, D, BLOCK_D)
        if dv is not None:
            dv_acc += _load_rows(dv_parts, b, n, target, has, DV, BLOCK_DV)
    if dk is not None:
        store_rows(dk, b, n, j, exists, dk_acc, D, BLOCK_D)
    if dv is not None:
        store_rows(dv, b, n, j, exists, dv_acc, DV, BLOCK_DV)
    if dbias is not None:
        keep = exists[:, None] & (g < GROUP)[None, :]
        tl.store(dbias + (head + g)[None, :] * seqlen_k + j[:, None], dbias_acc, mask=keep)


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
    block_n: int,
    dk_parts: Tensor | None,
    dv_parts: Tensor | None,
    dbias_parts: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dk `[B, Sk, Hkv, D]`, dv `[B, Sk, Hkv, Dv]` in the dtype of the call, dbias float32
    `[B, Hq, Sk]`.

    Args:
        problem: of the call.
        slots: of its keys.
        block_n: keys of a tile of `key_gradients_kernel`.
        dk_parts, dv_parts: float32 `[B, parts * block_n, Hkv, {D,Dv}]`, or None.
        dbias_parts: float32 `[B, Hkv, parts * block_n, G]`, or None.
    """
    planes, total = slots.first[..., 0].numel(), slots.segments * slots.capacity
    length = slots.first.shape[-1]
    record = slots.key.new_empty(planes * (length + total))
    offset, index = record[: planes * length], record[planes * length :]
    count_slots_kernel[(planes * ceil_div(length, COUNT_CHUNK),)](
        offset, slots, problem.seqlen_q, length, CHUNK=COUNT_CHUNK
    )
    index_slots_kernel[(planes * (total // INDEX_CHUNK),)](
        index, offset, slots, problem.seqlen_q, length, CHUNK=INDEX_CHUNK
    )
    keys = (problem.batch, problem.seqlen_k, problem.heads_kv)
    dk, dv = (
        None if part is None else part.new_empty((*keys, part.shape[3]), dtype=problem.dtype)
        for part in (dk_parts, dv_parts)
    )
    dbias = None
    if dbias_parts is not None:
        dbias = dbias_parts.new_empty((problem.batch, problem.heads_q, problem.seqlen_k))
    targets = parts_of_plane(slots, block_n) * block_n
    tiles = ceil_div(problem.seqlen_k, KEYS)
    sum_slots_kernel[(tiles * problem.batch * problem.heads_kv,)](
        *(None if x is None else arguments.operand(x) for x in (dk_parts, dv_parts)),
        dbias_parts,
        *(None if x is None else arguments.operand(x) for x in (dk, dv)),
        dbias,
        slots,
        offset,
        index,
        problem.seqlen_q,
        problem.seqlen_k,
        length,
        targets,
        problem.heads_kv,
        D=problem.head_dim,
        BLOCK_D=arguments.block_width(problem.head_dim),
        DV=problem.head_dim_v,
        BLOCK_DV=arguments.block_width(problem.head_dim_v),
        BLOCK_N=block_n,
        KEYS=KEYS,
        GROUP=problem.group,
        BLOCK_G=power_of_2(problem.group),
    )
    return dk, dv, dbias
