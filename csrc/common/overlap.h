// The size of the intersection of two masks of the same width. The cost is that of the overlap of their boxes. If the boxes do
// not overlap, no word is read.
#pragma once

#include "common/bits.h"

namespace sprompt {
namespace SPROMPT_ISA {

// A mask's tight box with exclusive ends (zeros if the mask is empty), and its area. Five int64 in memory.
struct Extent {
    int64_t x1, y1, x2, y2, area;
};

static inline Extent extent_of(const uint32_t* words, int64_t n, int64_t width) {
    int64_t first = 0, last = n;
    while (first < n && words[first] == 0) ++first;
    if (first == n) return {0, 0, 0, 0, 0};
    while (words[last - 1] == 0) --last;
    const int64_t y1 = (32 * first + __builtin_ctz(words[first])) / width;
    const int64_t y2 = (32 * last - 1 - __builtin_clz(words[last - 1])) / width + 1;
    int64_t x1 = width, x2 = 0;
    for (int64_t y = y1; y < y2; ++y) {
        // Only columns outside [x1, x2) can widen the box: it searches from the left up to x1 and from the right down to x2.
        for (int64_t x = 0; x < x1; x += 64) {
            const uint64_t v = bits_at(words, n, y * width + x) & low_bits(x1 - x);
            if (v == 0) continue;
            x1 = x + __builtin_ctzll(v);
            break;
        }
        for (int64_t end = width; end > x2; end -= 64) {
            const int64_t x = end - 64 > x2 ? end - 64 : x2;
            const uint64_t v = bits_at(words, n, y * width + x) & low_bits(end - x);
            if (v == 0) continue;
            x2 = x + 64 - __builtin_clzll(v);
            break;
        }
    }
    return {x1, y1, x2, y2, count_bits(words + first, last - first)};
}

// The box that holds the intersection. first_word and last_word bound its pixels when they are read in one stretch.
struct Overlap {
    int64_t x1, y1, x2, y2;
    SPROMPT_INLINE Overlap(const Extent& a, const Extent& b)
        : x1(a.x1 > b.x1 ? a.x1 : b.x1),
          y1(a.y1 > b.y1 ? a.y1 : b.y1),
          x2(a.x2 < b.x2 ? a.x2 : b.x2),
          y2(a.y2 < b.y2 ? a.y2 : b.y2) {}
    SPROMPT_INLINE bool empty() const { return x1 >= x2 || y1 >= y2; }
    SPROMPT_INLINE int64_t first_word(int64_t width) const { return (y1 * width + x1) / 32; }
    SPROMPT_INLINE int64_t last_word(int64_t width) const { return ((y2 - 1) * width + x2 - 1) / 32 + 1; }
    // Whether it is cheaper to read each row's few words than to read all words in one stretch (about a quarter of a cycle per
    // word).
    SPROMPT_INLINE bool narrow(int64_t width) const {
        const int64_t words_a_row = (x2 - x1) / 32 + 2;
        return (y2 - y1) * (8 + words_a_row) * 4 < last_word(width) - first_word(width);
    }
};

// |a and b|, counted row by row. Outside the overlap the intersection is empty, so whole words may be counted. A word that two
// rows share is counted once.
static inline int64_t count_rows(const uint32_t* a, const uint32_t* b, int64_t width, const Overlap& box) {
    int64_t total = 0, done = 0;
    for (int64_t y = box.y1; y < box.y2; ++y) {
        int64_t i = (y * width + box.x1) / 32;
        const int64_t end = (y * width + box.x2 - 1) / 32 + 1;
        if (i < done) i = done;
        for (; i + 2 <= end; i += 2) total += popcount(load64(a + i) & load64(b + i));
        if (i < end) total += popcount(a[i] & b[i]);
        done = end;
    }
    return total;
}

// |a and b|, counted in the cheaper of the two ways.
static inline int64_t intersection(const uint32_t* a, const Extent& extent_a, const uint32_t* b, const Extent& extent_b,
                                   int64_t width) {
    const Overlap box(extent_a, extent_b);
    if (box.empty()) return 0;
    if (box.narrow(width)) return count_rows(a, b, width, box);
    const int64_t first = box.first_word(width);
    return count_and(a + first, b + first, box.last_word(width) - first);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
