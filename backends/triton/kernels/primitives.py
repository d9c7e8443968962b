"""Device functions that every kernel of this backend is built from.

Index space: i counts query rows, j counts keys, both inside one sequence. Exponentials are taken in
base 2: exp(s - lse) = exp2(s * log2(e) - lse2), one multiply-add before the exponential. Those of
float64 calls are in base e (`Score.natural`), but for decoding and T1. alpha, c g and the floors of
V7 are in the base of the scores.

Every visibility rule but a mask that depends on the row gives a key one run of rows, first_j <= i
<= last_j (V1, V2, V4, V6 and key masks), so that an element of a tile costs two comparisons
whatever the number of rules.
"""

import triton
import triton.language as tl

from flash_sparse_attn.problem import KEPT_BLOCK

NEVER: tl.constexpr = tl.constexpr(2**31 - 1)
ALWAYS: tl.constexpr = tl.constexpr(-(2**31))
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
KEPT_ROWS: tl.constexpr = tl.constexpr(KEPT_BLOCK[0])
KEPT_KEYS: tl.constexpr = tl.constexpr(KEPT_BLOCK[1])
_LN_1P_1: tl.constexpr = tl.constexpr(0.997448979)
_LN_1P_2: tl.constexpr = tl.constexpr(-0.471301351)
_LN_1P_3: tl.constexpr = tl.constexpr(0.225685824)
_LN_1P_4: tl.constexpr = tl.constexpr(-0.058757195)
_COARSE_LN_1P_1: tl.constexpr = tl.constexpr(0.987453215)
_COARSE_LN_1P_2: tl.constexpr = tl.constexpr(-0.408406922)
_COARSE_LN_1P_3: tl.constexpr = tl.constexpr(0.114635160)


@triton.jit
def uniform(x):
    """A loaded number, which the compiler then knows to be the same in every thread: it lives in a
    register of the warp rather than in one of each thread, of which hot loops have none to spare.
    """
    if not INTERPRETED:
        x = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], tl.int32, is_pure=True, pack=1
        )
    return x


