"""Triton functions that several kernels share. Imported by the rooms' triton.py only."""

import triton
import triton.language as tl
from triton import knobs

#: Triton's interpreter keeps bfloat16 as bare 16-bit patterns, which numpy cannot multiply.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


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
def sigmoid(x):
    """1 / (1 + e^-x) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """float32 -> TYPE, to nearest even, as the GPU rounds; the interpreter's own conversion to bfloat16 cuts off."""
    if INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
        x = tl.where(x == x, up, bits).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(TYPE)
