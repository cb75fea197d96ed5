#include "mask_conv/mask_conv.h"

#include "common/bits.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "mask_conv/pool.h"
#include "mask_conv/product.h"

namespace sprompt {
namespace SPROMPT_ISA {

template <class T>
constexpr bool by_pairs = false;
template <>
constexpr bool by_pairs<bf16> = bf16_pairs;

// ---- The product of one block, from register tiles to logits and words.

// Stores t <= NR sums of one row as logits. Returns their bits, computed from the stored (rounded) logits.
template <class T>
SPROMPT_INLINE uint32_t write_logits(const float* sums, int64_t t, T* out) {
    uint32_t bits = 0;
    if (t == NR) {
        for (int i = 0; i < NR; i += W) {
            store_float(out + i, load(sums + i));
            bits |= bits_greater(load_as_float(out + i), vf{}) << i;
        }
    } else {
        for (int64_t i = 0; i < t; ++i) {
            from_float(sums[i], out + i);
            bits |= static_cast<uint32_t>(to_float(out[i]) > 0.0f) << i;
        }
    }
    return bits;
}

// The bits of the first t <= NR sums of one row that are at least 0 after rounding to T.
template <class T>
SPROMPT_INLINE uint32_t sign_bits(const float* sums, int64_t t) {
    uint32_t bits = 0;
    for (int i = 0; i < NR; i += W) {
        T row[W];
        store_float(row, load(sums + i));
        bits |= bits_at_least(load_as_float(row), vf{}) << i;
    }
    return bits & static_cast<uint32_t>(low_bits(t));
}

// Writes logits (N, t) of the block, rows logits_stride apart, and words (N, n) at pixel p unless `words` is null. If `logits`
// is null, it writes only words, of logits >= 0.
template <class T>
static void block_product(const void* kernels, const void* packed, int64_t N, int64_t C, int64_t padded, int64_t t, T* logits,
                          int64_t logits_stride, uint32_t* words, int64_t n, int64_t p, Prefetch<T> next) {
    const Groups groups(N);
    const int64_t share = next.share(slices * groups.count);
    for (int64_t s = 0; s * NR < t; ++s) {
        const int64_t rest = smaller(t - s * NR, NR);
        for (int64_t g = 0; g < groups.count; ++g) {
            const int64_t first = groups.begin(g), rows = groups.begin(g + 1) - first;
            next.some(share);
            float tile[MR * NR];
            if constexpr (by_pairs<T>)
                product_of_pairs(rows, static_cast<const int32_t*>(kernels) + first * ((C + 1) / 2),
                                 static_cast<const int32_t*>(packed) + s * (padded / 2) * NR, (C + 1) / 2, tile);
            else
                product_of_group(rows, static_cast<const float*>(kernels) + first * C,
                                 static_cast<const float*>(packed) + s * padded * NR, C, tile);
            for (int64_t r = 0; r < rows; ++r) {
                const uint32_t bits = logits == nullptr
                                          ? sign_bits<T>(tile + r * NR, rest)
                                          : write_logits(tile + r * NR, rest, logits + (first + r) * logits_stride + s * NR);
                if (words == nullptr) continue;
                uint32_t* word = words + (first + r) * n + (p + s * NR) / 32;
                const int64_t shift = s * NR % 32;
                *word = shift == 0 ? bits : *word | bits << shift;
            }
        }
    }
}

SPROMPT_INLINE void clear(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(x + i, vf{});
}

// How the pixels of an image are cut into chunks: about 32 chunks in all, and at least 4 per image. Each chunk is work for one
// thread and has its own partial sums. Chunks are whole blocks. The cut depends only on the shape, so sums do not depend on the
// number of threads.
struct Cut {
    int64_t chunk, chunks;

    SPROMPT_INLINE Cut(int64_t images, int64_t P) {
        const int64_t wanted = images <= 8 ? 32 / (images > 0 ? images : 1) : 4;
        chunk = round_up(P > 0 ? (P + wanted - 1) / wanted : 1, block);
        chunks = (P + chunk - 1) / chunk;
    }
};

// out (B, N, C) contiguous <- the sum over K of partial (B, K, N, stride), in the order of the chunks.
template <class T>
static void sum_chunks(const float* partial, int64_t K, int64_t stride, const View& out, int threads) {
    const int64_t N = out.size[1], C = out.size[2];
    parallel_for(out.size[0] * N, 16, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const float* in = partial + (row / N * K * N + row % N) * stride;
            T* to = out.as<T>() + row * C;
            for (int64_t c = 0; c < C; c += W) {
                vf total = {};
                for (int64_t k = 0; k < K; ++k) total += load(in + k * N * stride + c);
                float lane[W];
                store(lane, total);
                row_from_float(lane, smaller(C - c, W), to + c);
            }
        }
    });
}