@triton.jit
def tile_pointers(x, b, h, start, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to x[b, start + r, h, c] of a `[B, S, H, D]` operand, [ROWS, BLOCK_D].

    64-bit, as B * S * H * D may exceed 2^31.
    """
    base = (
        x.pointer
        + tl.cast(b, tl.int64) * x.batch
        + tl.cast(h, tl.int64) * x.head
        + tl.cast(start, tl.int64) * x.row
    )
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    if x.wide:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return base + (rows[:, None] * x.row + columns[None, :] * x.column)


@triton.jit
def load_tile(
    x,
    b,
    h,
    start,
    limit,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
    CUT: tl.constexpr,
):
    """Rows start .. start + ROWS of x[b, :, h, :], [ROWS, BLOCK_D].

    Columns from D on read as 0, and so do rows from `limit` on if RAGGED; without RAGGED the caller
    knows that all rows exist. An operand that is a tensor descriptor over [B, H, S, D] is read by
    the copy engine (TMA), which fills with 0 what is past its end; CUT says that rows may lie
    between `limit` and there.
    """
    if isinstance(x, tl.core.tensor_descriptor_base):
        tile = tl.reshape(x.load([b, h, start, 0]), [ROWS, BLOCK_D])
        if RAGGED and CUT:
            tile = tl.where((start + tl.arange(0, ROWS) < limit)[:, None], tile, 0.0)
    else:
        pointers = tile_pointers(x, b, h, start, ROWS, BLOCK_D)
        if RAGGED or D != BLOCK_D:
            keep = (tl.arange(0, BLOCK_D) < D)[None, :]
            if RAGGED:
                keep = keep & (start + tl.arange(0, ROWS) < limit)[:, None]
            tile = tl.load(pointers, mask=keep, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(x, b, h, rows, exists, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a [rows, BLOCK_D] tile to x[b, rows, h, :D], those rows that exist."""
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    base = x.pointer + tl.cast(b, tl.int64) * x.batch + tl.cast(h, tl.int64) * x.head
    tl.store(
        base + (rows.to(tl.int64)[:, None] * x.row + columns[None, :] * x.column),
        value.to(x.pointer.dtype.element_ty),
        mask=exists[:, None] & (columns < D)[None, :],
    )


@triton.jit
def capped(x, score):
    """tanh(r / t) of S2 for raw products x = <q, k>.

    Through exp2, which is free of overflow and exact to a few ulp of 1; near 0, where float32 can
    tell the difference, by the Taylor series.
    """
    y = x * score.inner
    u = 1.0 - 2.0 / (1.0 + tl.exp2(y * (2.0 * LOG2E)))
    if score.fine:
        z = y * y
        series = 21844.0 / 6081075.0
        series = series * z - 1382.0 / 155925.0
        series = series * z + 62.0 / 2835.0
        series = series * z - 17.0 / 315.0
        series = series * z + 2.0 / 15.0
        series = series * z - 1.0 / 3.0
        u = tl.where(z < 0.25, y + y * z * series, u)
    return u


@triton.jit
def load_bias(bias, place, h, i, j, bounds):
    """The bias (S4) at rows i and keys j, in their broadcast shape.

    Only the dims that the bias has are read.
    """
    pointers = (
        bias.pointer
        + tl.cast(place.batch, tl.int64) * bias.batch
        + tl.cast(h // bias.heads_per_head, tl.int64) * bias.head
    )
    if bias.has_rows and bias.has_keys:
        pointers = pointers + i.to(tl.int64) * bias.row + j.to(tl.int64) * bias.key
        if bias.even:
            value = tl.load(pointers)
        else:
            exists = (i < bounds.seqlen_q) & (j < bounds.seqlen_k)
            value = tl.load(pointers, mask=exists, other=0.0)
    elif bias.has_keys:
        value = tl.load(pointers + (place.key_record + j))
    else:
        value = tl.load(pointers + (place.row_record + i))
    return value


@triton.jit
def load_alpha(gates, place, h, i):
    """alpha (S3) at rows i in the base of scores, in base 2 alpha log2(e); 0 at rows that do not
    exist, so that all of their g are finite.
    """
    record = tl.cast(place.batch, tl.int64) * gates.alpha_batch + h * gates.alpha_head
    return tl.load(gates.alpha + record + place.row_record + i)


@triton.jit
def load_floor(gates, place, h, i):
    """The least gate that rows i keep (V7)."""
    record = tl.cast(place.batch, tl.int64) * gates.alpha_batch + h * gates.alpha_head
    return tl.load(gates.floor + record + place.row_record + i)


@triton.jit
def unpruned(keep, gated, gates, place, h, i):
    """The elements of `keep` whose gates V7 keeps; i in the shape that broadcasts to theirs."""
    if gates.pruned:
        keep = keep & ~(gated < load_floor(gates, place, h, i))
    return keep


@triton.jit
def load_delta(gates, place, h, j):
    """delta (S3) at keys j."""
    head = h // gates.heads_per_delta
    record = tl.cast(place.batch, tl.int64) * gates.delta_batch + head * gates.delta_head
    return tl.load(gates.delta + record + place.key_record + j)


@triton.jit
def ln_sigmoid(x, onto, FINE: tl.constexpr, COARSE: tl.constexpr):
    """onto + ln sigma(x ln 2) = onto + min(x, 0) ln 2 - ln(1 + y), y = 2^-|x|.

    Where a 16-bit result follows, ln(1 + y) is a polynomial of least maximal error, 7e-5, or where
    c is small 5e-4: multiply-adds alone, which leaves the unit that takes exponentials and
    logarithms to the softmax.
    """
    y = tl.exp2(tl.abs(x) * -1.0)
    if FINE:
        value = (tl.minimum(x, 0.0) - tl.log2(1.0 + y)) * LN2 + onto
    else:
        # Not x * LN2 + onto, of which Triton would make a product that starts from x * LN2.
        value = tl.fma(tl.minimum(x, 0.0), LN2, onto)
        if COARSE:
            series = y * -_COARSE_LN_1P_3 - _COARSE_LN_1P_2
            series = series * y - _COARSE_LN_1P_1
        else:
            series = y * -_LN_1P_4 - _LN_1P_3
            series = series * y - _LN_1P_2
            series = series * y - _LN_1P_1
        value = series * y + value
    return value


@triton.jit
def _slope(x, y):
    """sigma(-x) of any base b for y = b^-|x|."""
    return tl.where(x < 0.0, 1.0, y) / (1.0 + y)


@triton.jit
def sigmoid_slope(x, FINE: tl.constexpr):
    """sigma(-x ln 2), the derivative of ln sigma: half of 1 - tanh(x ln 2 / 2), of which the
    hardware's own tanh (error 2^-11) is enough where a 16-bit result follows.
    """
    if FINE or INTERPRETED:
        slope = _slope(x, tl.exp2(tl.abs(x) * -1.0))
    else:
        slope = 0.5 - 0.5 * tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x * (0.5 * LN2)], tl.float32, is_pure=True, pack=1
        )
    return slope


