// Hard mask pooling of one block of 64 pixels, by set bits. Helpers for words and prefetching that both passes use.
#pragma once

#include "common/bits.h"
#include "mask_conv/product.h"

namespace sprompt {
namespace SPROMPT_ISA {

// The 64 bits of row `row` that start at pixel p, a multiple of 64. Bits behind the last pixel are 0.
SPROMPT_INLINE uint64_t block_bits(const uint32_t* row, int64_t n, int64_t p) {
    const int64_t i = p / 32;
    return i + 1 < n ? load64(row + i) : row[i];
}

// Fetches the next block of x (rows, pixels) into the L2 cache while the kernel works on the current block. Neighbouring rows
// lie in different pages, and the hardware prefetcher does not cross pages.
template <class T>
struct Prefetch {
    const T* x;
    int64_t row_stride, rows, bytes, row = 0;

    SPROMPT_INLINE Prefetch(const T* x_, int64_t row_stride_, int64_t rows_, int64_t pixels)
        : x(x_), row_stride(row_stride_), rows(pixels > 0 ? rows_ : 0), bytes(pixels * static_cast<int64_t>(sizeof(T))) {}
    // Rows to fetch per call, when `calls` calls share the fetching.
    SPROMPT_INLINE int64_t share(int64_t calls) const { return calls > 0 ? rows / calls + 1 : rows; }
    SPROMPT_INLINE void some(int64_t count) {
        for (; count > 0 && row < rows; --count, ++row) {
            const char* line = reinterpret_cast<const char*>(x + row * row_stride);
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i, 0, 2);
        }
    }
};

// ---- Pooling of one block by set bits. A block is 64 rows of one pixel each, followed by rows that are sums of 2, 4 and 8
// neighbouring pixels. A mask is a list of rows to add. The list is about as long as the mask's edge: at most 32 rows (64
// without the sums).

constexpr int64_t pair_rows_begin = 64, quad_rows_begin = 96, oct_rows_begin = 112, row_count = 120;
constexpr uint64_t even_bits = 0x5555555555555555u;

// Lists the rows whose sum is the sum of the pixels m. Returns their number.
SPROMPT_INLINE int32_t list_rows(uint64_t m, bool with_sums, uint8_t* list) {
    uint64_t pairs = 0, quads = 0, octs = 0;
    if (with_sums) {
        pairs = m & m >> 1 & even_bits;
        quads = pairs & pairs >> 2 & 0x1111111111111111u;
        octs = quads & quads >> 4 & 0x0101010101010101u;
        m &= ~(pairs | pairs << 1);
        pairs &= ~(quads | quads << 2);
        quads &= ~(octs | octs << 4);
    }
    int32_t count = 0;
    for (; m != 0; m &= m - 1) list[count++] = static_cast<uint8_t>(__builtin_ctzll(m));
    for (; pairs != 0; pairs &= pairs - 1) list[count++] = static_cast<uint8_t>(pair_rows_begin + __builtin_ctzll(pairs) / 2);
    for (; quads != 0; quads &= quads - 1) list[count++] = static_cast<uint8_t>(quad_rows_begin + __builtin_ctzll(quads) / 4);
    for (; octs != 0; octs &= octs - 1) list[count++] = static_cast<uint8_t>(oct_rows_begin + __builtin_ctzll(octs) / 8);
    return count;
}

// tile [64][panel] <- channels [c, c + width) of a packed block; width is a multiple of W.
static void pixel_rows(const float* packed, int64_t padded, int64_t c, int64_t width, float* tile) {
    for (int64_t s = 0; s < slices; ++s)
        for (int i = 0; i < NR; i += W)
            for (int64_t k = 0; k < width; k += W)
                transpose(packed + (s * padded + c + k) * NR + i, NR, tile + (s * NR + i) * panel + k, panel);
}

static void add_neighbours(float* tile, int64_t width) {
    for (int64_t row = 0; row < row_count - block; ++row) {
        const float* a = tile + 2 * row * panel;  // row 64 + r is the sum of rows 2r and 2r + 1, for 2, 4 and 8 neighbours
        float* out = tile + (block + row) * panel;
        for (int64_t k = 0; k < width; k += W) store(out + k, load(a + k) + load(a + panel + k));
    }
}

// Adds the listed rows of the tile to sums (N, V * W), rows sums_stride apart.
template <int V, class T>
static void add_rows(const float* tile, const uint8_t* lists, const int32_t* counts, int64_t N, float* sums,
                     int64_t sums_stride, Prefetch<T>& next, int64_t share) {
    for (int64_t i = 0; i < N; ++i) {
        next.some(share);
        if (counts[i] == 0) continue;
        float* out = sums + i * sums_stride;
        vf sum[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[v] = load(out + v * W);
        for (int32_t k = 0; k < counts[i]; ++k) {
            const float* row = tile + lists[i * block + k] * panel;
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[v] += load(row + v * W);
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) store(out + v * W, sum[v]);
    }
}
template <int V = 8, class T>
SPROMPT_INLINE void add_rows_of(int64_t width, const float* tile, const uint8_t* lists, const int32_t* counts, int64_t N,
                                float* sums, int64_t sums_stride, Prefetch<T>& next, int64_t share) {
    if (width == V * W) return add_rows<V>(tile, lists, counts, N, sums, sums_stride, next, share);
    if constexpr (V > 1) add_rows_of<V - 1>(width, tile, lists, counts, N, sums, sums_stride, next, share);
}

// Lists the rows of every mask for the block at pixel p. Returns whether any pixel is set. Sets with_sums if the masks have so
// many neighbouring pixels that sums of neighbours save more than they cost.
static bool list_block(const uint32_t* words, int64_t words_stride, int64_t n, int64_t p, int64_t N, uint8_t* lists,
                       int32_t* counts, bool& with_sums) {
    int64_t neighbours = 0;
    uint64_t any = 0;
    for (int64_t i = 0; i < N; ++i) {
        const uint64_t m = block_bits(words + i * words_stride, n, p);
        any |= m;
        neighbours += popcount(m & m >> 1 & even_bits);
    }
    with_sums = neighbours > row_count - block;
    if (any == 0) return false;
    for (int64_t i = 0; i < N; ++i)
        counts[i] = list_rows(block_bits(words + i * words_stride, n, p), with_sums, lists + i * block);
    return true;
}

// Adds the rows that the lists name, of one packed block, to sums (N, C').
template <class T>
static void block_pool(const float* packed, int64_t C, int64_t padded, int64_t N, const uint8_t* lists, const int32_t* counts,
                       bool with_sums, float* tile, float* sums, int64_t sums_stride, Prefetch<T> next) {
    const int64_t share = next.share((C + panel - 1) / panel * N);
    for (int64_t c = 0; c < C; c += panel) {
        const int64_t width = smaller(padded - c, panel);
        pixel_rows(packed, padded, c, width, tile);
        if (with_sums) add_neighbours(tile, width);
        add_rows_of(width, tile, lists, counts, N, sums + c, sums_stride, next, share);
    }
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
