// Source rows: read, compared with the threshold, and interpolated at the output columns.
#pragma once

#include "common/bits.h"
#include "common/cells.h"
#include "resize_masks/taps.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr int64_t segment = 32;
constexpr uint8_t below = 1, above = 2, widened = 4;  // flags of a segment in one source row; below, above: all its cells are

// The values that all masks share. Output columns are padded to whole segments with copies of the last column.
struct Plan {
    int64_t width;
    float threshold, low, high;  // cells below `low` (above `high`) on all sides give a pixel that is not set (is set)
    int64_t segments, used;      // used: source columns [0, used) are read
    bool compares;               // true: cells are compared; false: every segment is interpolated
    bool sums;                   // true: only segments below `low` go without interpolation
    int taps;                    // of a column
    int32_t* cell[most_taps];    // (32 segments) each
    float* weight[most_taps];    // (32 segments) each
    int32_t* pair;               // (32 segments) first cell, but at most used - 2: two cells can be read from there; or null
    const Taps* rows;            // (height)
};

// One source row.
struct Row {
    int64_t index;                        // of the source row, or -1
    const float* cells;                   // (used) in the source itself or in `buffer`
    float* buffer;                        // (w, padded to 32)
    float* wide;                          // (32 segments) the cells interpolated at output columns, where widened
    uint32_t *below_cells, *above_cells;  // bit i: cell i is below `low`, above `high`
    uint8_t* state;                       // (segments)
    uint8_t common;                       // the state if all segments have the same, below or above; else 0
};

// A source of rows: bits as cells of 0 and 1. Dense (common/cells.h) is the other.
struct Bits {
    const uint32_t* words;
    int64_t n, w;
    SPROMPT_INLINE const float* row(int64_t y, int64_t used, float* buffer) const {
        for (int64_t i = 0; i < used; i += 32) {
            const uint32_t bits = static_cast<uint32_t>(bits_at(words, n, y * w + i));
            for (int k = 0; k < 32; ++k) buffer[i + k] = static_cast<float>(static_cast<int32_t>(bits >> k & 1));
        }
        return buffer;
    }
};

// Compares 32 cells. Bit k of is_below is set where cells[k] is below `low`, bit k of is_above where it is above `high`.
SPROMPT_INLINE void compare(const float* cells, vf low, vf high, uint32_t& is_below, uint32_t& is_above) {
    is_below = is_above = 0;
    for (int k = 0; k < 32; k += W) {
        const vf x = load(cells + k);
        is_below |= bits_greater(low, x) << k;
        is_above |= bits_greater(x, high) << k;
    }
}

// Whether bits [begin, end) are all set.
SPROMPT_INLINE bool all_set(const uint32_t* words, int64_t begin, int64_t end) {
    for (; end - begin > 56; begin += 56) {  // a 64-bit word from any byte holds at least 57 bits from its first
        uint64_t v;
        __builtin_memcpy(&v, reinterpret_cast<const char*>(words) + begin / 8, 8);
        if ((~(v >> (begin % 8)) & low_bits(56)) != 0) return false;
    }
    uint64_t v;
    __builtin_memcpy(&v, reinterpret_cast<const char*>(words) + begin / 8, 8);
    return (~(v >> (begin % 8)) & low_bits(end - begin)) == 0;
}

template <class Source>
static void read_row(const Plan& plan, const Source& source, int64_t y, Row& row) {
    const vf low = broadcast(plan.low), high = broadcast(plan.high);
    const float* cells = row.cells = source.row(y, plan.used, row.buffer);
    row.index = y;
    row.common = 0;
    if (!plan.compares) {
        __builtin_memset(row.state, 0, static_cast<size_t>(plan.segments));
        return;
    }
    uint32_t all_below = ~0u, all_above = ~0u;
    const auto note = [&](int64_t i, const float* p) {
        uint32_t is_below, is_above;
        compare(p, low, high, is_below, is_above);
        row.below_cells[i / 32] = is_below;
        row.above_cells[i / 32] = is_above;
        all_below &= is_below;
        all_above &= is_above;
    };
    int64_t i = 0;
    for (; i + 32 <= plan.used; i += 32) note(i, cells + i);
    if (i < plan.used) {
        float rest[32];
        for (int64_t k = 0; k < 32; ++k) rest[k] = cells[i + k < plan.used ? i + k : plan.used - 1];
        note(i, rest);
    }
    row.common = static_cast<uint8_t>((all_below == ~0u ? below : 0) | (all_above == ~0u ? above : 0));
    if (row.common != 0) {
        __builtin_memset(row.state, row.common, static_cast<size_t>(plan.segments));
        return;
    }
    for (int64_t s = 0; s < plan.segments; ++s) {
        const int64_t begin = plan.cell[0][s * segment], end = plan.cell[plan.taps - 1][s * segment + segment - 1] + 1;
        row.state[s] = all_set(row.below_cells, begin, end) ? below : all_set(row.above_cells, begin, end) ? above : 0;
    }
}

// The sum of the taps at output columns [x, x + W), where `of(t)` are the cells of tap t.
template <class Of>
SPROMPT_INLINE vf blend(const Plan& plan, int64_t x, const Of& of) {
    vf sum = held(of(0)) * load(plan.weight[0] + x) + held(of(1)) * load(plan.weight[1] + x);
    for (int t = 2; t < plan.taps; ++t) sum = sum + held(of(t)) * load(plan.weight[t] + x);
    return sum;
}

// The cells interpolated at output columns [x, x + W).
SPROMPT_INLINE vf across(const Plan& plan, const float* cells, int64_t x) {
#if defined(__AVX2__)
    const int32_t end = static_cast<int32_t>(plan.used) - W, first = plan.cell[0][x], lowest = first < end ? first : end;
    if (lowest >= 0 && plan.cell[plan.taps - 1][x + W - 1] - lowest < W) {  // one load holds them all
        const vf near = load(cells + lowest);
        return blend(plan, x, [&](int t) {
            const vi place = load(plan.cell[t] + x) - lowest;
#if defined(__AVX512F__)
            return (vf)_mm512_permutexvar_ps((__m512i)place, (__m512)near);
#else
            return (vf)_mm256_permutevar8x32_ps((__m256)near, (__m256i)place);
#endif
        });
    }
#if !defined(__AVX512F__)
    if (plan.pair != nullptr) {  // pairs of neighbours: far cheaper than two gathers
        const int32_t* pair = plan.pair + x;
        const auto one = [&](int k) {
            double both;
            __builtin_memcpy(&both, cells + pair[k], sizeof both);
            return both;
        };
        const auto two = [&](int k) { return _mm_castpd_ps(_mm_set_pd(one(k + 1), one(k))); };
        const __m256 even = _mm256_set_m128(two(4), two(0)), odd = _mm256_set_m128(two(6), two(2));
        const vf low = (vf)_mm256_shuffle_ps(even, odd, 0x88), high = (vf)_mm256_shuffle_ps(even, odd, 0xdd);
        const vi start = load(pair);
        return blend(plan, x, [&](int t) { return select(load(plan.cell[t] + x) == start, low, high); });
    }
#endif
#endif
    return blend(plan, x, [&](int t) { return gather(cells, plan.cell[t] + x); });
}

static void widen(const Plan& plan, Row& row, int64_t s) {
    if (row.state[s] & widened) return;
    row.state[s] |= widened;
    for (int64_t x = s * segment; x < (s + 1) * segment; x += W) store(row.wide + x, across(plan, row.cells, x));
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
