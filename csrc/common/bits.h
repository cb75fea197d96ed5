// Bit sets. A mask of P pixels is ceil(P / 32) little-endian 32-bit words. Pixel p is bit p % 32 of word p / 32. The bits
// behind the last pixel are 0. Rows of words start at 4-byte boundaries. Kernels read pairs of words as 64 bits.
#pragma once

#include "common/vec.h"

namespace sprompt {
namespace SPROMPT_ISA {

SPROMPT_INLINE int64_t words_for(int64_t pixels) { return (pixels + 31) / 32; }

SPROMPT_INLINE uint64_t load64(const uint32_t* words) {
    uint64_t v;
    __builtin_memcpy(&v, words, 8);
    return v;
}

SPROMPT_INLINE int popcount(uint64_t x) {
#if defined(__POPCNT__) || !SPROMPT_X86
    return __builtin_popcountll(x);
#else
    x -= (x >> 1) & 0x5555555555555555u;
    x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
    return static_cast<int>((((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Carry-save adder: a + b + c = 2 high + low, bit by bit.
SPROMPT_INLINE void carry_save(__m256i& high, __m256i& low, __m256i a, __m256i b, __m256i c) {
    const __m256i u = a ^ b;
    high = (a & b) | (u & c);
    low = u ^ c;
}
// Set bits per byte, by a table of the 16 nibbles.
SPROMPT_INLINE __m256i popcount_bytes(__m256i v) {
    const __m256i table =
        _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_shuffle_epi8(table, v & nibble);
    const __m256i high = _mm256_shuffle_epi8(table, _mm256_srli_epi32(v, 4) & nibble);
    return _mm256_add_epi8(low, high);
}
// Set bits per 64-bit lane.
SPROMPT_INLINE __m256i popcount_lanes(__m256i v) { return _mm256_sad_epu8(popcount_bytes(v), _mm256_setzero_si256()); }
SPROMPT_INLINE int64_t sum_lanes(__m256i v) {
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
}
#endif

// |a and b| over n words. count_and(a, a, n) is the area.
SPROMPT_INLINE int64_t count_and(const uint32_t* a, const uint32_t* b, int64_t n) {
    int64_t total = 0;
    int64_t i = 0;
#if defined(__AVX512VPOPCNTDQ__)
    __m512i lanes = _mm512_setzero_si512();
    for (; i + 16 <= n; i += 16)
        lanes = _mm512_add_epi64(lanes,
                                 _mm512_popcnt_epi64(_mm512_and_si512(_mm512_loadu_si512(a + i), _mm512_loadu_si512(b + i))));
    if (i < n) {
        const __mmask16 rest = static_cast<__mmask16>((1u << (n - i)) - 1);
        lanes = _mm512_add_epi64(lanes, _mm512_popcnt_epi64(_mm512_and_si512(_mm512_maskz_loadu_epi32(rest, a + i),
                                                                             _mm512_maskz_loadu_epi32(rest, b + i))));
    }
    return _mm512_reduce_add_epi64(lanes);
#elif defined(__AVX2__)
    const auto both = [&](int64_t word) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + word)) &
               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + word));
    };
    if (n > 240) {
        // A tree of carry-save adders takes eight vectors at a time. Only the carries of weight 8 are counted in each step.
        __m256i ones = _mm256_setzero_si256(), twos = ones, fours = ones, eights = ones;
        for (; i + 64 <= n; i += 64) {
            __m256i twos_a, twos_b, fours_a, fours_b, carry;
            carry_save(twos_a, ones, ones, both(i), both(i + 8));
            carry_save(twos_b, ones, ones, both(i + 16), both(i + 24));
            carry_save(fours_a, twos, twos, twos_a, twos_b);
            carry_save(twos_a, ones, ones, both(i + 32), both(i + 40));
            carry_save(twos_b, ones, ones, both(i + 48), both(i + 56));
            carry_save(fours_b, twos, twos, twos_a, twos_b);
            carry_save(carry, fours, fours, fours_a, fours_b);
            eights = _mm256_add_epi64(eights, popcount_lanes(carry));
        }
        const __m256i low = _mm256_add_epi64(_mm256_slli_epi64(popcount_lanes(twos), 1), popcount_lanes(ones));
        const __m256i high = _mm256_add_epi64(_mm256_slli_epi64(eights, 1), popcount_lanes(fours));
        total = sum_lanes(_mm256_add_epi64(_mm256_slli_epi64(high, 2), low));
    }
    if (n - i >= 8) {  // short rows and the tree's remainder: at most 30 whole vectors and a partial one, so counts fit bytes
        __m256i bytes = _mm256_setzero_si256();
        for (; i + 8 <= n; i += 8) bytes = _mm256_add_epi8(bytes, popcount_bytes(both(i)));
        if (i < n) {
            const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            const __m256i rest = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n - i)), place);
            const auto part = [&](const uint32_t* row) {
                return _mm256_maskload_epi32(reinterpret_cast<const int*>(row + i), rest);
            };
            bytes = _mm256_add_epi8(bytes, popcount_bytes(part(a) & part(b)));
        }
        return total + sum_lanes(_mm256_sad_epu8(bytes, _mm256_setzero_si256()));
    }
#endif
    for (; i + 2 <= n; i += 2) total += popcount(load64(a + i) & load64(b + i));
    if (i < n) total += popcount(a[i] & b[i]);
    return total;
}
SPROMPT_INLINE int64_t count_bits(const uint32_t* words, int64_t n) { return count_and(words, words, n); }

// Calls f(p) for every set bit p of words[0..n), in increasing order.
template <class F>
SPROMPT_INLINE void for_each_bit(const uint32_t* words, int64_t n, const F& f) {
    for (int64_t i = 0; i < n; ++i)
        for (uint32_t w = words[i]; w != 0; w &= w - 1) f(32 * i + __builtin_ctz(w));
}

// The 64 bits of words[0..n) from bit `first` >= 0 on. Bits behind the end are read as 0.
SPROMPT_INLINE uint64_t bits_at(const uint32_t* words, int64_t n, int64_t first) {
    const int64_t i = first / 32;
    const int shift = static_cast<int>(first % 32);
    uint64_t low = i < n ? words[i] : 0;
    if (i + 1 < n) low |= static_cast<uint64_t>(words[i + 1]) << 32;
    if (shift == 0) return low;
    const uint64_t high = i + 2 < n ? words[i + 2] : 0;
    return (low >> shift) | (high << (64 - shift));
}
// The lowest k bits set, k in [0, 64].
SPROMPT_INLINE uint64_t low_bits(int64_t k) { return k >= 64 ? ~uint64_t{0} : (uint64_t{1} << k) - 1; }

// Writes bit strings one after the other into words that no other thread writes. close() stores the last, incomplete word.
struct BitWriter {
    uint32_t* out;
    uint64_t pending = 0;
    int count = 0;

    SPROMPT_INLINE explicit BitWriter(uint32_t* words) : out(words) {}
    // Appends the lowest k bits of v, k in [0, 32]. The other bits of v must be 0.
    SPROMPT_INLINE void put(uint32_t v, int k) {
        pending |= static_cast<uint64_t>(v) << count;
        count += k;
        if (count >= 32) {
            *out++ = static_cast<uint32_t>(pending);
            pending >>= 32;
            count -= 32;
        }
    }
    SPROMPT_INLINE void close() {
        if (count > 0) *out = static_cast<uint32_t>(pending);
    }
};

}  // namespace SPROMPT_ISA
}  // namespace sprompt
