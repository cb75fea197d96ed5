// The sizes of the intersections of many pairs of masks: a product of bit matrices by lookup tables ("four Russians").
//
// 128 masks are the columns, other masks are the rows. There is one table for every 4 pixels of the columns. It has 16 entries,
// one for each pattern of these 4 pixels in a row. An entry holds, for each column, how many set pixels the column shares with
// the pattern: 4 bits per column, 64 bytes per entry. So one load and one addition of a vector count 4 pixels of twice as many
// pairs as a vector has bytes. On a CPU without a vector popcount this is several times as fast as and + popcount. Masks of any
// length lose nothing to sums across lanes. Three entries are added before 4 bits could overflow, and 2 words before the sums
// are widened to 16 bits. Building a table costs as much as about 16 rows, so the product pays where most pairs of a tile are
// wanted.
#pragma once

#include "common/bits.h"

namespace sprompt {
namespace SPROMPT_ISA {

// Multiplies rows with columns, one tile at a time. About 110 kB, meant for the stack: the tables fit the L1 cache, the rest
// fits the L2 cache.
struct BitProduct {
    static constexpr int64_t columns = 128, rows = 256;  // the most that a tile has
    static constexpr int64_t most_words = 2047;          // in one call: counts fit 16 bits

    alignas(64) uint16_t counts[rows][columns];

    // counts[i][j] = |row(i) and column(j)| over words [first, last), last - first <= most_words, for i < R <= rows and
    // j < C <= columns; 0 for j >= C. row(i) and column(j) are pointers to words.
    template <class Row, class Column>
    void multiply(int64_t R, const Row& row, int64_t C, const Column& column, int64_t first, int64_t last) {
        __builtin_memset(counts, 0, R * sizeof counts[0]);
        for (auto& of_four : table) __builtin_memset(of_four[0], 0, entry);  // the pattern without a set pixel
        if (C < columns) __builtin_memset(turned, 0, sizeof turned);
        for (int64_t start = first; start < last; start += stretch) {
            const int64_t length = last - start < stretch ? last - start : stretch;
            for (int64_t j = 0; j < C; ++j) {
                const uint32_t* const words = column(j) + start;
                const int64_t place = place_of(j);
                fetch(words + stretch);
                for (int64_t w = 0; w < length; ++w) turned[w][place] = words[w];
            }
            for (int64_t i = 0; i < R; ++i) {
                const uint32_t* const words = row(i) + start;
                fetch(words + stretch);
                int64_t w = 0;
                for (; w + segment <= length; w += segment)
                    __builtin_memcpy(probes[w / segment][i], words + w, sizeof probes[0][0]);
                for (; w < length; ++w) probes[w / segment][i][w % segment] = words[w];
            }
            for (int64_t w = 0; w < length; w += segment) {
                const int64_t together = length - w < segment ? length - w : segment;
                for (int64_t k = 0; k < together; ++k) build(k, turned[w + k]);
                if (together == 2)
                    sweep<2>(R, probes[w / segment]);
                else
                    sweep<1>(R, probes[w / segment]);
            }
        }
    }

  private:
    static constexpr int64_t segment = 2;                             // words whose tables are held together
    static constexpr int64_t stretch = 12 * segment;                  // words that are copied together
    static constexpr int64_t entry = columns / 2;                     // bytes
    static constexpr int64_t bytes = 4 * W, vectors = entry / bytes;  // bytes of a vector; vectors of an entry
    typedef uint8_t vb __attribute__((vector_size(4 * W)));
    typedef uint16_t vw __attribute__((vector_size(4 * W)));
    static_assert(entry % bytes == 0 && segment * 32 < 256, "an entry is whole vectors, a byte holds a segment");

    alignas(64) uint8_t table[segment * 8][16][entry];
    alignas(64) uint32_t turned[stretch][columns];
    alignas(64) uint32_t probes[stretch / segment][rows][segment];

    // Prefetches the words of the next stretch. Rows lie far apart, and no hardware prefetcher follows them. A prefetch past
    // the end of a mask does no harm.
    SPROMPT_INLINE static void fetch(const uint32_t* words) {
        for (int64_t w = 0; w < stretch; w += 16) __builtin_prefetch(words + w);
    }

