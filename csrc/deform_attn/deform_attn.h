// The core of multi-scale deformable attention: weighted sums of bilinear samples of a pyramid. B images, S cells, H heads of D
// channels, Q queries, V levels, P points of a query and head. T is f32, bf16 or f16, the same type for all arguments marked T.
//
//   values  (B, S, H, D) T, last stride 1, the cells of all levels one after the other
//   points  (B, Q, H, 2P) T or f32, last stride 1: x, y of every point, from 0 to 1 over the map of its level
//   weights (B, Q, H, P) T or f32, last stride 1
//   levels  (V, 3) i64, contiguous: h, w and the number of points of every level. h and w are below 2^31. S and P are their
//   sums
#pragma once

#include "common/cuda.h"

namespace sprompt {

// out (B, Q, H * D) T, contiguous: the sum over the points of weight times sample, in float.
SPROMPT_KERNEL(deform_attn, const View& values, const View& points, const View& weights, const View& levels, const View& out,
               int threads)

// The gradients of values, points and weights, contiguous and in the dtypes of their tensors <- grad (B, Q, H * D) T, last
// stride 1. A gradient that is not given is not computed. Infinity in grad counts as NaN. The sums of to_values are in float,
// by increasing query, then point.
SPROMPT_KERNEL(deform_attn_backward, const View& grad, const View& values, const View& points, const View& weights,
               const View& levels, const View& to_values, const View& to_points, const View& to_weights, int threads)

// CUDA: the same. values has rows of D elements and strides that are multiples of 16 bytes if 16 bytes divide a row, and then
// its memory begins at a multiple of 16 bytes. levels is in the host's memory and has at most 64 rows.
SPROMPT_CUDA_KERNEL(deform_attn, const View& values, const View& points, const View& weights, const View& levels,
                    const View& out)

// CUDA: the same; grad is laid out like values. sums (B, S, H, D) i64 and limits (B, H, 2) i32 are contiguous scratch memory
// that holds zeros; sums is needed for to_values only. The sums of to_values are in fixed point. With fewer than 2^n products
// in a sum (Q times the points of a level), the unit is at most 2^(n - 60) of the largest product of a gradient and a weight
// of the head. A product that is not finite gives NaN.
SPROMPT_CUDA_KERNEL(deform_attn_backward, const View& grad, const View& values, const View& points, const View& weights,
                    const View& levels, const View& to_values, const View& to_points, const View& to_weights, const View& sums,
                    const View& limits)

}  // namespace sprompt
