// Mean-field iterations on crops: which pixels are foreground. One task (or block) per crop.
#pragma once

#include "common/cuda.h"

namespace sprompt {

// words (B, ceil(h w / 32)) i32, contiguous <- images (B, 3, h, w), start and boxes (B, h, w), each f32/bf16/f16, any strides
// but a last stride of 1; (h + 2)(w + 2) < 2^31. With w the weights exp(factor |difference of colours|^2) of the 8 neighbours
// (0 outside the map, and where it is NaN), A u = u + sum of w u, and t = box: z is log(x / (1 - x)), at first of x = start t
// limited to [low, high]. Then `iterations` times, for all pixels together,
//     z <- log t + A z - softplus(A softplus(z) + epsilon), limited to [least, most].
// Bits are set where z > 0. Where t < 2^-126 or NaN, z is `least`. 0 < low <= 1/2 <= high < 1, and least <= 0 <= most.
// Arithmetic equals sprompt/ops/mean_field/reference.py to the bit.
SPROMPT_KERNEL(mean_field, const View& images, const View& start, const View& boxes, int64_t iterations, double factor,
               double low, double high, double least, double most, double epsilon, const View& words, int threads)

// CUDA: the same, for any strides, in one launch. scratch (B, s) u8, contiguous. scratch_bytes in
// sprompt/ops/mean_field/cuda.py computes s, a multiple of 4.
SPROMPT_CUDA_KERNEL(mean_field, const View& images, const View& start, const View& boxes, int64_t iterations, double factor,
                    double low, double high, double least, double most, double epsilon, const View& words, const View& scratch)

}  // namespace sprompt