    // Where the word of column j must stand in `turned`, so that its counts end at index j. In an entry, the 4 bits h (0:
    // lower, 1: upper) of byte q of 32-bit lane m belong to the column of word [2 q + h][m]. The sums are widened in this
    // order: lower 4 bits of the even bytes of a vector, lower 4 bits of its odd bytes, then the same for the upper 4 bits.
    SPROMPT_INLINE static int64_t place_of(int64_t j) {
        const int64_t part = j % (2 * bytes) / (bytes / 2), high = part / 2, odd = part % 2;
        const int64_t byte = j / (2 * bytes) * bytes + 2 * (j % (bytes / 2)) + odd;
        return (2 * (byte % 4) + high) * (columns / 8) + byte / 4;
    }

    // Builds the 8 tables of word k of a segment.
    SPROMPT_INLINE void build(int64_t k, const uint32_t* words) {
        for (int64_t v = 0; v < vectors; ++v) {
            vi of[8];  // 8 words; bits 4 c .. 4 c + 3 of word r become bits 4 r .. 4 r + 3 of vector c
            for (int r = 0; r < 8; ++r) of[r] = load(reinterpret_cast<const int32_t*>(words) + r * (columns / 8) + v * W);
            const auto exchange = [&](int distance, int32_t mask) {
                for (int r = 0; r < 8; ++r) {
                    if (r & distance) continue;
                    const vi moved = ((of[r] >> 4 * distance) ^ of[r + distance]) & mask;
                    of[r + distance] ^= moved;
                    of[r] ^= moved << 4 * distance;
                }
            };
            exchange(4, 0x0000ffff);
            exchange(2, 0x00ff00ff);
            exchange(1, 0x0f0f0f0f);
            for (int c = 0; c < 8; ++c) {
                uint8_t (*const to)[entry] = table[8 * k + c];
                vi sum[16];
                sum[0] = vi{};
                for (int bit = 0; bit < 4; ++bit) {
                    const vi set = (of[c] >> bit) & 0x11111111;
                    for (int e = 1 << bit; e < 2 << bit; ++e) {
                        sum[e] = set + sum[e - (1 << bit)];
                        store(reinterpret_cast<int32_t*>(to[e] + v * bytes), sum[e]);
                    }
                }
            }
        }
    }

    // Keeps the compiler from loading the first vectors of all entries before the second vectors. Two loads from the same half
    // of two cache lines use the same bank of the cache, and one of them waits.
    SPROMPT_INLINE static void keep_order(int64_t& offset, vb (&sum)[vectors]) {
#if SPROMPT_X86 && !defined(SPROMPT_EMULATE_AVX512)
        for (int v = 0; v < vectors; ++v) __asm__ volatile("" : "+x"(sum[v]), "+r"(offset));
#else
        (void)offset, (void)sum;
#endif
    }

    // Adds the counts of `words` words, read from their tables, to the counts of each row.
    template <int words>
    SPROMPT_INLINE void sweep(int64_t R, const uint32_t (*probe)[segment]) {
        const uint8_t* entries = &table[0][0][0];
        for (int64_t i = 0; i < R; ++i) {
            vb low[vectors] = {}, high[vectors] = {};
#pragma GCC unroll 2
            for (int k = 0; k < words; ++k) {
                const uint32_t word = probe[i][k];
                vb sum[vectors];
#pragma GCC unroll 8
                for (int c = 0; c < 8; ++c) {
                    // A rotation is one instruction; a copy and a shift are two.
                    const int shift = (38 - 4 * c) % 32;
                    int64_t offset = (word << shift | word >> (32 - shift)) & 15 * entry;
                    keep_order(offset, c % 3 == 0 ? low : sum);
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; ++v) {
                        vb part;
                        __builtin_memcpy(&part, entries + offset + (8 * k + c) * 16 * entry + v * bytes, bytes);
                        sum[v] = c % 3 == 0 ? part : sum[v] + part;
                        if (c % 3 != 2 && c != 7) continue;
                        low[v] += sum[v] & 15;
                        high[v] += (vb)((vw)sum[v] >> 4) & 15;
                    }
                }
            }
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) {
                uint16_t* const to = counts[i] + v * 2 * bytes;
                const vw add[4] = {(vw)low[v] & 255, (vw)low[v] >> 8, (vw)high[v] & 255, (vw)high[v] >> 8};
#pragma GCC unroll 4
                for (int part = 0; part < 4; ++part) {
                    vw count;
                    __builtin_memcpy(&count, to + part * bytes / 2, bytes);
                    count += add[part];
                    __builtin_memcpy(to + part * bytes / 2, &count, bytes);
                }
            }
        }
    }
};

}  // namespace SPROMPT_ISA
}  // namespace sprompt
