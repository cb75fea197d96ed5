// Greedy and matrix non-maximum suppression of bit masks. B images, N masks per image, n words per mask.
//
// Masks are visited by decreasing score. Ties go by lower index, and a NaN counts as -inf. IoU is the float64 quotient of exact
// counts, and 0 where both masks are empty. Cheap bounds decide most pairs without a count. The bounds are conservative, so the
// results are the same as if every pair were counted, with any number of threads.
#pragma once

#include "common/cuda.h"

namespace sprompt {

// keep (B, K) i64: indices of the first K kept masks by decreasing score, padded with -1; kept (B) i64: how many
// <- words (B, N, n) u32, last stride 1; scores (B, N) f32/bf16/f16; counts (B) i64 or none: how many masks are real.
// A mask is removed if its IoU with a mask kept before it is > threshold. threshold is in [0, 1]. Empty masks are not kept.
SPROMPT_KERNEL(mask_nms, const View& words, const View& scores, const View& counts, double threshold, const View& keep,
               const View& kept, int threads)

// out (B, N), contiguous, of the dtype of scores: scores[j] * decay[j], 0 where padded
// <- words (B, N, n) u32, last stride 1; scores (B, N) f32/bf16/f16; labels (B, N) i64 or none; counts (B) i64 or none.
// Over pairs i < j of one label: c[j] = max iou[i, j];
// gaussian: decay[j] = exp(-sigma * max(0, max(iou[i, j]^2 - c[i]^2))),
// otherwise decay[j] = min(1, min((1 - iou[i, j]) / max(1 - c[i], 1e-6))).
SPROMPT_KERNEL(matrix_nms, const View& words, const View& scores, const View& labels, const View& counts, bool gaussian,
               double sigma, const View& out, int threads)

// -- CUDA: the same, with counts clamped to [0, N]. keep, kept, out and the scratch are contiguous. W = ceil(N / 32).

// Scratch: order (B, N) i64, area (B, N) i32, removed (B, W) i32, bits (B, R, W) i32 with R a multiple of 32 up to 2048. `bits`
// holds, for R masks at a time, the masks that each of them would remove.
SPROMPT_CUDA_KERNEL(mask_nms, const View& words, const View& scores, const View& counts, double threshold, const View& keep,
                    const View& kept, const View& order, const View& area, const View& removed, const View& bits)

// Scratch: order and area as above; extremes (2, B, N) i64 for c and the decay; pairs (B, S, S) i16 or i32 with S a multiple of
// 32, for the counts of all pairs of S masks at a time. i16 is enough if a mask has less than 2^16 pixels.
SPROMPT_CUDA_KERNEL(matrix_nms, const View& words, const View& scores, const View& labels, const View& counts, bool gaussian,
                    double sigma, const View& out, const View& order, const View& area, const View& extremes, const View& pairs)

}  // namespace sprompt