@triton.jit
def gate(gates, x, COARSE: tl.constexpr = False, NATURAL: tl.constexpr = False):
    """(c g, g') of S3 for x = alpha delta; x and c g in base 2 or, NATURAL, e, where nothing is
    COARSE.
    """
    if not gates.logsigmoid:
        value = x
        slope = 1.0
    elif NATURAL:  # step by step as the reference rounds it (N1)
        y = tl.exp(tl.abs(x) * -1.0)
        value = tl.minimum(x, 0.0) - tl.log(1.0 + y)
        slope = _slope(x, y)
    else:
        value = ln_sigmoid(x, 0.0, gates.fine, COARSE) * LOG2E
        slope = sigmoid_slope(x, gates.fine)
    return value * gates.scale, slope


@triton.jit
def bound_range(j, bounds):
    """First and last row that sees each key j by V1, V2 and V6; first > last hides the key."""
    offset = bounds.seqlen_k - bounds.seqlen_q
    first = tl.full(j.shape, ALWAYS, tl.int32)
    last = tl.full(j.shape, NEVER, tl.int32)
    if bounds.right is not None:
        first = tl.where(j < bounds.right_sinks, ALWAYS, j - offset - bounds.right)
    if bounds.left is not None:
        last = tl.where(j < bounds.left_sinks, NEVER, j - offset + bounds.left)
    return tl.where(j < bounds.seqlen_k, first, NEVER), last


@triton.jit
def in_range(i, first, last, TRANSPOSED: tl.constexpr):
    """first_j <= i <= last_j, [rows, keys] or its transpose."""
    if TRANSPOSED:
        keep = (first[:, None] <= i[None, :]) & (i[None, :] <= last[:, None])
    else:
        keep = (first[None, :] <= i[:, None]) & (i[:, None] <= last[None, :])
    return keep


