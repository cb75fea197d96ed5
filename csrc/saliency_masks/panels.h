// Products of packed columns, and the memory that they need. A matrix (D, columns) is stored as blocks of `depth` rows. A block
// is stored as panels of `panel` columns, row by row: [block][panel][row][column]. Every element of a product is one chain of
// fma over a block's rows, starting from 0. The sums of the blocks are added in order. So the bits of an element depend only on
// its two columns, not on its place or the number of threads, and <a, b> = <b, a> to the bit.
#pragma once

#include "common/half.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr int64_t panel = 3 * W;
constexpr int64_t depth = 128;         // a panel of a block is 12 kB on AVX2: two panels fit the L1 cache
constexpr int64_t group = 48;          // rows of a product per chunk of parallel work: 1, 2 or 4 panels
constexpr int tile = W == 16 ? 8 : 4;  // rows of a product held in registers, panel columns wide

struct Panels {
    float* data;
    int64_t rows, count;  // D; panels

    SPROMPT_INLINE int64_t blocks() const { return (rows + depth - 1) / depth; }
    SPROMPT_INLINE int64_t columns() const { return count * panel; }
    SPROMPT_INLINE int64_t rows_of(int64_t block) const { return rows - block * depth < depth ? rows - block * depth : depth; }
    SPROMPT_INLINE float* at(int64_t block, int64_t index) const {
        return data + block * depth * columns() + index * rows_of(block) * panel;
    }
};
static Panels take_panels(Scratch& memory, int64_t rows, int64_t columns) {
    const int64_t count = (columns + panel - 1) / panel;
    return {memory.take<float>(rows, count * panel), rows, count};
}

// c (tile, panel) = a' b over `rows` rows of two panels, plus c if `add`. `a` points to the tile's first column.
SPROMPT_INLINE void multiply_tile(const float* a, const float* b, int64_t rows, float* c, int64_t stride, bool add) {
    vf sum[tile][3] = {};
    for (int64_t k = 0; k < rows; ++k, a += panel, b += panel) {
        const vf b0 = load(b), b1 = load(b + W), b2 = load(b + 2 * W);
#pragma GCC unroll 8
        for (int i = 0; i < tile; ++i) {
            const vf ai = broadcast(a[i]);
            sum[i][0] = fma(ai, b0, sum[i][0]);
            sum[i][1] = fma(ai, b1, sum[i][1]);
            sum[i][2] = fma(ai, b2, sum[i][2]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < tile; ++i)
        for (int j = 0; j < 3; ++j) {
            float* out = c + i * stride + j * W;
            store(out, add ? load(out) + sum[i][j] : sum[i][j]);
        }
}

// Writes the rows of a' b that belong to panels [first, last) of a to c (rows of these panels, stride), from column panel
// `from` of b on. triangle: a is b, and tiles left of the diagonal panels are left out.
static void multiply_panels(const Panels& a, int64_t first, int64_t last, const Panels& b, int64_t from, bool triangle,
                            float* c, int64_t stride) {
    for (int64_t block = 0; block < a.blocks(); ++block)
        for (int64_t j = from; j < b.count; ++j) {
            const float* right = b.at(block, j);
            for (int64_t i = first; i < last && (!triangle || i <= j); ++i)
                for (int64_t r = 0; r < panel; r += tile)
                    multiply_tile(a.at(block, i) + r, right, a.rows_of(block),
                                  c + ((i - first) * panel + r) * stride + j * panel, stride, block > 0);
        }
    if (a.rows == 0)  // an empty sum
        for (int64_t r = 0; r < (last - first) * panel; ++r)
            for (int64_t j = from * panel; j < b.columns(); ++j) c[r * stride + j] = 0.0f;
}

// c (rows of panels [first, last) of a, columns of b) = a' b.
static void multiply(const Panels& a, int64_t first, int64_t last, const Panels& b, float* c, int64_t stride, int threads) {
    parallel_for(last - first, group / panel, threads, [&](int64_t begin, int64_t end, int) {
        multiply_panels(a, first + begin, first + end, b, 0, false, c + begin * panel * stride, stride);
    });
}

// c (columns, columns) = a' a. The part below the diagonal is copied from the part above it. There, rows from P on are not
// written.
static void multiply_gram(const Panels& a, int64_t P, float* c, int64_t stride, int threads) {
    parallel_for(a.count, group / panel, threads, [&](int64_t begin, int64_t end, int) {
        const int64_t r0 = begin * panel, r1 = end * panel;
        multiply_panels(a, begin, end, a, begin, true, c + r0 * stride, stride);
        for (int64_t j = r0 + 1; j < P; ++j)
            for (int64_t i = r0; i < (j < r1 ? j : r1); ++i) c[j * stride + i] = c[i * stride + j];
    });
}

// norms[column] = max(sqrt(<column, column>), 1e-12). <column, column> has the bits of the product's diagonal.
static void column_norms(const Panels& a, float* norms, int threads) {
    parallel_for(a.count, 4, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t index = begin; index < end; ++index) {
            vf total[3] = {};
            for (int64_t block = 0; block < a.blocks(); ++block) {
                vf sum[3] = {};
                const float* x = a.at(block, index);
                for (int64_t k = 0; k < a.rows_of(block); ++k, x += panel)
                    for (int j = 0; j < 3; ++j) sum[j] = fma(load(x + j * W), load(x + j * W), sum[j]);
                for (int j = 0; j < 3; ++j) total[j] = block > 0 ? total[j] + sum[j] : sum[j];
            }
            for (int64_t i = 0; i < panel; ++i) {
                const float norm = __builtin_sqrtf(total[i / W][i % W]);
                norms[index * panel + i] = norm < 1e-12f ? 1e-12f : norm;
            }
        }
    });
}