template <class T>
static void update(const View& features, const View& kernels, const View& logits, const View& words, const View& pooled,
                   int threads) {
    const int64_t B = features.size[0], C = features.size[1], P = features.size[2], n = words_for(P);
    const bool convolve = kernels.given(), pool = pooled.given();
    const int64_t N = convolve ? kernels.size[1] : words.size[1], padded = round_up(C, NR);
    const Cut cut(B, P);
    if (N == 0) return;
    const int64_t scratch_floats = round_up(block * padded + row_count * panel + block / 2 * padded + N + N * block / 4, 16);
    Scratch memory;
    float* packed = memory.take<float>(B, convolve ? N : 0, C);                // kernels, rearranged
    float* partial = memory.take<float>(B, pool ? cut.chunks : 0, N, padded);  // the sums of each chunk
    float* scratch = memory.take<float>(threads, scratch_floats);
    if (convolve)
        parallel_for(B, 1, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t image = begin; image < end; ++image) {
                const T* in = kernels.as<const T>() + image * kernels.stride[0];
                float* out = packed + image * N * C;
                if constexpr (by_pairs<T>)
                    pack_groups_of_pairs(in, kernels.stride[1], kernels.stride[2], N, C, reinterpret_cast<int32_t*>(out));
                else
                    pack_groups(in, kernels.stride[1], kernels.stride[2], N, C, out);
            }
        });
    parallel_for(B * cut.chunks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        float* block_of_features = scratch + worker * scratch_floats;  // packed, [slices][padded][NR]
        float* tile = block_of_features + block * padded;
        float* pairs = tile + row_count * panel;
        int32_t* counts = reinterpret_cast<int32_t*>(pairs + block / 2 * padded);
        uint8_t* lists = reinterpret_cast<uint8_t*>(counts + N);
        for (int64_t job = begin; job < end; ++job) {
            const int64_t image = job / cut.chunks, first = job % cut.chunks * cut.chunk, last = smaller(first + cut.chunk, P);
            const T* in = features.as<const T>() + image * features.stride[0];
            float* sums = partial + job * N * padded;
            T* out = logits.given() ? logits.as<T>() + image * logits.stride[0] : nullptr;
            uint32_t* bits = words.given() ? words.as<uint32_t>() + image * words.stride[0] : nullptr;
            if (pool) clear(sums, N * padded);
            for (int64_t p = first; p < last; p += block) {
                const int64_t t = smaller(last - p, block);
                bool with_sums = false;
                if (!convolve && !list_block(bits, words.stride[1], n, p, N, lists, counts, with_sums)) continue;
                pack_block(in + p, features.stride[1], C, padded, t, block_of_features);
                Prefetch<T> next(in + p + block, features.stride[1], C, smaller(last - p - block, block));
                if (convolve) {
                    const void* operand = block_of_features;
                    if constexpr (by_pairs<T>) {
                        pair_rows(block_of_features, padded, reinterpret_cast<int32_t*>(pairs));
                        operand = pairs;
                    }
                    block_product(static_cast<const void*>(packed + image * N * C), operand, N, C, padded, t,
                                  out == nullptr ? nullptr : out + p, logits.stride[1], bits, n, p, next);
                    next.rows = 0;
                    if (!pool || !list_block(bits, words.stride[1], n, p, N, lists, counts, with_sums)) continue;
                }
                block_pool(block_of_features, C, padded, N, lists, counts, with_sums, tile, sums, padded, next);
            }
        }
    });
    if (pool) sum_chunks<T>(partial, cut.chunks, padded, pooled, threads);
}

void mask_update(const View& features, const View& kernels, const View& logits, const View& words, const View& pooled,
                 int threads) {
    SPROMPT_FLOAT_TYPES(features.dtype, T, update<T>(features, kernels, logits, words, pooled, threads))
}

void mask_bits(const View& features, const View& kernels, const View& words, int threads) {
    SPROMPT_FLOAT_TYPES(features.dtype, T, update<T>(features, kernels, View{}, words, View{}, threads))
}

// ---- Gradients.

