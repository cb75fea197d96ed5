// Maps and masks at points. A point (x, y) lies at (x w - 0.5, y h - 0.5) in a map of h x w cells; its value is interpolated
// along x, a + f (b - a), then along y. Cells outside of the map are 0. A NaN point is 0.
//
// In this file: B images, N maps of h x w cells f32/bf16/f16, last stride 1; G targets of `height` x `width` pixels, words i32,
// last stride 1; T points f32 (.., T, 2), contiguous. Points that are not given are drawn (common/philox.h) from `seed`, i64,
// one number. Maps and masks have less than 2^30 cells, and there are less than 2^30 points.
#pragma once

#include "common/views.h"

namespace sprompt {

// out (B, N, T), contiguous, in the dtype of maps <- maps (B, N, h, w), points (B, T, 2).
SPROMPT_KERNEL(sample_points, const View& maps, const View& points, const View& out, int threads)

// out (B, N, T) f32, contiguous <- words (B, N, n), points (B, T, 2).
SPROMPT_KERNEL(sample_bits, const View& words, const View& points, int64_t height, int64_t width, const View& out, int threads)

// out (B, N, h, w), contiguous, <- grad (B, N, T) of the same dtype, last stride 1; points (B, T, 2). Sums are in float, by
// increasing T.
SPROMPT_KERNEL(sample_points_backward, const View& grad, const View& points, const View& out, int threads)

// cost (B, N, G) f32, contiguous, 0 where g >= counts[b] <- maps (B, N, h, w), the logits; or maps (B, C, h, w) and kernels
// (B, N, C) f32/bf16/f16 of the logits kernels maps. words (B, G, n); counts (B) i64 or none; points (B, T, 2) or seed. With z
// the logits and t the targets at T = `number` points, p = sigmoid(z):
//     bce = sum(log(1 + e^z) - z t) / T      dice = 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1)
SPROMPT_KERNEL(point_cost, const View& maps, const View& kernels, const View& words, int64_t height, int64_t width,
               const View& counts, const View& seed, const View& points, int64_t number, float bce_weight, float dice_weight,
               const View& cost, int threads)

// bce (M), dice (M), sums (M, 2) f32: sum(p t), sum(p) + sum(t); chosen (M, kept) i32, increasing: the points of least |z|
// among points 0 .. drawn - 1, ties to the lowest index, NaN first. The losses are those above of the chosen points and of the
// points drawn .. drawn + number - kept - 1. <- logits (M, h, w), words (M, n), points (M, drawn + number - kept, 2) or seed.
SPROMPT_KERNEL(point_loss, const View& logits, const View& words, int64_t height, int64_t width, const View& seed,
               const View& points, int64_t number, int64_t drawn, const View& bce, const View& dice, const View& chosen,
               const View& sums, int threads)

// grad (M, h, w), contiguous, in the dtype of logits <- grad_bce (M), grad_dice (M) f32, any stride, and the arguments and
// results of the forward call. The gradient of a mask is NaN if one of the two is not finite.
SPROMPT_KERNEL(point_loss_backward, const View& grad_bce, const View& grad_dice, const View& logits, const View& words,
               int64_t height, int64_t width, const View& seed, const View& points, const View& chosen, const View& sums,
               int64_t number, int64_t drawn, const View& grad, int threads)

}  // namespace sprompt