// Packs x (D, P), rows `stride` apart. Columns that are not inside, and columns behind P, become copies of column `first`.
template <class T>
static void pack_columns(const T* x, int64_t stride, int64_t P, const int32_t* inside, bool all_inside, int64_t first,
                         const Panels& out, int threads) {
    parallel_for(out.blocks(), 1, threads, [&](int64_t block, int64_t, int) {
        constexpr int64_t strip = 8;  // rows read side by side, so that both reads and writes are in long runs
        const T* in = x + block * depth * stride;
        for (int64_t k0 = 0; k0 < out.rows_of(block); k0 += strip)
            for (int64_t index = 0; index < out.count; ++index) {
                const int64_t column = index * panel, k1 = k0 + strip < out.rows_of(block) ? k0 + strip : out.rows_of(block);
                const bool whole = column + panel <= P;
                for (int64_t k = k0; k < k1; ++k) {
                    float* to = out.at(block, index) + k * panel;
                    const T* from = in + k * stride + column;
                    if (whole)
                        for (int64_t i = 0; i < panel; i += W) store(to + i, load_as_float(from + i));
                    if (whole && all_inside) continue;
                    for (int64_t i = 0; i < panel; ++i) to[i] = to_float(inside[column + i] ? from[i] : in[k * stride + first]);
                }
            }
    });
}

// ---- Memory of a call

constexpr int64_t whole = 96;  // columns: whole panels and whole words at every level

SPROMPT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SPROMPT_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
SPROMPT_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// The scratch buffers of a call, used for one image after another.
struct Buffers {
    Panels features, seeds;  // (D, P), and (D, seed vectors)
    int64_t line, rows;      // P rounded up
    float* products;         // (rows, line)
    float* norms;            // (line)
    int32_t* inside;         // (line)
    float* seed_norms;       // (seed vectors)
    float* lines;            // (threads, line)

    SPROMPT_INLINE float* line_of(int worker) const { return lines + worker * line; }
};
static Buffers take_buffers(Scratch& memory, int64_t D, int64_t P, int64_t seeds, int64_t rows, int threads) {
    const int64_t line = round_up(P, whole);
    const Panels features = take_panels(memory, D, P), columns = take_panels(memory, D, seeds);
    return {features,
            columns,
            line,
            rows,
            memory.take<float>(rows, line),
            memory.take<float>(line),
            memory.take<int32_t>(line),
            memory.take<float>(columns.columns()),
            memory.take<float>(threads, line)};
}
// The number of rows of products that are held at a time, for `seeds` seed vectors.
static int64_t rows_of_seeds(int64_t seeds, int64_t P, int64_t held) {
    return smaller(round_up(seeds, group), larger(held / larger(round_up(P, whole), 1) / group, 1) * group);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