// addend (padded, 64) = words^T grad_pooled: for each pixel, the sum of the rows of grad_pooled (N, C') whose masks hold the
// pixel.
template <int V>
static void gather_rows(const float* rows, int64_t stride, const int32_t* lists, const int32_t* counts, int64_t N, int64_t t,
                        float* tile) {
    for (int64_t p = 0; p < t; ++p) {
        vf sum[V] = {};
        for (int32_t k = 0; k < counts[p]; ++k) {
            const float* row = rows + lists[p * N + k] * stride;
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[v] += load(row + v * W);
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(tile + p * panel + v * W, sum[v]);
    }
}
template <int V = 8>
SPROMPT_INLINE void gather_rows_of(int64_t width, const float* rows, int64_t stride, const int32_t* lists,
                                   const int32_t* counts, int64_t N, int64_t t, float* tile) {
    if (width == V * W) return gather_rows<V>(rows, stride, lists, counts, N, t, tile);
    if constexpr (V > 1) gather_rows_of<V - 1>(width, rows, stride, lists, counts, N, t, tile);
}

static bool block_scatter(const uint32_t* words, int64_t words_stride, int64_t n, int64_t p, int64_t t, int64_t N, int64_t C,
                          int64_t padded, const float* rows, int64_t stride, int32_t* lists, int32_t* counts, float* tile,
                          float* addend) {
    uint64_t any = 0;
    for (int64_t i = 0; i < block; ++i) counts[i] = 0;
    for (int64_t i = 0; i < N; ++i) {
        uint64_t m = block_bits(words + i * words_stride, n, p);
        any |= m;
        for (; m != 0; m &= m - 1) {
            const int64_t pixel = __builtin_ctzll(m);
            lists[pixel * N + counts[pixel]++] = static_cast<int32_t>(i);
        }
    }
    if (any == 0) return false;
    clear(tile, block * panel);
    for (int64_t c = 0; c < C; c += panel) {
        const int64_t width = smaller(padded - c, panel);
        gather_rows_of(width, rows + c, stride, lists, counts, N, t, tile);
        for (int64_t i = 0; i < block; i += W)
            for (int64_t k = 0; k < width; k += W) transpose(tile + i * panel + k, panel, addend + (c + k) * block + i, block);
    }
    return true;
}

template <class T>
SPROMPT_INLINE void write_row(const float* sums, const float* addend, int64_t t, T* out) {
    float row[NR];
    for (int i = 0; i < NR; i += W) {
        const vf v = addend == nullptr ? load(sums + i) : load(sums + i) + load(addend + i);
        if (t == NR)
            store_float(out + i, v);
        else
            store(row + i, v);
    }
    if (t < NR) row_from_float(row, t, out);
}

// out (C, t) = kernels^T (C, N) grad (N, t) + addend (C, 64), which may be null.
template <class T>
static void block_grad_features(const float* kernels, const float* grad, int64_t N, int64_t C, int64_t t, const float* addend,
                                T* out, int64_t out_stride, Prefetch<T> next) {
    const Groups groups(C);
    const int64_t share = next.share(slices * groups.count);
    for (int64_t s = 0; s * NR < t; ++s)
        for (int64_t g = 0; g < groups.count; ++g) {
            const int64_t first = groups.begin(g), rows = groups.begin(g + 1) - first;
            next.some(share);
            float tile[MR * NR];
            product_of_group(rows, kernels + first * N, grad + s * N * NR, N, tile);
            for (int64_t r = 0; r < rows; ++r)
                write_row(tile + r * NR, addend == nullptr ? nullptr : addend + (first + r) * block + s * NR,
                          smaller(t - s * NR, NR), out + (first + r) * out_stride + s * NR);
        }
}

// sums (N, C') += grad (N, 64) features^T (t, C).
template <class T>
static void block_grad_kernels(const float* grad, const float* packed, int64_t N, int64_t C, int64_t padded, int64_t t,
                               float* tile, float* sums, int64_t sums_stride, Prefetch<T> next) {
    const Groups groups(N);
    const int64_t share = next.share(padded / NR * groups.count);
    for (int64_t c = 0; c < C; c += panel) {
        const int64_t width = smaller(padded - c, panel);
        pixel_rows(packed, padded, c, width, tile);
        for (int64_t k = 0; k < width; k += NR)
            for (int64_t g = 0; g < groups.count; ++g) {
                const int64_t first = groups.begin(g), rows = groups.begin(g + 1) - first;
                next.some(share);
                product_over_pixels(rows, grad + first * block, tile + k, t, sums + first * sums_stride + c + k, sums_stride);
            }
    }
}

template <class T>
static void update_backward(const View& grad_logits, const View& grad_pooled, const View& features, const View& kernels,
                            const View& words, const View& grad_features, const View& grad_kernels, int threads) {
    const View& shape = grad_features.given() ? grad_features : features;
    const int64_t B = shape.size[0], C = shape.size[1], P = shape.size[2], n = words_for(P);
    const int64_t N = grad_logits.given() ? grad_logits.size[1] : grad_pooled.size[1];
    const int64_t padded = round_up(C, NR);
    const bool product = grad_logits.given() && grad_features.given();
    const Cut cut(B, P);
    const int64_t scratch_floats = round_up(2 * block * padded + block * panel + 3 * block * N + block, 16);
    Scratch memory;
    float* packed = memory.take<float>(B, product ? N : 0, C);                                 // kernels, rearranged
    float* pooled = memory.take<float>(B, grad_pooled.given() ? N : 0, padded);                // grad_pooled, zeros behind C
    float* partial = memory.take<float>(B, grad_kernels.given() ? cut.chunks : 0, N, padded);  // the sums of each chunk
    float* scratch = memory.take<float>(threads, scratch_floats);
    if (grad_pooled.given())
        for (int64_t row = 0; row < B * N; ++row) {
            float* out = pooled + row * padded;
            row_to_float(grad_pooled.as<const T>() + row / N * grad_pooled.stride[0] + row % N * grad_pooled.stride[1], C, out);
            for (int64_t c = C; c < padded; ++c) out[c] = 0.0f;
        }
    if (product)
        parallel_for(B, 1, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t image = begin; image < end; ++image)
                pack_groups(kernels.as<const T>() + image * kernels.stride[0], kernels.stride[2], kernels.stride[1], C, N,
                            packed + image * N * C);
        });
    parallel_for(B * cut.chunks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        float* block_of_features = scratch + worker * scratch_floats;  // packed, [slices][padded][NR]
        float* addend = block_of_features + block * padded;            // [padded][64]
        float* tile = addend + block * padded;                         // [64][panel]
        float* grad_rows = tile + block * panel;                       // [N][64]
        float* grad_packed = grad_rows + block * N;                    // packed, [slices][N][NR]
        int32_t* counts = reinterpret_cast<int32_t*>(grad_packed + block * N);
        int32_t* lists = counts + block;  // [64][N]
        for (int64_t job = begin; job < end; ++job) {
            const int64_t image = job / cut.chunks, first = job % cut.chunks * cut.chunk, last = smaller(first + cut.chunk, P);
            const T* grad = grad_logits.as<const T>() + image * grad_logits.stride[0];
            const T* features_of_image = features.as<const T>() + image * features.stride[0];
            float* sums = partial + job * N * padded;
            if (grad_kernels.given()) clear(sums, N * padded);
            for (int64_t p = first; p < last; p += block) {
                const int64_t t = smaller(last - p, block), following = smaller(last - p - block, block);
                const Prefetch<T> next_grad(grad + p + block, grad_logits.stride[1], N, following);
                const Prefetch<T> next_features(features_of_image + p + block, features.stride[1], C,
                                                grad_kernels.given() ? following : 0);
                if (grad_features.given()) {
                    bool add = false;
                    if (grad_pooled.given())
                        add = block_scatter(words.as<const uint32_t>() + image * words.stride[0], words.stride[1], n, p, t, N,
                                            C, padded, pooled + image * N * padded, padded, lists, counts, tile, addend);
                    T* out = grad_features.as<T>() + image * grad_features.stride[0] + p;
                    if (product) {
                        pack_block(grad + p, grad_logits.stride[1], N, N, t, grad_packed);
                        block_grad_features(packed + image * N * C, grad_packed, N, C, t, add ? addend : nullptr, out,
                                            grad_features.stride[1], next_features);
                    } else {
                        if (!add) clear(addend, block * padded);
                        for (int64_t c = 0; c < C; ++c)
                            row_from_float(addend + c * block, t, out + c * grad_features.stride[1]);
                    }
                }
                if (grad_kernels.given()) {
                    for (int64_t i = 0; i < N; ++i)
                        row_of_block(grad + i * grad_logits.stride[1] + p, t, grad_rows + i * block);
                    pack_block(features_of_image + p, features.stride[1], C, padded, t, block_of_features);
                    block_grad_kernels(grad_rows, block_of_features, N, C, padded, t, tile, sums, padded, next_grad);
                }
            }
        }
    });
    if (grad_kernels.given()) sum_chunks<T>(partial, cut.chunks, padded, grad_kernels, threads);
}

void mask_update_backward(const View& grad_logits, const View& grad_pooled, const View& features, const View& kernels,
                          const View& words, const View& grad_features, const View& grad_kernels, int threads) {
    const DType dtype = grad_features.given() ? grad_features.dtype : features.dtype;
    SPROMPT_FLOAT_TYPES(
        dtype, T, update_backward<T>(grad_logits, grad_pooled, features, kernels, words, grad_features, grad_kernels, threads))
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
