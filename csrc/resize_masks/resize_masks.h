// Resizes masks by bilinear interpolation and a threshold, directly to bits.
//
// An axis has `cells` cells. Its first `extent` cells (a real number) become `size` pixels. All in double:
//   s(x) = (x + 1/2) * (extent / size) - 1/2, clamped to [0, cells - 1];   k = floor(s)
//   w1 = float(s - k), w0 = 1 - w1 (float); first = k, or k + 1 where w0 is 0; second = k + 1, or k where w1 is 0.
// Pixel (y, x), in float, in this order, without fused operations (so every backend agrees to the bit):
//   h(r) = cell(r, first(x)) * w0(x) + cell(r, second(x)) * w1(x)
//   bit  = h(first(y)) * w0(y) + h(second(y)) * w1(y) > threshold
// Cells beyond +-2^127, and the infinities, count as +-2^127, so nothing overflows. A pixel that gives weight to a NaN cell is
// not set.
//
// Two maps in a row: all cells become `via` cells, and the first `extent` of these (a whole number) become `size` pixels, each
// by the rule of s(x) with weights 1 - (s - k) and s - k, in double. So a pixel has up to four cells on an axis: lower and
// upper cell of its lower via cell, then of its upper via cell. Their weights are products, in double. A cell that comes twice
// counts at its first place, with the sum of both weights. The weights are then rounded to float. h(r) and the sum over rows
// add the cells with a weight in this order.
#pragma once

#include "common/cuda.h"

namespace sprompt {

// words (M, n) i32, contiguous, n = ceil(height * width / 32) <- soft (M, h, w) f32/bf16/f16, any strides. Where words
// are not empty, h and w are at least 1. One map: via_height and via_width are 0, extent_height lies in (0, h] and
// extent_width in (0, w]. Two maps: the extents are whole numbers in [1, via_height] and [1, via_width].
// sums (M) f32 and areas (M) i64, or none: sums of 1 / (1 + e^-z) over the set pixels, where z is the pixel's value, and the
// numbers of set pixels. A sum has an error of at most 2^-17 of itself, besides that of the values.
SPROMPT_KERNEL(resize_masks, const View& soft, int64_t height, int64_t width, float threshold, double extent_height,
               double extent_width, int64_t via_height, int64_t via_width, const View& words, const View& sums,
               const View& areas, int threads)

// One map from bits: cells are 0 or 1, the threshold lies in [0, 1), the extent is the whole map. words (M, n) <- in (M,
// ceil(h * w / 32)) i32.
SPROMPT_KERNEL(resize_bits, const View& in, int64_t h, int64_t w, int64_t height, int64_t width, float threshold,
               const View& words, int threads)

// Pixel (y, x) of words is set where one of the cells that it covers is. On an axis of `cells` cells and `size` pixels, pixel x
// covers [floor(x cells / size), ceil((x + 1) cells / size)). Nearest: it covers one cell, min(floor(float(x) * (float(cells)
// / float(size))), cells - 1) in float.
SPROMPT_KERNEL(cover_bits, const View& in, int64_t h, int64_t w, int64_t height, int64_t width, bool nearest, const View& words,
               int threads)

// CUDA: one map, no sums. words are contiguous. scratch (2 * (width + height)) i32, aligned to 8 bytes.
SPROMPT_CUDA_KERNEL(resize_masks, const View& soft, int64_t height, int64_t width, float threshold, double extent_height,
                    double extent_width, const View& words, const View& scratch)

// CUDA: both are contiguous. scratch (2 * (width + height)) i32, aligned to 8 bytes.
SPROMPT_CUDA_KERNEL(resize_bits, const View& in, int64_t h, int64_t w, int64_t height, int64_t width, float threshold,
                    const View& words)
SPROMPT_CUDA_KERNEL(cover_bits, const View& in, int64_t h, int64_t w, int64_t height, int64_t width, bool nearest,
                    const View& words, const View& scratch)

}  // namespace sprompt
