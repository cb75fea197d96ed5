// Means of samples of a pyramid inside the bins of boxes. B pictures, N boxes, C channels, V levels, R x R bins of S x S
// samples. T is f32, bf16 or f16, the same type for all arguments marked T.
//
//   maps    V tensors (B, C, h, w) T; h and w are below 2^23
//   boxes   (B, N, 4) f32, contiguous: x1, y1, x2, y2 in pixels
//   counts  (B) i64, any stride, in [0, N], or none
//   strides (V) i64, contiguous: pixels of a cell
//
// A box is read from one level. The two axes are separate: a bin is the sum over rows and columns of the product of their
// weights. First the rows of a bin are summed, for each column that has a weight, then the columns.
#pragma once

#include "common/cuda.h"

namespace sprompt {

// out (B, N, C, R, R) T, contiguous. Maps have stride 1 along rows or along channels.
SPROMPT_KERNEL(roi_align, const Views& maps, const View& boxes, const View& counts, const View& strides, int64_t sampling,
               const View& out, int threads)

// out: V tensors (B, C, h, w) T, contiguous <- grad (B, N, C, R, R) T, contiguous. The sum of every cell is in float, by
// increasing box.
SPROMPT_KERNEL(roi_align_backward, const View& grad, const View& boxes, const View& counts, const View& strides,
               int64_t sampling, const Views& out, int threads)

// CUDA: the same, and maps may have any strides. strides is in the host's memory. R is at most 256, and R * S at most 1024.
SPROMPT_CUDA_KERNEL(roi_align, const Views& maps, const View& boxes, const View& counts, const View& strides, int64_t sampling,
                    const View& out)
SPROMPT_CUDA_KERNEL(roi_align_backward, const View& grad, const View& boxes, const View& counts, const View& strides,
                    int64_t sampling, const Views& out)

}  // namespace sprompt
