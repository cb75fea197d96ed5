#include "common/lanes.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "prompt_match/prompt_match.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr float epsilon = 1e-8f;
constexpr int64_t slots = 20;          // of the sequential and random assignments
constexpr int64_t kernel_block = 32;   // kernels per job
constexpr int64_t prompt_block = 255;  // prompts whose norms are held at a time, a multiple of 3

// Calls f(row) for every vector of C elements. row(i) is that vector of row x[i], with zeros behind the last element.
template <class T, class F>
SPROMPT_INLINE void for_each_vector(int64_t C, const T* const* x, const F& f) {
    int64_t c = 0;
    for (; c + W <= C; c += W) f([&](int i) { return load_as_float(x[i] + c); });
    if (c < C) f([&](int i) { return load_some(x[i] + c, C - c); });
}

// Lane i is max(|row i|, 1e-8).
template <class T>
SPROMPT_INLINE v4f norms(const T* const* rows, int64_t C) {
    vf acc[4] = {};
    for_each_vector(C, rows, [&](const auto& row) {
        for (int i = 0; i < 4; ++i) {
            const vf v = row(i);
            acc[i] = fma(v, v, acc[i]);
        }
    });
    v4f length = sum_four(acc);
    for (int i = 0; i < 4; ++i) {
        const float root = __builtin_sqrtf(length[i]);
        length[i] = root < epsilon ? epsilon : root;
    }
    return length;
}
// norm[n] of the rows x (n, C), n > 0. The last row is repeated up to a multiple of 4, so that tiles are always whole.
template <class T>
static void row_norms(const T* x, int64_t stride, int64_t n, int64_t C, float* norm) {
    for (int64_t first = 0; first < n; first += 4) {
        const T* rows[4];
        for (int64_t i = 0; i < 4; ++i) rows[i] = x + (first + i < n ? first + i : n - 1) * stride;
        const v4f length = norms(rows, C);
        __builtin_memcpy(norm + first, &length, sizeof length);
    }
}

// Lane i of dot[j] is <k[i], p[j]>. The rows are k[4], p[3].
template <class T>
SPROMPT_INLINE void products(const T* const* rows, int64_t C, v4f* dot) {
    vf acc[12] = {};
    for_each_vector(C, rows, [&](const auto& row) {
        const vf y[3] = {row(4), row(5), row(6)};
        for (int i = 0; i < 4; ++i) {
            const vf x = row(i);
            for (int j = 0; j < 3; ++j) acc[4 * j + i] = fma(x, y[j], acc[4 * j + i]);
        }
    });
    for (int j = 0; j < 3; ++j) dot[j] = sum_four(acc + 4 * j);
}

SPROMPT_INLINE v4i choose(v4i condition, v4i yes, v4i no) { return (condition & yes) | (~condition & no); }

// index[n] <- the most similar of prompts p (L, C), L > 0, for each kernel of k (n, C), 0 < n <= 32. A NaN is never the most
// similar. If all are NaN, the index is 0.
template <class T>
static void match_cosine(const T* k, int64_t k_stride, int64_t n, const T* p, int64_t p_stride, int64_t L, int64_t C,
                         int64_t* index) {
    float kernel_norm[kernel_block], prompt_norm[prompt_block + 1];
    v4f best[kernel_block / 4];
    v4i which[kernel_block / 4];
    row_norms(k, k_stride, n, C, kernel_norm);
    for (int64_t tile = 0; 4 * tile < n; ++tile) {
        best[tile] = v4f{} - __builtin_inff();
        which[tile] = v4i{};
    }
    for (int64_t first = 0; first < L; first += prompt_block) {
        const int64_t last = first + prompt_block < L ? first + prompt_block : L;
        row_norms(p + first * p_stride, p_stride, last - first, C, prompt_norm);
        for (int64_t tile = 0; 4 * tile < n; ++tile) {
            const T* rows[7];
            for (int64_t i = 0; i < 4; ++i) rows[i] = k + (4 * tile + i < n ? 4 * tile + i : n - 1) * k_stride;
            v4f scale;
            __builtin_memcpy(&scale, kernel_norm + 4 * tile, sizeof scale);
            for (int64_t l = first; l < last; l += 3) {
                const auto place = [&](int64_t j) {
                    return l + j < last ? l + j : last - 1;
                };  // repeats the last prompt: a tie does not replace the best
                for (int64_t j = 0; j < 3; ++j) rows[4 + j] = p + place(j) * p_stride;
                v4f dot[3];
                products(rows, C, dot);
                for (int64_t j = 0; j < 3; ++j) {
                    const v4f similarity = dot[j] / (scale * prompt_norm[place(j) - first]);
                    const v4i better = similarity > best[tile];
                    best[tile] = (v4f)choose(better, (v4i)similarity, (v4i)best[tile]);
                    which[tile] = choose(better, v4i{} + static_cast<int32_t>(place(j)), which[tile]);
                }
            }
        }
    }
    for (int64_t i = 0; i < n; ++i) index[i] = which[i / 4][i % 4];
}

