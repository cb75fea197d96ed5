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
#pragma once

#include "common/cuda.h"

namespace sprompt {

// words (M, n) i32, contiguous, n = ceil(height * width / 32) <- soft (M, h, w) f32/bf16/f16, any strides. Where words
// are not empty, h and w are at least 1. extent_height in (0, h], extent_width in (0, w].
SPROMPT_KERNEL(resize_masks, const View& soft, int64_t height, int64_t width, float threshold, double extent_height,
               double extent_width, const View& words, int threads)

// The same from bits: cells are 0 or 1, the threshold is 1/2, the extent is the whole map. words (M, n) <- in (M, ceil(h * w /
// 32)) i32.
SPROMPT_KERNEL(resize_bits, const View& in, int64_t h, int64_t w, int64_t height, int64_t width, const View& words, int threads)

// CUDA: words are contiguous. scratch (2 * (width + height)) i32, aligned to 8 bytes.
SPROMPT_CUDA_KERNEL(resize_masks, const View& soft, int64_t height, int64_t width, float threshold, double extent_height,
                    double extent_width, const View& words, const View& scratch)

// CUDA: both are contiguous.
SPROMPT_CUDA_KERNEL(resize_bits, const View& in, int64_t h, int64_t w, int64_t height, int64_t width, const View& words)

}  // namespace sprompt
