// Means of features over boxes and over masks. B images, L boxes or masks, C channels, a map of H x W cells.
//
// The means work on runs. A run is W cells of one row of the map, packed as offset << 16 | lanes. `offset` is the distance of
// its first cell from the start of a channel's plane, in elements. Bit i of `lanes` says whether cell i of the run counts. The
// runs are listed once per call and read once per block of channels, so the cost grows with the number of cells that count. The
// sum over one box or mask is in float32: W partial sums side by side, runs in reading order, lanes added at the end.
#pragma once

#include "common/views.h"

namespace sprompt {

// out (B, L, C), contiguous, of features' type <- features (B, C, H, W) f32/bf16/f16 with stride 1 along rows or along
// channels; boxes (B, L, 4) f32/f64/i64, contiguous: x1, y1, x2, y2 in cells; counts (B) i64 or none, in [0, L].
// Returns -1. If a real box is not finite, returns b * L + l of the first such box and writes nothing.
SPROMPT_KERNEL_OF(int64_t, region_mean, const View& features, const View& boxes, const View& counts, const View& out,
                  int threads)

// out (B, L, C) as above <- features as above, words (B, L, n) u32, contiguous. Empty masks give 0.
SPROMPT_KERNEL(mask_mean, const View& features, const View& words, const View& out, int threads)

// out (B, C, H, W), contiguous <- grad (B, L, C) of out's type, any strides. The sum of every cell is in float32, in the order
// of the boxes.
SPROMPT_KERNEL(region_mean_backward, const View& grad, const View& boxes, const View& counts, const View& out, int threads)
SPROMPT_KERNEL(mask_mean_backward, const View& grad, const View& words, const View& out, int threads)

}  // namespace sprompt
