// Prompts and their matching. B images, N kernels, L prompts (boxes, masks), C channels, a map of H x W cells.
//
// The means work on runs. A run is W lanes of one row of the map, packed as offset << 16 | lanes: `offset` is that of its
// first cell from the start of a channel's plane, in elements, bit i of `lanes` says whether cell i of the run counts.
// runs (B, L, H * ceil(W / 4)) i64 and heads (B, L, 3) i64 (runs, leading runs whose W lanes may all be read, cells) are
// scratch, filled once per call and read once per block of channels, so the cost follows the cells that count.
// The sum over one box or mask is in float32, W partial sums side by side, runs in reading order, lanes added at the end.
#pragma once

#include "common/views.h"

namespace sprompt {

// out (B, L, C), contiguous, of features' type <- features (B, C, H, W) f32/bf16/f16, whose rows or whose channels have
// stride 1; boxes (B, L, 4) f32/f64/i64, contiguous: x1, y1, x2, y2 in cells; counts (B) i64 or none, in [0, L].
// problem (1) i64: 0, or 1 + b * L + l of the first real box that is not finite; then nothing else is written.
SPROMPT_KERNEL(region_mean, const View& features, const View& boxes, const View& counts, const View& runs, const View& heads,
               const View& problem, const View& out, int threads)

// out (B, L, C) as above <- features as above, words (B, L, n) u32, contiguous. Empty masks give 0.
SPROMPT_KERNEL(mask_mean, const View& features, const View& words, const View& runs, const View& heads, const View& out,
               int threads)

// out (B, C, H, W), contiguous <- grad (B, L, C) of out's type, any strides. sums (threads, 4 * H * W) f32 is scratch of
// half types, none for f32. Every cell's sum is in float32, in the order of the boxes.
SPROMPT_KERNEL(region_mean_backward, const View& grad, const View& boxes, const View& counts, const View& runs,
               const View& heads, const View& sums, const View& out, int threads)
SPROMPT_KERNEL(mask_mean_backward, const View& grad, const View& words, const View& runs, const View& heads, const View& sums,
               const View& out, int threads)

// out (B, N, C), contiguous, index (B, N) i64, contiguous <- kernels (B, N, C) or (N, C), prompts (B, L, C), both of out's
// type with last stride 1; counts (B) i64 or none; keep (B, N) b8, contiguous, or none; order (N) i64 or none.
// cosine: index = the first largest <k, p> / (max(|k|, 1e-8) max(|p|, 1e-8)) in float32; a NaN counts as -inf. Every
// product is summed in one order, wherever it stands, so equal prompts tie. Else index = prompt of slot order[n] * 20 / N
// (order none: n). Index is -1 where counts is 0 or keep is false. out = kernel + prompt[index], or the kernel.
SPROMPT_KERNEL(prompt_match, const View& kernels, const View& prompts, const View& counts, const View& keep, const View& order,
               bool cosine, const View& out, const View& index, int threads)

// out (B, L, C), contiguous <- grad (B, N, C) of out's type, last stride 1; index (B, N) i64, contiguous, in [-1, L):
// out[b, l] = sum of grad[b, n] over index[b, n] = l, in float32, by increasing n. sums (B, L, C) f32 is scratch of half types.
SPROMPT_KERNEL(prompt_match_backward, const View& grad, const View& index, const View& sums, const View& out, int threads)

}  // namespace sprompt
