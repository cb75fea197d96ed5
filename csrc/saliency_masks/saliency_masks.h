// Saliency proposals: maps of seed vectors over feature maps, turned into bits by a threshold. B images, D channels, P = height
// * width cells, M seeds, n = ceil(P / 32) words. Norm is the min-max normalisation of a map over the valid cells.
//
// features (B, D, P) f32/bf16/f16, last stride 1; valid (B, P) b8, last stride 1, or none (every cell).
// grid_height = 0: the seeds are those of the pyramid (scales 1, 1/2, 1/4 in that order, each row by row). grid_height > 0: the
// seeds are the means over the windows of adaptive pooling to grid_height x grid_width.
//
// About `held` products are held at a time. The pyramid holds the whole Gram matrix if that is at most four times as many
// products, and computes only one half of it. If the Gram matrix is larger, the pyramid works in stripes of rows of cells.
#pragma once

#include "common/views.h"

namespace sprompt {

// words (B, M, n) i32, areas (B, M) i64 and scores (B, M) f32 of every seed's map. A bit is [Norm(map) >= threshold]. A score
// is the mean of the map over its bits. All three are 0 where a map is flat, not finite or has fewer than min_area bits, or
// where its seed is not valid.
SPROMPT_KERNEL(saliency_bits, const View& features, const View& valid, int64_t height, int64_t width, int64_t grid_height,
               int64_t grid_width, bool cosine, float threshold, int64_t min_area, int64_t held, const View& words,
               const View& areas, const View& scores, int threads)

// maps (B, K, P) of the features' type: Norm(map) of the seeds with the addresses (B, K, 3) i64 (scale, row, column), 0 where
// the scale is -1. The values equal, to the bit, the values that saliency_bits compares.
SPROMPT_KERNEL(saliency_soft, const View& features, const View& valid, int64_t height, int64_t width, int64_t grid_height,
               int64_t grid_width, bool cosine, const View& addresses, int64_t held, const View& maps, int threads)

// maps (B, M, P) of the features' type: Norm(map) of the seeds (B, M, D) of the same type, last stride 1.
SPROMPT_KERNEL(saliency_maps, const View& features, const View& valid, const View& seeds, bool cosine, int64_t held,
               const View& maps, int threads)

}  // namespace sprompt
