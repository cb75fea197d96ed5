// Parts of masked attention that forward and backward share: the cut of the work, the keys of every query in one block, and
// packed rows.
//
// A block has up to 512 keys. A query is sparse or dense in a block. A sparse query takes its set keys one by one from a list;
// the list is made once and serves all heads. Dense queries are multiplied with all keys of the block in groups of up to MR
// rows that share each load of a key, and scores of other keys are dropped. Rows are float, zero behind D up to `padded`
// columns, a multiple of NR.
#pragma once

#include "common/bits.h"
#include "common/half.h"
#include "common/lanes.h"
#include "common/product.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "common/views.h"
#include "common/vmath.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr int64_t block = 512;                  // keys
constexpr int64_t list_step = 16;               // lists are filled up to a multiple of it
constexpr float none = -__builtin_huge_valf();  // no score
constexpr float least_exponent = -69.0f;

// A query is dense in a block if it attends more than 2/5 of its keys. On AVX-512 both ways take the same time there (measured
// with D = 32).
constexpr int64_t dense_part = 2, dense_of = 5;

struct Cut {
    int64_t B, H, N, S, D, padded, blocks, chunk, chunks, groups;  // blocks: in all; chunk: in blocks; groups: of heads

    // The chunks depend on the shape only. Heads are independent of each other, so the groups may depend on the threads.
    SPROMPT_INLINE Cut(const View& query, const View& key, int threads)
        : B(query.size[0]),
          H(query.size[1]),
          N(query.size[2]),
          S(key.size[2]),
          D(query.size[3]),
          padded(round_up(D > 0 ? D : 1, NR)) {
        blocks = (S + block - 1) / block;
        const int64_t images = B > 0 ? B : 1, wanted = images < 8 ? 8 / images : 1;
        chunk = blocks > wanted ? (blocks + wanted - 1) / wanted : 1;
        chunks = (blocks + chunk - 1) / chunk;
        const int64_t tasks = images * chunks, busy = 2 * threads;
        groups = tasks >= busy || tasks == 0 ? 1 : smaller((busy + tasks - 1) / tasks, H > 0 ? H : 1);
    }
    SPROMPT_INLINE int64_t tasks() const { return B * chunks * groups; }
    SPROMPT_INLINE int64_t rows() const { return B * H * N; }
    // The partial results of a task: row (image, chunk, head, query).
    SPROMPT_INLINE int64_t partial(int64_t b, int64_t c, int64_t h) const { return ((b * chunks + c) * H + h) * N; }
};

// One task: blocks [first, last) of an image, heads [head, heads).
struct Task {
    int64_t b, c, first, last, head, heads;

    SPROMPT_INLINE Task(const Cut& cut, int64_t task)
        : b(task / (cut.chunks * cut.groups)),
          c(task / cut.groups % cut.chunks),
          first(c * cut.chunk),
          last(smaller(first + cut.chunk, cut.blocks)),
          head(task % cut.groups * cut.H / cut.groups),
          heads((task % cut.groups + 1) * cut.H / cut.groups) {}
};

// Items of `size` numbers that are worth the start of a thread.
SPROMPT_INLINE int64_t grain_of(int64_t size) { return size < 1 << 18 ? (1 << 18) / (size > 0 ? size : 1) : 1; }

template <class T>
SPROMPT_INLINE T* row_of(const View& x, int64_t b, int64_t h, int64_t row) {
    return x.as<T>() + b * x.stride[0] + h * x.stride[1] + row * x.stride[2];
}

// rows (count, padded) <- count rows of x (B, H, ., D), times scale.
template <class T>
static void pack_rows(const View& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t padded, float scale,
                      float* rows) {
    const int64_t D = x.size[3];
    for (int64_t i = 0; i < count; ++i, rows += padded) {
        const T* in = row_of<const T>(x, b, h, first + i);
        int64_t d = 0;
        for (; d + W <= D; d += W) store(rows + d, load_as_float(in + d) * scale);
        if (d < D) {
            store(rows + d, load_some(in + d, D - d) * scale);
            d += W;
        }
        for (; d < padded; d += W) store(rows + d, vf{});
    }
}

// Fetches the keys and values of the next block or head into the L2 cache while the kernel works on the present ones.
template <class T>
struct Ahead {
    const View &key, &value;
    int64_t b, h, first, rows, share, row = 0;

