// Dice of the maxima of rows and of columns of masks, against those of boxes, and its gradient. One task per map.
#pragma once

#include "common/views.h"

namespace sprompt {

// loss (B) f32, slopes (B, h + w) f32 and places (B, h + w) i32, contiguous <- masks and boxes (B, h, w), each f32/bf16/f16,
// last stride 1; h, w < 2^31. places: the lowest column of each row's maximum, then the lowest row of each column's. NaN is the
// largest number. slopes: of the loss by these maxima. Without pixels the loss is 2, slopes and places are 0.
SPROMPT_KERNEL(projection_loss, const View& masks, const View& boxes, const View& loss, const View& slopes, const View& places,
               int threads)

// out (B, h, w) f32/bf16/f16, contiguous <- grad (B) f32, any stride; slopes and places (B, h + w), contiguous.
SPROMPT_KERNEL(projection_loss_backward, const View& grad, const View& slopes, const View& places, const View& out, int threads)

}  // namespace sprompt
