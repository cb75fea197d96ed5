#include "common/threads.h"
#include "prompts/lanes.h"
#include "prompts/prompts.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr float epsilon = 1e-8f;
constexpr int64_t slots = 20;             // of the sequential and random assignments
constexpr int64_t kernel_block = 32;      // kernels a job
constexpr int64_t prompt_block = 256;     // prompts whose norms are held at a time

// max(|x|, 1e-8) of x[C].
template <class T>
static float norm(const T* x, int64_t C) {
    vf acc = {};
    int64_t c = 0;
    for (; c + W <= C; c += W) {
        const vf v = load_as_float(x + c);
        acc = fma(v, v, acc);
    }
    if (c < C) {
        const vf v = load_some(x + c, C - c);
        acc = fma(v, v, acc);
    }
    const float length = __builtin_sqrtf(sum(acc));
    return length < epsilon ? epsilon : length;
}

// Lane 4 j + i is <k[i], p[j]>: 4 kernels x 2 prompts, all of C elements.
template <class T>
SPROMPT_INLINE v8f products(const T* const* k, const T* const* p, int64_t C) {
    vf acc[8] = {};
    const auto step = [&](const vf* x, const vf* y) {
        for (int j = 0; j < 2; ++j)
            for (int i = 0; i < 4; ++i) acc[4 * j + i] = fma(x[i], y[j], acc[4 * j + i]);
    };
    int64_t c = 0;
    for (; c + W <= C; c += W) {
        const vf x[4] = {load_as_float(k[0] + c), load_as_float(k[1] + c), load_as_float(k[2] + c), load_as_float(k[3] + c)};
        const vf y[2] = {load_as_float(p[0] + c), load_as_float(p[1] + c)};
        step(x, y);
    }
    if (c < C) {
        const int64_t left = C - c;
        const vf x[4] = {load_some(k[0] + c, left), load_some(k[1] + c, left), load_some(k[2] + c, left), load_some(k[3] + c, left)};
        const vf y[2] = {load_some(p[0] + c, left), load_some(p[1] + c, left)};
        step(x, y);
    }
    return sum_each(acc);
}

// Best prompts of 4 kernels so far: lanes 0-3 among the even prompts, lanes 4-7 among the odd ones.
struct Best {
    v8f similarity;
    v8i index;
};

// Most similar of prompts p (L, C) for kernels k (n, C), n <= 32, into index[n]. A NaN never wins; nobody wins: prompt 0.
template <class T>
static void match_cosine(const T* k, int64_t k_stride, int64_t n, const T* p, int64_t p_stride, int64_t L, int64_t C, int64_t* index) {
    float kernel_norm[kernel_block], prompt_norm[prompt_block];
    Best best[kernel_block / 4];
    for (int64_t i = 0; i < n; ++i) kernel_norm[i] = norm(k + i * k_stride, C);
    for (Best& b : best) b = {v8f{} - __builtin_inff(), v8i{}};
    for (int64_t first = 0; first < L; first += prompt_block) {
        const int64_t last = first + prompt_block < L ? first + prompt_block : L;
        for (int64_t l = first; l < last; ++l) prompt_norm[l - first] = norm(p + l * p_stride, C);
        for (int64_t tile = 0; 4 * tile < n; ++tile) {
            const T* kernel[4];
            v8f scale;
            for (int64_t i = 0; i < 4; ++i) {  // behind the last kernel: the last again, and not read
                const int64_t row = 4 * tile + i < n ? 4 * tile + i : n - 1;
                kernel[i] = k + row * k_stride;
                scale[i] = scale[i + 4] = kernel_norm[row];
            }
            Best b = best[tile];
            for (int64_t l = first; l < last; l += 2) {
                const int64_t next = l + 1 < last ? l + 1 : l;
                const T* const prompt[2] = {p + l * p_stride, p + next * p_stride};
                const v8f x = v8f{} + prompt_norm[l - first], y = v8f{} + prompt_norm[next - first];
                const v8i odd = {0, 0, 0, 0, -1, -1, -1, -1};
                const v8f both = (v8f)((~odd & (v8i)x) | (odd & (v8i)y));
                const v8f similarity = products(kernel, prompt, C) / (scale * both);
                const v8i better = similarity > b.similarity;
                const v8i here = (~odd & static_cast<int32_t>(l)) | (odd & static_cast<int32_t>(next));
                b.similarity = (v8f)((better & (v8i)similarity) | (~better & (v8i)b.similarity));
                b.index = (better & here) | (~better & b.index);
            }
            best[tile] = b;
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const Best& b = best[i / 4];
        const int64_t even = i % 4, odd = even + 4;
        const bool take_odd = b.similarity[odd] > b.similarity[even] || (b.similarity[odd] == b.similarity[even] && b.index[odd] < b.index[even]);
        index[i] = b.index[take_odd ? odd : even];
    }
}

// Prompt of slot t when L prompts share the slots: each L / 20 times in a row, the rest of the slots are the first prompts.
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
static void match(const View& kernels, const View& prompts, const View& counts, const View& keep, const View& order, bool cosine,
                  const View& out, const View& index, int threads) {
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

void prompt_match(const View& kernels, const View& prompts, const View& counts, const View& keep, const View& order, bool cosine,
                  const View& out, const View& index, int threads) {
    SPROMPT_FLOAT_TYPES(out.dtype, T, match<T>(kernels, prompts, counts, keep, order, cosine, out, index, threads))
}

template <class T>
static void match_backward(const View& grad, const View& index, const View& sums, const View& out, int threads) {
    constexpr int64_t chunk = 128;  // channels a job: its part of 20 prompts stays in the nearest cache
    const int64_t N = grad.size[1], L = out.size[1], C = out.size[2], chunks = (C + chunk - 1) / chunk;
    const View& total = sums.given() ? sums : out;
    parallel_for(out.size[0] * chunks, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / chunks, c0 = job % chunks * chunk, width = C - c0 < chunk ? C - c0 : chunk;
            float* to = total.as<float>() + b * L * C + c0;
            for (int64_t l = 0; l < L; ++l) __builtin_memset(to + l * C, 0, static_cast<size_t>(4 * width));
            for (int64_t n = 0; n < N; ++n) {
                const int64_t l = index.as<const int64_t>()[b * N + n];
                if (l < 0 || l >= L) continue;
                const T* g = grad.as<const T>() + b * grad.stride[0] + n * grad.stride[1] + c0;
                float* row = to + l * C;
                int64_t c = 0;
                for (; c + W <= width; c += W) store(row + c, load(row + c) + load_as_float(g + c));
                for (; c < width; ++c) row[c] += to_float(g[c]);
            }
            if (sums.given())
                for (int64_t l = 0; l < L; ++l) row_from_float(to + l * C, width, out.as<T>() + (b * L + l) * C + c0);
        }
    });
}

void prompt_match_backward(const View& grad, const View& index, const View& sums, const View& out, int threads) {
    SPROMPT_FLOAT_TYPES(out.dtype, T, match_backward<T>(grad, index, sums, out, threads))
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
