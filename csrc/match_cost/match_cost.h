// The matching cost of N predicted masks with G targets, per image. With H = u h, W = u w (u: upsample), P = H W, z the
// upsampled logits, p = sigmoid(z), t the target, q the probability of the target's class:
//     class = -0.25 (1 - q)^2 log(q + 1e-12) + 0.75 q^2 log(1 - q + 1e-12)
//     bce   = -(sum(p t) + sum((1 - p)(1 - t))) / P = -(P - sum(p) - sum(t) + 2 sum(p t)) / P
//     dice  = -2 sum(p t) / (sum(p^2) + sum(t^2) + 2e-3)
#pragma once

#include "common/views.h"

namespace sprompt {

// cost (B, N, G) f32, contiguous, 0 where g >= counts[b]
// <- logits (B, N, h, w) f32/bf16/f16, last stride 1; targets (B, G, H, W) u8/b8/f32/bf16/f16, last stride 1 (ratio 0), or
// words (B, G, n) i32, last stride 1, of masks of ratio H x ratio W pixels, ratio 1, 2, 4; class_logits (B, N, K) f32/bf16/f16
// and labels (B, G) i64 in [0, K) where g < counts[b], or neither; counts (B) i64 or none.
SPROMPT_KERNEL(match_cost, const View& logits, const View& targets, int64_t ratio, const View& class_logits, const View& labels,
               const View& counts, float class_weight, float bce_weight, float dice_weight, int64_t upsample, const View& cost,
               int threads)

}  // namespace sprompt
