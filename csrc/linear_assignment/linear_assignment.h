// One-to-one assignment of least total cost, exact, in double precision. One task per image.
#pragma once

#include "common/cuda.h"

namespace sprompt {

// rows (B, G) i64, contiguous <- cost (B, N, G) f32/bf16/f16/f64, any strides; counts (B) i64, or none (all G columns are
// real). cost (N, G) is one image. rows[b, g] is the row matched to column g. It is -1 where g >= counts[b], and where column g
// gets no row because counts[b] > N. Entries of padded columns are not read. An image with a NaN or an infinity among its real
// entries, or with a count outside [0, G], gets -2 in all its columns. Returns the first such image, or -1.
SPROMPT_KERNEL_OF(int64_t, linear_assignment, const View& cost, const View& counts, const View& rows, int threads)

// CUDA: the same, but it returns nothing, and cost must have a batch dimension. scratch (B, s) u8, contiguous, aligned to 16
// bytes. assignment_scratch in sprompt/ops/linear_assignment/cuda.py computes s.
SPROMPT_CUDA_KERNEL(linear_assignment, const View& cost, const View& counts, const View& rows, const View& scratch)

}  // namespace sprompt
