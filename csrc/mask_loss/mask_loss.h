// Cross-entropy and dice of M masks, and their gradient. Each pixel of the logits and of the targets is read once. With H = u
// h, W = u w (u: upsample), z the upsampled logits, p = sigmoid(z), t the target:
//     bce = sum(max(z, 0) - z t + log(1 + e^-|z|)) / (H W)      dice = 1 - 2 sum(p t) / (sum(p^2) + sum(t^2) + 2e-3)
// The gradient recomputes p from the logits. It needs the targets and three sums per mask.
#pragma once

#include "common/views.h"

namespace sprompt {

// bce (M), dice (M), sums (M, 3) f32: sum(p t), sum(p^2), sum(t^2)
// <- logits (M, h, w) f32/bf16/f16, last stride 1; targets (M, H, W) u8/b8/f32/bf16/f16, last stride 1 (ratio 0), or words
// (M, n) i32 of masks of ratio H x ratio W pixels, ratio 1, 2, 4.
SPROMPT_KERNEL(mask_loss, const View& logits, const View& targets, int64_t ratio, int64_t upsample, const View& bce,
               const View& dice, const View& sums, int threads)

// grad (M, h, w), contiguous, in the dtype of logits <- grad_bce (M), grad_dice (M) f32, any stride, and the arguments and sums
// of the forward call.
SPROMPT_KERNEL(mask_loss_backward, const View& grad_bce, const View& grad_dice, const View& logits, const View& targets,
               const View& sums, int64_t ratio, int64_t upsample, const View& grad, int threads)

}  // namespace sprompt
