// Crops of masks to squares of shares, and soft squares pasted into pictures.
//
// crop_masks. An axis of a box goes from `low` to `high`, and has size * g samples, g = ceil((high - low) / size). All in
// double:
//   s(j) = (low - 1/2) + (j + 1/2) * step,   step = (high - low) / (size * g)
// A sample below -1 or above `pixels` has no weight. Others are clamped to [0, pixels - 1]; k = floor(s), and the sample gives
// pixel k + 1 the weight u = floor((s - k) * unit + 1/2), and pixel k the weight unit - u. `unit` is the largest power of 2
// with g * unit <= 2^26. The weight of a pixel in part p is the sum over the samples [p * g, (p + 1) * g). An output is the sum
// of row weight * column weight over the set pixels, a whole number up to 2^52, divided in double by (g * unit of the rows) *
// (g * unit of the columns), and rounded to float. So every order of sums gives the same bits. A box is not cropped, and its
// output is 0, unless low < high, |low| <= 2^24 and |high| <= 2^24 on both axes.
//
// paste_masks. Pixel x of an axis lies over the map of `cells` cells at
//   s(x) = ((x + 1/2) - low) * (cells / (high - low)) - 1/2   in double
// It is not set unless -1 < s < cells on both axes, and high - low > 0 and finite. k = floor(s), w1 = float(s - k), w0 = 1 -
// w1; a cell outside of the map gets weight 0, and a cell of weight 0 is replaced by the other cell. As in resize_masks.h:
// cells are clamped to +-2^127, and in float, in this order, without fused operations:
//   h(r) = cell(r, first(x)) * w0(x) + cell(r, second(x)) * w1(x)
//   bit  = h(first(y)) * w0(y) + h(second(y)) * w1(y) > threshold
#pragma once

#include "common/cuda.h"

namespace sprompt {

// out (B * N, size, size) f32, contiguous. words (B * G, n) i32, contiguous; boxes (B * N, 4) f32 or f64, contiguous; index
// (B * N) i64, contiguous. Row r of boxes is of image r / `boxes_per_image`, whose masks are G = `masks_per_image` rows of
// words. An index outside of [0, G) gives zeros.
SPROMPT_KERNEL(crop_masks, const View& words, const View& boxes, const View& index, int64_t masks_per_image,
               int64_t boxes_per_image, int64_t height, int64_t width, int64_t size, const View& out, int threads)

// words (N, n) i32, contiguous, n = ceil(height * width / 32) <- soft (N, s, s) f32/bf16/f16, any strides, and boxes (N, 4) f32
// or f64, contiguous. threshold >= 0. Where words are not empty, s is at least 1.
SPROMPT_KERNEL(paste_masks, const View& soft, const View& boxes, int64_t height, int64_t width, float threshold,
               const View& words, int threads)

SPROMPT_CUDA_KERNEL(crop_masks, const View& words, const View& boxes, const View& index, int64_t masks_per_image,
                    int64_t boxes_per_image, int64_t height, int64_t width, int64_t size, const View& out)
SPROMPT_CUDA_KERNEL(paste_masks, const View& soft, const View& boxes, int64_t height, int64_t width, float threshold,
                    const View& words)

}  // namespace sprompt
