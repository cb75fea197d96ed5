// The k smallest of n keys, by histograms of their digits. Keys are at least 0. Ties go to the lowest index.
#pragma once

#include "common/lanes.h"

namespace sprompt {
namespace SPROMPT_ISA {

// The largest of the k smallest keys, and how many keys equal to it belong to them.
struct Limit {
    int32_t key;
    int64_t equal;
};

// Neighbouring keys are counted in different tables, since keys of one bin would wait for each other.
constexpr int64_t least_bins = 2048, least_tables = 4;
// The size of the buffer of counts.
constexpr int64_t least_counts = least_bins * least_tables;

// Appends the lanes of `values` whose bit is set, and writes up to W numbers. No branch depends on the bits.
SPROMPT_INLINE void append(vi values, uint32_t bits, int32_t* list, int64_t& length) {
#if defined(__AVX512F__)
    store(list + length, (vi)_mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), (__m512i)values));
    length += __builtin_popcount(bits);
#else
    int32_t lane[W];
    store(lane, values);
    for (int i = 0; i < W; ++i) {
        list[length] = lane[i];
        length += bits >> i & 1;
    }
#endif
}

// counts[d] <- how many of n keys have the digit d, for d in [0, mask].
static void count_digits(const int32_t* keys, int64_t n, int shift, int32_t mask, int32_t* counts) {
    for (int64_t k = 0; k < least_tables; ++k)
        for (int64_t i = 0; i <= mask; ++i) counts[k * least_bins + i] = 0;
    int64_t i = 0;
    for (; i + least_tables <= n; i += least_tables)
        for (int64_t k = 0; k < least_tables; ++k) ++counts[k * least_bins + (keys[i + k] >> shift & mask)];
    for (; i < n; ++i) ++counts[keys[i] >> shift & mask];
    for (int64_t k = 1; k < least_tables; ++k)
        for (int64_t d = 0; d <= mask; ++d) counts[d] += counts[k * least_bins + d];
}

// k is in [1, n]. Digits have 11, 10 and 10 bits, the highest first. `rest` holds the keys that share
// the digits found so far. `keys` and `rest` have n + W numbers.
static Limit limit_of(const int32_t* keys, int64_t n, int64_t k, int32_t* rest, int32_t* counts) {
    int32_t found = 0;
    for (int shift = 20; shift >= 0; shift -= 10) {
        const int32_t mask = shift == 20 ? 2047 : 1023;
        count_digits(keys, n, shift, mask, counts);
        int32_t digit = 0;
        while (k > counts[digit]) k -= counts[digit++];
        found |= digit << shift;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i += W) {  // reads before it writes, so `keys` may be `rest`
            const vi some = load(keys + i), same = (some >> shift & mask) == digit;
            append(some, bits_of(same & first_lanes(n - i)), rest, kept);
        }
        keys = rest;
        n = kept;
    }
    return {found, k};
}

// list (kept) <- the indices of the `kept` smallest of n keys, increasing; kept is at least 1. `list` has n + W numbers and may
// be `rest`. `counts` has least_counts numbers.
static void choose_least(const int32_t* keys, int64_t n, int64_t kept, int32_t* rest, int32_t* counts, int32_t* list) {
    Limit limit = limit_of(keys, n, kept, rest, counts);
    int64_t done = 0;
    for (int64_t i = 0; done < kept; i += W) {
        const vi some = load(keys + i), real = first_lanes(n - i);
        const uint32_t below = bits_of((some < limit.key) & real);
        uint32_t equal = bits_of((some == limit.key) & real);
        if (equal != 0) {  // rare
            while (__builtin_popcount(equal) > limit.equal) equal &= ~(0x80000000u >> __builtin_clz(equal));
            limit.equal -= __builtin_popcount(equal);
        }
        append(static_cast<int32_t>(i) + lanes(), below | equal, list, done);
    }
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
