// Masked attention and its gradients. B images, H heads, N queries, S keys, D channels, n = ceil(S / 32) words. T is f32, bf16
// or f16, the same type for all arguments marked T. Last strides are 1; other strides are free unless an argument is marked
// "contiguous". words (B or 1, N, n) u32 say which keys a query attends; without them (not given) it attends all. A query
// without a set bit attends all keys if empty_all, else none.
//
// Keys are cut into chunks, and chunks into blocks of 512 keys. A task owns one chunk of one image, for some or all heads, and
// goes over its queries. So every key belongs to one task, which adds the gradients of its key and value in the order of the
// queries, without atomics. Sums over keys (results and gradients of queries) are kept per chunk and added in order. The cut
// depends only on the shape.
#pragma once

#include "common/views.h"

namespace sprompt {

// out (B, H, N, D) T, contiguous, and logsum (B, H, N) f32, contiguous <- query (B, H, N, D) T, key and value (B, H, S, D) T:
// the mean of the values with the weights exp(score - logsum) and scores scale <query, key>; logsum = log of the sum of
// exp(score). A query that attends no key gives out = 0 and logsum = 0.
SPROMPT_KERNEL(mask_attention, const View& query, const View& key, const View& value, const View& words, double scale,
               bool empty_all, const View& out, const View& logsum, int threads)

// grad_query, grad_key, grad_value: T, contiguous, of the shapes of query, key and value <- grad (B, H, N, D) T and the inputs
// and outputs of mask_attention; logsum is contiguous.
SPROMPT_KERNEL(mask_attention_backward, const View& grad, const View& query, const View& key, const View& value,
               const View& words, const View& out, const View& logsum, double scale, bool empty_all, const View& grad_query,
               const View& grad_key, const View& grad_value, int threads)

}  // namespace sprompt
