// Packs masks to bits, and computes areas, boxes, IoU and windows of bit masks. R rows of masks, P = H * W pixels, n = ceil(P /
// 32) words.
#pragma once

#include "common/cuda.h"

namespace sprompt {

// words (R, n) u32 <- pixels (R, P), last stride 1: set where a u8/i8/b8 pixel is not 0, or an f32/bf16/f16 pixel > threshold.
SPROMPT_KERNEL(pack_masks, const View& pixels, float threshold, const View& words, int threads)

// pixels (R, P) b8, contiguous <- words (R, n).
SPROMPT_KERNEL(unpack_masks, const View& words, const View& pixels, int threads)

// area (R) i64 <- words (R, n).
SPROMPT_KERNEL(mask_area, const View& words, const View& area, int threads)

// boxes (R, 4) i64: x1, y1, x2, y2, exclusive ends, zeros for an empty mask <- words (R, n) of rows of `width` pixels.
SPROMPT_KERNEL(mask_boxes, const View& words, int64_t width, const View& boxes, int threads)

// iou (B, N, M) f32 or f64 <- a (B, N, n), b (B, M, n) of rows of `width` pixels. It is 0 where both are empty. If b is none, b
// is a.
SPROMPT_KERNEL(mask_iou, const View& a, const View& b, int64_t width, const View& iou, int threads)

// out (R, n') <- words (R, n) of height x width pixels: the window of out_height x out_width pixels with top-left corner (top,
// left). The window may reach outside the mask; pixels outside are 0. `flip` mirrors the window's columns.
SPROMPT_KERNEL(window_masks, const View& words, int64_t height, int64_t width, int64_t top, int64_t left, int64_t out_height,
               int64_t out_width, bool flip, const View& out, int threads)

// -- CUDA: the same. All tensors are contiguous, except the pixels of pack_masks (last stride 1).

SPROMPT_CUDA_KERNEL(pack_masks, const View& pixels, float threshold, const View& words)
SPROMPT_CUDA_KERNEL(unpack_masks, const View& words, const View& pixels)
SPROMPT_CUDA_KERNEL(mask_area, const View& words, const View& area)
SPROMPT_CUDA_KERNEL(mask_boxes, const View& words, int64_t width, const View& boxes)
// Scratch: areas (B, N + M) i64, or (B, N) if b is a.
SPROMPT_CUDA_KERNEL(mask_iou, const View& a, const View& b, const View& areas, const View& iou)
SPROMPT_CUDA_KERNEL(window_masks, const View& words, int64_t height, int64_t width, int64_t top, int64_t left,
                    int64_t out_height, int64_t out_width, bool flip, const View& out)

}  // namespace sprompt
