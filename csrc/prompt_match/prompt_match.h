// Finds a prompt for every kernel, and adds it to the kernel. B images, N kernels, L prompts, C channels.
#pragma once

#include "common/views.h"

namespace sprompt {

// out (B, N, C), contiguous, index (B, N) i64, contiguous <- kernels (B, N, C) or (N, C), prompts (B, L, C), both of out's
// type with last stride 1; counts (B) i64 or none; keep (B, N) b8, contiguous, or none; order (N) i64 or none.
// cosine: index = the first largest <k, p> / (max(|k|, 1e-8) max(|p|, 1e-8)) in float32; a NaN counts as -inf. Every product is
// summed in the same order at every place, so equal prompts tie. Not cosine: index = prompt of slot order[n] * 20 / N (order
// none: n). Index is -1 where counts is 0 or keep is false. out = kernel + prompt[index], or the kernel where the index is -1.
SPROMPT_KERNEL(prompt_match, const View& kernels, const View& prompts, const View& counts, const View& keep, const View& order,
               bool cosine, const View& out, const View& index, int threads)

// out (B, L, C), contiguous <- grad (B, N, C) of out's type, last stride 1; index (B, N) i64, contiguous, in [-1, L):
// out[b, l] = sum of grad[b, n] over index[b, n] = l, in float32, by increasing n.
SPROMPT_KERNEL(prompt_match_backward, const View& grad, const View& index, const View& out, int threads)

}  // namespace sprompt
