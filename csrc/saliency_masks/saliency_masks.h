// Saliency proposals: maps of seed vectors over feature maps, cut at a threshold into bits. B images, D channels,
// P = height * width cells, M seeds, n = ceil(P / 32) words. Norm is the min-max of a map over the valid cells.
//
// features (B, D, P) f32/bf16/f16, last stride 1; valid (B, P) b8, last stride 1, or none (every cell).
// grid_height = 0: the seeds of the pyramid (scales 1, 1/2, 1/4 in that order, each row by row); else the means over the
// windows of adaptive pooling to grid_height x grid_width.
//
// About `held` products are held at a time. The pyramid holds up to four times as many, the whole Gram matrix, whose other half
// it then does not compute; where that is more it goes by stripes of rows of cells.
#pragma once

#include "common/views.h"

namespace sprompt {

// words (B, M, n) i32, areas (B, M) i64 and scores (B, M) f32 (mean of the map over its bits) of every seed's map, bit =
// [Norm(map) >= threshold]. All 0 where a map is flat, not finite or has fewer than min_area bits, or its seed is not valid.
SPROMPT_KERNEL(saliency_bits, const View& features, const View& valid, int64_t height, int64_t width, int64_t grid_height,
               int64_t grid_width, bool cosine, float threshold, int64_t min_area, int64_t held, const View& words,
               const View& areas, const View& scores, int threads)

// maps (B, K, P) of the features' type: Norm(map) of the seeds with the addresses (B, K, 3) i64 (scale, row, column),
// 0 where the scale is -1; equal to the bit to what saliency_bits compared.
SPROMPT_KERNEL(saliency_soft, const View& features, const View& valid, int64_t height, int64_t width, int64_t grid_height,
               int64_t grid_width, bool cosine, const View& addresses, int64_t held, const View& maps, int threads)

// maps (B, M, P) of the features' type: Norm(map) of the seeds (B, M, D), same type, last stride 1.
SPROMPT_KERNEL(saliency_maps, const View& features, const View& valid, const View& seeds, bool cosine, int64_t held,
               const View& maps, int threads)

}  // namespace sprompt
