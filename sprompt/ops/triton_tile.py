"""Triton functions that several kernels share. Only the triton.py of the ops' folders imports them."""

import triton
import triton.language as tl
from triton import knobs

#: Triton's interpreter stores bfloat16 as 16-bit integers, which numpy cannot multiply as floats.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

#: Keys of choose_least have 31 bits: STEPS digits of DIGIT bits, with BINS values.
DIGIT, BINS, STEPS = tl.constexpr(8), tl.constexpr(256), tl.constexpr(4)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, accumulated in float32. Products of half types are exact in float32, so the interpreter widens them."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def pack(bits, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """bool (ROWS, 32 * WORDS) -> int32 (ROWS, WORDS): column 32 w + i becomes bit i of word w."""
    lanes = tl.reshape(bits.to(tl.uint32), (ROWS, WORDS, 32)) << tl.arange(0, 32)[None, None, :].to(tl.uint32)
    return tl.sum(lanes, axis=2).to(tl.int32, bitcast=True)


@triton.jit
def unpack(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """int32 (ROWS, WORDS) -> bool (ROWS, 32 * WORDS)."""
    lanes = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(lanes, (ROWS, WORDS * 32)) != 0


@triton.jit
def folded(x, HALVINGS: tl.constexpr):
    """Sum over the last axis, which has 2^HALVINGS entries: neighbours, then neighbours of these sums, and so on. The order of
    tl.sum would depend on the layout."""
    for _ in tl.static_range(HALVINGS):
        even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [x.shape[-1] // 2, 2]))  # noqa: RUF005  # no starred lists in Triton
        x = even + odd
    return tl.reshape(x, x.shape[:-1])


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def corners(plane, i, j, h, w, stride_y, stride_x, mask, U: tl.constexpr):
    """The four cells around the upsampled pixels of quad (i, j): (i - 1, j - 1), (i - 1, j), (i, j - 1), (i, j), clamped to the
    map (h, w). For U = 1 all four are the cell (i, j), loaded once."""
    if U == 1:
        cell = tl.load(
            plane + (tl.cast(i, tl.int64) * stride_y + tl.cast(j, tl.int64) * stride_x), mask=mask, other=0.0
        ).to(tl.float32)
        return cell, cell, cell, cell
    else:
        top = tl.cast(tl.maximum(i - 1, 0), tl.int64) * stride_y
        bottom = tl.cast(tl.minimum(i, h - 1), tl.int64) * stride_y
        left = tl.cast(tl.maximum(j - 1, 0), tl.int64) * stride_x
        right = tl.cast(tl.minimum(j, w - 1), tl.int64) * stride_x
        return (
            tl.load(plane + (top + left), mask=mask, other=0.0).to(tl.float32),
            tl.load(plane + (top + right), mask=mask, other=0.0).to(tl.float32),
            tl.load(plane + (bottom + left), mask=mask, other=0.0).to(tl.float32),
            tl.load(plane + (bottom + right), mask=mask, other=0.0).to(tl.float32),
        )


@triton.jit
def fraction(a, U: tl.constexpr):
    """The weight of the second cell for pixel a of the U pixels between two cells (half-pixel centres)."""
    return (2 * (U // 2 + a) + 1 - U) / (2 * U)


@triton.jit
def target_row(y, W, stride_y, RATIO: tl.constexpr):
    """Where row y of a target begins (soft_target): an offset in elements for a dense target, in bits for a mask with rows of
    RATIO * W bits."""
    if RATIO == 0:
        return tl.cast(y, tl.int64) * stride_y
    elif RATIO == 1:
        return tl.cast(y, tl.int64) * W
    else:
        return (tl.cast(y, tl.int64) * RATIO + (RATIO // 2 - 1)) * (W * RATIO) + (RATIO // 2 - 1)


@triton.jit
def soft_target(target, row, x, W, stride_x, mask, RATIO: tl.constexpr):
    """Pixel x of a row of a target of width W (sprompt/ops/soft_targets.py), float32, 0 outside the mask. RATIO 0: dense, bytes or
    floats. Other RATIO: words of a mask RATIO times as large. The value is its bit, or the mean of the middle 2 x 2 of RATIO x
    RATIO bits. The two bits of a row begin at an even bit (RATIO 2), or one after a multiple of 4 (RATIO 4), so they never lie
    in two words."""
    if RATIO == 0:
        value = tl.load(target + (row + tl.cast(x, tl.int64) * stride_x), mask=mask, other=0)
        if target.dtype.element_ty == tl.uint8:
            value = value != 0
        return value.to(tl.float32)
    elif RATIO == 1:
        bit = row + x
        word = tl.load(target + (bit >> 5) * stride_x, mask=mask, other=0)
        return ((word >> (bit & 31).to(tl.int32)) & 1).to(tl.float32)
    else:
        bit = row + x * RATIO
        below = bit + W * RATIO
        first = tl.load(target + (bit >> 5) * stride_x, mask=mask, other=0) >> (bit & 31).to(tl.int32)
        second = tl.load(target + (below >> 5) * stride_x, mask=mask, other=0) >> (below & 31).to(tl.int32)
        count = (first & 1) + ((first >> 1) & 1) + (second & 1) + ((second >> 1) & 1)
        return count.to(tl.float32) * 0.25


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """float32 -> TYPE, rounded to nearest even like the GPU. The interpreter's own conversion to bfloat16 truncates."""
    if INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300  # TYPE is not a constant, despite its capitals
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
        x = tl.where(x == x, up, bits).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def choose_least(keys, chosen, n, kept, BLOCK: tl.constexpr):
    """chosen (kept) i32 <- the places of the least of keys (n) i32, increasing; ties go to the lowest place. Keys are at least 0.
    The largest key that is kept is found digit by digit, from a histogram of the keys that share its leading digits. One
    program reads all keys STEPS + 1 times."""
    limit = 0
    wanted = tl.cast(kept, tl.int32)  # of the keys that begin with the digits of `limit`
    for step in tl.static_range(STEPS):
        counts = tl.zeros((BINS,), tl.int32)
        for first in range(0, n, BLOCK):
            i = first + tl.arange(0, BLOCK)
            leading = tl.load(keys + i, mask=i < n, other=0) >> ((STEPS - 1 - step) * DIGIT)
            same = (i < n) & ((leading >> DIGIT) == limit)
            counts += tl.histogram(leading & (BINS - 1), BINS, mask=same)
        upto = tl.cumsum(counts, axis=0)
        fewer = upto < wanted
        limit = limit * BINS + tl.sum(fewer.to(tl.int32), axis=0)
        wanted -= tl.max(tl.where(fewer, upto, 0), axis=0)
    done = 0
    equals = 0
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        key = tl.load(keys + i, mask=i < n, other=0)
        equal = ((i < n) & (key == limit)).to(tl.int32)
        rank = equals + tl.cumsum(equal, axis=0)
        taken = ((i < n) & (key < limit)) | ((equal != 0) & (rank <= wanted))
        place = done + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(chosen + place, i, mask=taken)
        equals += tl.sum(equal, axis=0)
        done += tl.sum(taken.to(tl.int32), axis=0)
