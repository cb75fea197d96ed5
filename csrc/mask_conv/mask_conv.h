// Dynamic 1x1 convolution, hard mask pooling, both in one read of the features, and their gradients. B images, N kernels or
// masks, C channels, P pixels, n = ceil(P / 32) words. T is f32, bf16 or f16, the same type for all arguments marked T. Sums
// are in float. Last strides are 1. Other strides are free unless an argument below is marked "contiguous".
#pragma once

#include "common/views.h"

namespace sprompt {

// logits (B, N, P) T = kernels (B, N, C) T times features (B, C, P) T; words (B, N, n) u32, contiguous, set where the
// stored logits are > 0; pooled (B, N, C) T, contiguous: sum of the features under the words.
// Without kernels and logits (not given) the words are an input, and the kernel only pools. Without words and pooled it only
// computes the product.
SPROMPT_KERNEL(mask_update, const View& features, const View& kernels, const View& logits, const View& words,
               const View& pooled, int threads)

// words (B, N, n) u32, contiguous: set where kernels (B, N, C) T times features (B, C, P) T, rounded to T, is >= 0.
SPROMPT_KERNEL(mask_bits, const View& features, const View& kernels, const View& words, int threads)

// grad_features (B, C, P) T = kernels^T grad_logits + words^T grad_pooled, and grad_kernels (B, N, C) T, contiguous,
// = grad_logits features^T. grad_logits (B, N, P) T; grad_pooled (B, N, C) T; kernels (B, N, C) T; words (B, N, n) u32.
// These arguments may be missing: grad_logits (then also kernels) or grad_pooled (then also words); grad_features; grad_kernels
// (then also features). A missing gradient adds nothing, and a missing output is not computed.
SPROMPT_KERNEL(mask_update_backward, const View& grad_logits, const View& grad_pooled, const View& features,
               const View& kernels, const View& words, const View& grad_features, const View& grad_kernels, int threads)

}  // namespace sprompt
