// Soft targets of the losses, read row by row. A target is a dense map of bytes (any byte but 0 counts as 1) or floats, or a
// bit mask at r times the resolution of the loss. A bit mask is reduced by half-pixel bilinear interpolation: the bit itself (r
// = 1), the mean of a 2 x 2 block (r = 2), or the mean of the central 2 x 2 bits of a 4 x 4 block (r = 4).
#pragma once

#include "common/bits.h"
#include "common/half.h"

namespace sprompt {
namespace SPROMPT_ISA {

struct TargetMap {
    const void* data;    // of one mask
    DType dtype;         // i32: words
    int64_t row_stride;  // of a dense map
    int64_t words;       // of a bit mask
    int64_t ratio;       // 0: dense
    int64_t width;       // of the loss
};

// The target that starts `offset` elements into the tensor.
SPROMPT_INLINE TargetMap target_map(const View& targets, int64_t offset, int64_t ratio, int64_t width) {
    const int last = targets.rank - 1;
    const int64_t bytes = targets.dtype == DType::f32 || targets.dtype == DType::i32    ? 4
                          : targets.dtype == DType::bf16 || targets.dtype == DType::f16 ? 2
                                                                                        : 1;
    return {targets.as<const char>() + offset * bytes,
            targets.dtype,
            ratio == 0 ? targets.stride[last - 1] : 0,
            targets.size[last],
            ratio,
            width};
}

// out[0 .. 16) <- a quarter of each of the 16 counts, at most 4, in the nibbles of v. The nibbles are not shifted: nibble i in
// place is a multiple of 16^i and at most 4 * 16^7 = 2^30, which a float holds exactly.
SPROMPT_INLINE void store_quarters(uint64_t v, float* out) {
    const vi low = broadcast(static_cast<int32_t>(v)), high = broadcast(static_cast<int32_t>(v >> 32));
    for (int i = 0; i < 16; i += W) {
        vi field, in_high;
        vf scale;
        for (int j = 0; j < W; ++j) {
            const int nibble = (i + j) % 8;
            field[j] = 7 << (4 * nibble);
            scale[j] = 0.25f / static_cast<float>(int64_t{1} << (4 * nibble));
            in_high[j] = i + j >= 8 ? -1 : 0;
        }
        store(out + i, __builtin_convertvector(((high & in_high) | (low & ~in_high)) & field, vf) * scale);
    }
}

// Spreads 16 fields of 2 bits to 16 nibbles.
SPROMPT_INLINE uint64_t pairs_to_nibbles(uint64_t v) {
    v = (v | v << 16) & 0x0000ffff0000ffffu;
    v = (v | v << 8) & 0x00ff00ff00ff00ffu;
    v = (v | v << 4) & 0x0f0f0f0f0f0f0f0fu;
    return (v | v << 2) & 0x3333333333333333u;
}

// Writes out[X] of row Y for every X in [0, width), and zeros up to the next multiple of W (r > 1: of 16). Returns false, and
// writes nothing, if the whole row is 0.
SPROMPT_INLINE bool bit_target_row(const TargetMap& map, int64_t Y, float* out) {
    const uint32_t* words = static_cast<const uint32_t*>(map.data);
    const int64_t width = map.width, n = map.words, r = map.ratio, line = r * width;
    const int64_t a = (r * Y + (r == 4 ? 1 : 0)) * line, b = a + line;  // the first bits of the two rows that count
    // Every step takes 64 / r targets. A first loop looks for set bits, since most rows of most masks are empty.
    const int64_t step = 64 / r;
    uint64_t any = 0;
    for (int64_t X = 0; X < width; X += step) {
        const uint64_t live = low_bits(r * (width - X));
        any |= bits_at(words, n, a + r * X) & live;
        if (r > 1) any |= bits_at(words, n, b + r * X) & live;
    }
    if (any == 0) return false;
    for (int64_t X = 0; X < width; X += step) {
        const uint64_t live = low_bits(r * (width - X));
        const uint64_t top = bits_at(words, n, a + r * X) & live;
        const int64_t end = width - X < step ? width - X : step;
        if (r == 1) {
            vi bit;
            for (int j = 0; j < W; ++j) bit[j] = 1 << j;
            const vi one = bits_to_int(broadcast(1.0f));
            for (int64_t i = 0; i < end; i += W) {
                const vi lanes = broadcast(static_cast<int32_t>(top >> i & ((1u << W) - 1))) & bit;
                store(out + X + i, bits_to_float((lanes != 0) & one));
            }
            continue;
        }
        const uint64_t bottom = bits_at(words, n, b + r * X) & live;
        const uint64_t ones = r == 2 ? 0x5555555555555555u : 0x1111111111111111u;
        const int low = r == 2 ? 0 : 1;
        const uint64_t pairs_a = (top >> low & ones) + (top >> (low + 1) & ones);
        const uint64_t pairs_b = (bottom >> low & ones) + (bottom >> (low + 1) & ones);
        if (r == 4) {
            store_quarters(pairs_a + pairs_b, out + X);
            continue;
        }
        for (int64_t i = 0; i < end; i += 16) {
            const int shift = static_cast<int>(2 * i);
            const uint64_t nibbles_a = pairs_to_nibbles(static_cast<uint32_t>(pairs_a >> shift));
            store_quarters(nibbles_a + pairs_to_nibbles(static_cast<uint32_t>(pairs_b >> shift)), out + X + i);
        }
    }
    return true;
}

template <class T>
SPROMPT_INLINE void dense_target_row(const T* row, int64_t width, float* out) {
    row_to_float(row, width, out);
}
SPROMPT_INLINE void dense_target_row(const uint8_t* row, int64_t width, float* out) {
    typedef uint8_t bytes __attribute__((vector_size(W)));
    int64_t x = 0;
    const vi one = bits_to_int(broadcast(1.0f));
    for (; x + W <= width; x += W) {
        bytes v;
        __builtin_memcpy(&v, row + x, W);
        store(out + x, bits_to_float((__builtin_convertvector(v, vi) != 0) & one));
    }
    for (; x < width; ++x) out[x] = row[x] != 0 ? 1.0f : 0.0f;
}

// out[0 .. width) <- row Y, with zeros behind it up to a multiple of W. `out` has space for 16 more floats. Returns false, and
// writes nothing, if the whole row of a bit mask is 0. Dense rows are always written.
static inline bool target_row(const TargetMap& map, int64_t Y, float* out) {
    if (map.ratio != 0) return bit_target_row(map, Y, out);
    const int64_t start = Y * map.row_stride;
    if (map.dtype == DType::u8 || map.dtype == DType::b8) {
        dense_target_row(static_cast<const uint8_t*>(map.data) + start, map.width, out);
    } else {
        SPROMPT_FLOAT_TYPES(map.dtype, T, dense_target_row(static_cast<const T*>(map.data) + start, map.width, out))
    }
    for (int64_t x = map.width; x % W != 0; ++x) out[x] = 0.0f;
    return true;
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