@triton.jit
def mask_bits(
    mask,
    b,
    h,
    start_q,
    start_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """V3 for one tile from words of 32 keys: [BLOCK_M, BLOCK_N], or its transpose.

    One word is loaded for 32 keys of a row; the words are then spread over the elements by
    reshaping, which is free in registers.
    """
    base = (
        mask.words
        + tl.cast(b, tl.int64) * mask.batch
        + tl.cast(h // mask.heads_per_head, tl.int64) * mask.head
    )
    rows = base + (start_q + tl.arange(0, BLOCK_M)).to(tl.int64) * mask.row
    columns = (start_k // 32 + tl.arange(0, BLOCK_N // 32)) * mask.word
    if TRANSPOSED:
        words = tl.load(rows[None, :] + columns[:, None])
        spread = words[:, None, :] >> tl.arange(0, 32)[None, :, None]
        bits = tl.reshape(spread & 1, [BLOCK_N, BLOCK_M])
    else:
        words = tl.load(rows[:, None] + columns[None, :])
        spread = words[:, :, None] >> tl.arange(0, 32)[None, None, :]
        bits = tl.reshape(spread & 1, [BLOCK_M, BLOCK_N])
    return bits != 0


@triton.jit
def block_bits(
    blocks,
    place,
    h,
    start_q,
    start_k,
    bounds,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """V5, T1 for one tile: [BLOCK_M, BLOCK_N], or its transpose. Its keys share one word."""
    base = (
        blocks.words
        + tl.cast(place.batch, tl.int64) * blocks.batch
        + tl.cast(h // blocks.heads_per_head, tl.int64) * blocks.head
    )
    i = start_q + tl.arange(0, BLOCK_M)
    row = place.row_block + i // KEPT_ROWS
    entry = base + row.to(tl.int64) * blocks.row + start_k // (32 * KEPT_KEYS)
    words = tl.load(entry, mask=i < bounds.seqlen_q, other=0)
    nth = (start_k + tl.arange(0, BLOCK_N)) // KEPT_KEYS % 32
    bits = words[None, :] >> nth[:, None] if TRANSPOSED else words[:, None] >> nth[None, :]
    return bits & 1 != 0


@triton.jit
def visible(
    place,
    h,
    start_q,
    start_k,
    bounds,
    mask,
    blocks,
    ranges,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Which elements of a tile are visible but for V7: [BLOCK_M, BLOCK_N], or its transpose."""
    i = start_q + tl.arange(0, BLOCK_M)
    j = start_k + tl.arange(0, BLOCK_N)
    if ranges is None:
        keep = in_range(i, *bound_range(j, bounds), TRANSPOSED)
    elif ranges.binding:
        at = (
            tl.cast(place.batch, tl.int64) * ranges.batch
            + tl.cast(h // ranges.heads_per_head, tl.int64) * ranges.head
            + place.key_record
        )
        first = tl.load(ranges.first + at + j)
        last = tl.load(ranges.last + at + j)
        keep = in_range(i, first, last, TRANSPOSED)
        if mask is not None:
            bits = mask_bits(mask, place.batch, h, start_q, start_k, BLOCK_M, BLOCK_N, TRANSPOSED)
            keep = keep & bits
    else:
        keep = mask_bits(mask, place.batch, h, start_q, start_k, BLOCK_M, BLOCK_N, TRANSPOSED)
    if blocks is not None:
        keep = keep & block_bits(
            blocks, place, h, start_q, start_k, bounds, BLOCK_M, BLOCK_N, TRANSPOSED
        )
    return keep


@triton.jit
def hide_if(
    hides,
    x,
    place,
    h,
    start_q,
    start_k,
    bounds,
    ranges,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scores x with those of hidden elements at -inf (N2), if the tile hides any."""
    if hides:
        keep = visible(
            place, h, start_q, start_k, bounds, None, None, ranges, BLOCK_M, BLOCK_N, False
        )
        x = tl.where(keep, x, float("-inf"))
    return x


@triton.jit
def natural_gate(gates, x):
    """g of S3, as it is and in no base, for x = alpha delta in base 2."""
    return ln_sigmoid(x, 0.0, gates.fine, gates.coarse) if gates.logsigmoid else x * LN2


@triton.jit
def gated_scores(x, score, gates, alpha, delta):
    """(s, c g, g') of S1 and S3 for raw products x without softcap, in base 2, s in units of
    `score.outer`, in which the gate is g. alpha and delta are as in `scores`.
    """
    z = alpha * delta
    if gates.logsigmoid:
        s = ln_sigmoid(z, x, gates.fine, gates.coarse)
        gated = ln_sigmoid(z, 0.0, gates.fine, gates.coarse) * score.outer
        slope = sigmoid_slope(z, gates.fine)
    else:
        s = z * LN2 + x
        gated = z * gates.scale
        slope = 1.0
    return s, gated, slope


@triton.jit
def scores(x, score, gates, alpha, delta, bias):
    """(s, slope, gated, gate_slope) of S1 to S4 for raw products x, s in the base of `score`.

    alpha (in that base), delta and the bias are in shapes that broadcast to that of x, None where
    absent. The slopes are those of S2 and S3, which G1 needs; `gated` is c g in that base, which V7
    compares.
    """
    slope = 1.0
    gated = 0.0
    gate_slope = 1.0
    if x.dtype == tl.float64:
        # Triton makes of products, and what is next added to them, products that start from that:
        # sums of other roundings than the reference's (N1).
        x = tl.fma(x, 1.0, 0.0)
    if score.inner is not None:
        u = capped(x, score)
        s = u * score.outer
        slope = 1.0 - u * u
    elif gates is None or score.natural:
        s = x * score.outer
    if gates is not None:
        if score.inner is not None or score.natural:
            gated, gate_slope = gate(gates, alpha * delta, gates.coarse, score.natural)
            s = s + gated
        else:
            s, gated, gate_slope = gated_scores(x, score, gates, alpha, delta)
            s = s * score.outer
    if bias is not None:
        s = s + bias.to(s.dtype) * (1.0 if score.natural else LOG2E)
    return s, slope, gated, gate_slope