// The prompt of slot t when L prompts share the 20 slots. Each prompt has 20 / L slots in a row. The rest of the slots take the
// first prompts.
static int64_t prompt_of_slot(int64_t t, int64_t L) {
    const int64_t each = slots / L;
    return t < each * L ? t / each : t - each * L;
}

template <class T>
static void add_rows(const T* x, const T* y, int64_t C, T* out) {
    int64_t c = 0;
    for (; c + W <= C; c += W) store_float(out + c, load_as_float(x + c) + load_as_float(y + c));
    for (; c < C; ++c) from_float(to_float(x[c]) + to_float(y[c]), out + c);
}

template <class T>
static void match(const View& kernels, const View& prompts, const View& counts, const View& keep, const View& order,
                  bool cosine, const View& out, const View& index, int threads) {
    const int64_t N = out.size[1], C = out.size[2], blocks = (N + kernel_block - 1) / kernel_block;
    const int64_t k_batch = kernels.rank == 3 ? kernels.stride[0] : 0, k_stride = kernels.stride[kernels.rank - 2];
    parallel_for(out.size[0] * blocks, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / blocks, n0 = job % blocks * kernel_block, n = N - n0 < kernel_block ? N - n0 : kernel_block;
            const int64_t L = counts.given() ? counts.as<const int64_t>()[b * counts.stride[0]] : prompts.size[1];
            const T* k = kernels.as<const T>() + b * k_batch + n0 * k_stride;
            const T* p = prompts.as<const T>() + b * prompts.stride[0];
            T* to = out.as<T>() + (b * N + n0) * C;
            int64_t* at = index.as<int64_t>() + b * N + n0;
            if (L <= 0)
                for (int64_t i = 0; i < n; ++i) at[i] = -1;
            else if (cosine)
                match_cosine(k, k_stride, n, p, prompts.stride[1], L, C, at);
            else
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t turn = order.given() ? order.as<const int64_t>()[(n0 + i) * order.stride[0]] : n0 + i;
                    at[i] = prompt_of_slot(turn * slots / N, L);
                }
            for (int64_t i = 0; i < n; ++i) {
                if (keep.given() && !keep.as<const uint8_t>()[b * N + n0 + i]) at[i] = -1;
                if (at[i] < 0)
                    __builtin_memcpy(to + i * C, k + i * k_stride, static_cast<size_t>(C) * sizeof(T));
                else
                    add_rows(k + i * k_stride, p + at[i] * prompts.stride[1], C, to + i * C);
            }
        }
    });
}

void prompt_match(const View& kernels, const View& prompts, const View& counts, const View& keep, const View& order,
                  bool cosine, const View& out, const View& index, int threads) {
    SPROMPT_FLOAT_TYPES(out.dtype, T, match<T>(kernels, prompts, counts, keep, order, cosine, out, index, threads))
}

template <class T>
static void match_backward(const View& grad, const View& index, const View& out, int threads) {
    constexpr int64_t chunk = 128;  // channels per job: this part of 20 prompts stays in the L1 cache
    const int64_t N = grad.size[1], L = out.size[1], C = out.size[2], chunks = (C + chunk - 1) / chunk;
    constexpr bool in_place = sizeof(T) == sizeof(float);
    const int64_t stride = in_place ? C : chunk;
    Scratch memory;
    float* sums = memory.take<float>(in_place ? 0 : threads, L, chunk);
    parallel_for(out.size[0] * chunks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / chunks, c0 = job % chunks * chunk, width = C - c0 < chunk ? C - c0 : chunk;
            float* to = in_place ? out.as<float>() + b * L * C + c0 : sums + worker * L * chunk;
            for (int64_t l = 0; l < L; ++l) __builtin_memset(to + l * stride, 0, static_cast<size_t>(4 * width));
            for (int64_t n = 0; n < N; ++n) {
                const int64_t l = index.as<const int64_t>()[b * N + n];
                if (l < 0 || l >= L) continue;
                const T* g = grad.as<const T>() + b * grad.stride[0] + n * grad.stride[1] + c0;
                float* row = to + l * stride;
                int64_t c = 0;
                for (; c + W <= width; c += W) store(row + c, load(row + c) + load_as_float(g + c));
                for (; c < width; ++c) row[c] += to_float(g[c]);
            }
            if (!in_place)
                for (int64_t l = 0; l < L; ++l) row_from_float(to + l * stride, width, out.as<T>() + (b * L + l) * C + c0);
        }
    });
}

void prompt_match_backward(const View& grad, const View& index, const View& out, int threads) {
    SPROMPT_FLOAT_TYPES(out.dtype, T, match_backward<T>(grad, index, out, threads))
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