    // The rows after those of block j and head h. They are fetched by `calls` calls.
    SPROMPT_INLINE Ahead(const Cut& cut, const Task& task, int64_t j, int64_t h_, int64_t calls, const View& key_,
                         const View& value_)
        : key(key_), value(value_), b(task.b), h(h_ + 1), first(j * block) {
        if (h == task.heads) {
            h = task.head;
            first = j + 1 < task.last ? first + block : cut.S;
        }
        rows = smaller(cut.S - first, block);
        share = calls > 0 ? rows / calls + 1 : 0;
    }
    SPROMPT_INLINE void some(int64_t calls) {
        const int64_t end = smaller(row + calls * share, rows), bytes = key.size[3] * static_cast<int64_t>(sizeof(T));
        for (; row < end; ++row)
            for (int i = 0; i < 2; ++i) {
                const char* line = reinterpret_cast<const char*>(row_of<const T>(i == 0 ? key : value, b, h, first + row));
                for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(line + byte, 0, 2);
            }
    }
};

SPROMPT_INLINE void clear(float* x, int64_t n) { __builtin_memset(x, 0, n * 4); }

// rows [count, next multiple of NR) <- 0, and turned [slice][padded][NR]: the transposed rows in slices of NR keys.
static void turn_rows(float* rows, int64_t count, int64_t padded, float* turned) {
    const int64_t slices = (count + NR - 1) / NR;
    clear(rows + count * padded, (slices * NR - count) * padded);
    for (int64_t s = 0; s < slices; ++s)
        for (int i = 0; i < NR; i += W)
            for (int64_t d = 0; d < padded; d += W)
                transpose(rows + (s * NR + i) * padded + d, padded, turned + (s * padded + d) * NR + i, NR);
}

// The keys of one block that each query attends.
struct Attended {
    uint16_t* lists;          // (N, block): the places of the set keys of sparse queries, filled up with the first
    int32_t* counts;          // (N)
    int32_t *sparse, *dense;  // queries, in order
    int64_t sparse_count, dense_count;

    static SPROMPT_INLINE int64_t ints(int64_t N) { return round_up(N * block / 2 + 3 * N, 16); }
    SPROMPT_INLINE Attended(int32_t* memory, int64_t N)
        : lists(reinterpret_cast<uint16_t*>(memory)),
          counts(memory + N * block / 2),
          sparse(counts + N),
          dense(sparse + N),
          sparse_count(0),
          dense_count(0) {}
    SPROMPT_INLINE int64_t queries() const { return sparse_count + dense_count; }
};

struct Masks {
    const uint32_t* words = nullptr;  // null: every query attends all keys
    int64_t image = 0, row = 0, n = 0, N = 0;
    bool empty_all;
    uint8_t* empty = nullptr;  // (B or 1, N): whether a query has no set bit

    SPROMPT_INLINE Masks(const View& view, bool all) : empty_all(all) {
        if (!view.given()) return;
        words = view.as<const uint32_t>();
        n = view.size[2];
        N = view.size[1];
        row = view.stride[1];
        image = view.size[0] > 1 ? view.stride[0] : 0;
    }
    SPROMPT_INLINE const uint32_t* of(int64_t b, int64_t i) const { return words + b * image + i * row; }
    SPROMPT_INLINE bool is_empty(int64_t b, int64_t i) const { return empty[image != 0 ? b * N + i : i] != 0; }
    // Whether query i of image b attends all keys.
    SPROMPT_INLINE bool whole(int64_t b, int64_t i) const { return words == nullptr || (empty_all && is_empty(b, i)); }

    void find_empty(int64_t B, int threads, Scratch& memory) {
        if (words == nullptr) return;
        const int64_t images = image != 0 ? B : 1;
        empty = memory.take<uint8_t>(images, N);
        parallel_for(images * N, grain_of(n), threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) {
                const uint32_t* bits = of(i / N, i % N);
                int64_t w = 0;
                while (w < n && bits[w] == 0) ++w;
                empty[i] = w == n;
            }
        });
    }

    // Lists the keys [first, first + length) of every query. `first` is a multiple of 32.
    void list(int64_t b, int64_t queries, int64_t first, int64_t length, Attended& out) const {
        out.sparse_count = out.dense_count = 0;
        const int64_t block_words = words_for(length);
        for (int64_t i = 0; i < queries; ++i) {
            if (whole(b, i)) {
                out.dense[out.dense_count++] = static_cast<int32_t>(i);
                continue;
            }
            const uint32_t* bits = of(b, i) + first / 32;
            const int64_t count = count_bits(bits, block_words);
            if (count == 0) continue;
            if (count * dense_of > length * dense_part) {
                out.dense[out.dense_count++] = static_cast<int32_t>(i);
                continue;
            }
            out.sparse[out.sparse_count++] = static_cast<int32_t>(i);
            out.counts[i] = static_cast<int32_t>(count);
            uint16_t* list = out.lists + i * block;
            int64_t k = 0;
            for_each_bit(bits, block_words, [&](int64_t p) { list[k++] = static_cast<uint16_t>(p); });
            for (; k % list_step != 0; ++k) list[k] = list[0];
        }
    }
    // The bits of W keys from `place` on, of a dense query in the block of `length` keys that begins at `first`.
    SPROMPT_INLINE uint32_t lanes(int64_t b, int64_t i, int64_t first, int64_t length, int64_t place, bool all) const {
        if (all) return static_cast<uint32_t>(low_bits(smaller(length - place, W)));
        return of(b, i)[(first + place) / 32] >> (place % 32) & static_cast<uint32_t>(low_bits(W));
    }
};

