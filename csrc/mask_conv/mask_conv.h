// Dynamic 1x1 convolution, hard mask pooling, both in one read of the features, and their gradients.
// B images, N kernels or masks, C channels, P pixels, n = ceil(P / 32) words. T is f32, bf16 or f16, one type for all that
// say T; sums are in float. Last strides are 1, the others are free unless a size below says "contiguous".
#pragma once

#include "common/views.h"

namespace sprompt {

// logits (B, N, P) T = kernels (B, N, C) T times features (B, C, P) T; words (B, N, n) u32, contiguous, set where the
// stored logits are > 0; pooled (B, N, C) T, contiguous: sum of the features under the words.
// Without kernels and logits (not given) the words are an input, and only the pooling is done.
// Without words and pooled only the product is done.
SPROMPT_KERNEL(mask_update, const View& features, const View& kernels, const View& logits, const View& words,
               const View& pooled, int threads)

// grad_features (B, C, P) T = kernels^T grad_logits + words^T grad_pooled, and grad_kernels (B, N, C) T, contiguous,
// = grad_logits features^T. grad_logits (B, N, P) T; grad_pooled (B, N, C) T; kernels (B, N, C) T; words (B, N, n) u32.
// What is not given is left out: grad_logits (with kernels) or grad_pooled (with words); grad_features; grad_kernels (with
// features).
SPROMPT_KERNEL(mask_update_backward, const View& grad_logits, const View& grad_pooled, const View& features,
               const View& kernels, const View& words, const View& grad_features, const View& grad_kernels, int threads)

}  // namespace sprompt
