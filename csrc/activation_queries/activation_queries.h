// The cells of a map that become queries. B images, C channels (K = C - 1 classes, then "no object"), P cells in rows of w.
#pragma once

#include "common/views.h"

namespace sprompt {

// index, labels (B, count) i64 and scores (B, count) in the dtype of logits, contiguous <- logits (B, C, P) f32/bf16/f16, last
// stride 1; P < 2^30, C >= 2, count <= P. With k the class of a cell's largest logit (the lowest of equal ones) and a =
// softmax[k]: first the cells with a >= 1e-6 that have no neighbour (of 8) of the same k and larger a, then all others, each by
// decreasing a, then by cell. Cells whose a is NaN are last. Arithmetic equals the reference to the bit.
SPROMPT_KERNEL(activation_queries, const View& logits, int64_t w, const View& index, const View& scores, const View& labels,
               int threads)

}  // namespace sprompt