SPROMPT_INLINE vf choose(uint32_t lanes, vf yes, vf no) {
#if defined(__AVX512F__)
    return (vf)_mm512_mask_blend_ps(static_cast<__mmask16>(lanes), (__m512)no, (__m512)yes);
#else
    vi bit;
    for (int i = 0; i < W; ++i) bit[i] = 1 << i;
    return select((broadcast(static_cast<int32_t>(lanes)) & bit) != 0, yes, no);
#endif
}

// e^(x - top), for scores x below top + 80. It is 0 where it is below 1e-30, because products with smaller weights would be
// denormal numbers, which take a CPU a hundred times as long.
SPROMPT_INLINE vf weight(vf x, vf top) {
    const vf exponent = x - top, least = broadcast(least_exponent);
    const vf e = exp_small(max_or_second(least, exponent));
    return bits_to_float(bits_to_int(e) & ~(exponent < least));
}

// f of all lanes: halves first.
template <class F>
SPROMPT_INLINE float across(vf v, const F& f) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m512 x = (__m512)v;
    const __m256 eight = f(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
#else
    const __m256 eight = (__m256)v;
#endif
    v4f four = (v4f)f(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
    v4f four = v;
#endif
    four = (v4f)f(four, v4f{four[2], four[3], four[2], four[3]});
    return f(four, v4f{four[1], four[1], four[1], four[1]})[0];
}
SPROMPT_INLINE float sum_of(vf v) {
    return across(v, [](auto a, auto b) { return a + b; });
}
// The largest lane. NaN may be passed over.
SPROMPT_INLINE float largest(vf v) {
    return across(v, [](auto a, auto b) { return a > b ? a : b; });
}

// scores [0, count), filled up to a multiple of 8: the products of a row with the listed rows.
SPROMPT_INLINE void products_of_list(const float* row, const float* rows, int64_t padded, const uint16_t* list, int64_t count,
                                     float* scores) {
    constexpr int step = 8;
    for (int64_t k = 0; k < count; k += step) {
        vf dot[step];
#pragma GCC unroll 8
        for (int i = 0; i < step; ++i) {
            const float* other = rows + list[k + i] * padded;
            dot[i] = fma(load(row + W), load(other + W), load(row) * load(other));
        }
        for (int64_t d = NR; d < padded; d += NR)
#pragma GCC unroll 8
            for (int i = 0; i < step; ++i) {
                const float* other = rows + list[k + i] * padded + d;
                dot[i] = fma(load(row + d + W), load(other + W), fma(load(row + d), load(other), dot[i]));
            }
        const v8f sums = sum_eight(dot);
        __builtin_memcpy(scores + k, &sums, sizeof sums);
    }
}

// c (rows, NR) = a (rows, depth) b (depth, NR) with a as [k][rows] and b as [k][NR].
template <int R = MR>
SPROMPT_INLINE void product_of_columns(int64_t rows, const float* a, const float* b, int64_t depth, float* c,
                                       int64_t c_stride) {
    if (rows == R) return product_tile<R, 1, R, false>(a, b, NR, depth, c, c_stride);
    if constexpr (R > 1) product_of_columns<R - 1>(rows, a, b, depth, c, c_stride);
}
// c (rows, NR) = a b with a as rows of `block` numbers.
template <int R = MR>
SPROMPT_INLINE void product_over_keys(int64_t rows, const float* a, const float* b, int64_t b_stride, int64_t depth, float* c) {
    if (rows == R) return product_tile<R, block, 1, false>(a, b, b_stride, depth, c, NR);
    if constexpr (R > 1) product_over_keys<R - 1>(rows, a, b, b_stride, depth, c);
}

// columns [d][count] <- the listed rows of rows (., padded).
SPROMPT_INLINE void pack_columns(const float* rows, int64_t padded, const int32_t* list, int64_t count, int64_t D,
                                 float* columns) {
    for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < D; ++d) columns[d * count + r] = rows[list[r] * padded + d];
}

// scores (count, block): the products of `count` rows, packed as columns, with the turned keys of a block.
SPROMPT_INLINE void products_of_block(const float* columns, int64_t count, const float* turned, int64_t length, int64_t D,
                                      int64_t padded, float* scores) {
    for (int64_t s = 0; s * NR < length; ++s)
        product_of_columns(count, columns, turned + s * padded * NR, D, scores + s * NR, block);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
