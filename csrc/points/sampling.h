// Points of maps and of bit masks, W at a time. A map is copied to floats with a border of zeros, so that no cell around a
// point needs a check. Behind the map lie zeros for the points that have no cell in it.
#pragma once

#include "common/lanes.h"
#include "common/philox.h"
#include "common/vmath.h"

namespace sprompt {
namespace SPROMPT_ISA {

SPROMPT_INLINE bool all(vi condition) { return bits_of(condition) == (1u << W) - 1; }

// Lane i is the 32 bits at base + offset[i] bytes, or at base + 4 offset[i] for Scale 4.
template <int Scale>
SPROMPT_INLINE vi gather(const void* base, vi offset) {
#if defined(__AVX512F__)
    return (vi)_mm512_i32gather_ps((__m512i)offset, static_cast<const float*>(base), Scale);
#elif defined(__AVX2__)
    return (vi)_mm256_i32gather_epi32(static_cast<const int*>(base), (__m256i)offset, Scale);
#else
    vi v;
    for (int i = 0; i < W; ++i) {
        int32_t bits;
        __builtin_memcpy(&bits, static_cast<const char*>(base) + static_cast<int64_t>(Scale) * offset[i], 4);
        v[i] = bits;
    }
    return v;
#endif
}

// Lane i of a and b is base[offset[i]] and base[offset[i] + 1]: half of the loads of two gathers.
SPROMPT_INLINE void gather_pairs(const float* base, vi offset, vf& a, vf& b) {
#if defined(__AVX512F__)
    const __m512d low = _mm512_i32gather_pd((__m256i)_mm512_castps512_ps256((__m512)offset), base, 4);
    const __m512d high = _mm512_i32gather_pd((__m256i)_mm512_extractf32x8_ps((__m512)offset, 1), base, 4);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    a = (vf)_mm512_permutex2var_ps((__m512)low, even, (__m512)high);
    b = (vf)_mm512_permutex2var_ps((__m512)low, (__m512i)((vi)even + 1), (__m512)high);
#elif defined(__AVX2__)
    const double* pairs = reinterpret_cast<const double*>(base);
    const __m256 low = (__m256)_mm256_i32gather_pd(pairs, _mm256_castsi256_si128((__m256i)offset), 4);
    const __m256 high = (__m256)_mm256_i32gather_pd(pairs, _mm256_extracti128_si256((__m256i)offset, 1), 4);
    a = (vf)_mm256_permute4x64_pd((__m256d)_mm256_shuffle_ps(low, high, 0x88), 0xd8);
    b = (vf)_mm256_permute4x64_pd((__m256d)_mm256_shuffle_ps(low, high, 0xdd), 0xd8);
#else
    for (int i = 0; i < W; ++i) {
        a[i] = base[offset[i]];
        b[i] = base[offset[i] + 1];
    }
#endif
}

// ---- The points of an image or mask: drawn or given.

struct Points {
    const float* given;  // (T, 2), or null
    PhiloxKeys keys;
    int64_t mask;

    SPROMPT_INLINE Points(const View& points, const View& seed, int64_t m)
        : given(points.given() ? points.as<const float>() + m * points.stride[0] : nullptr),
          keys(points.given() ? 0 : *seed.as<const int64_t>()),
          mask(m) {}
    SPROMPT_INLINE void at(vi index, vf& x, vf& y) const {
        if (given == nullptr) return draw_points(keys, mask, index, x, y);
        gather_pairs(given, index + index, x, y);
    }
};

// ---- Cells around points.

struct Taps {
    vi first;  // the upper left of the four cells, or the zeros behind the map
    vf fx, fy;
};

// The cell below a coordinate, which is at least -1, and the rest.
SPROMPT_INLINE vi floor_of(vf place, vf& fraction) {
    vi cell = __builtin_convertvector(place, vi);
    cell += __builtin_convertvector(cell, vf) > place;
    fraction = place - __builtin_convertvector(cell, vf);
    return cell;
}

// Coordinates in a map of h x w cells; -1 for both where no cell of the map is around the point. Returns the other lanes.
SPROMPT_INLINE vi place_of(vf x, vf y, int64_t h, int64_t w, vf& px, vf& py) {
    const float width = static_cast<float>(w), height = static_cast<float>(h);
    px = x * width - 0.5f;
    py = y * height - 0.5f;
    const vi inside = (px > -1.0f) & (px < width) & (py > -1.0f) & (py < height);
    px = select(inside, px, broadcast(-1.0f));
    py = select(inside, py, broadcast(-1.0f));
    return inside;
}

// Rows [top, ...) of a map with its border: row r, column c is at (r - top) (w + 2) + c + 1.
SPROMPT_INLINE Taps taps_of(vf x, vf y, int64_t h, int64_t w, int32_t top, int32_t outside) {
    Taps taps;
    vf px, py;
    const vi inside = place_of(x, y, h, w, px, py);
    const vi column = floor_of(px, taps.fx), row = floor_of(py, taps.fy);
    taps.first = select_int(inside, (row - top) * static_cast<int32_t>(w + 2) + column + 1, broadcast(outside));
    return taps;
}

SPROMPT_INLINE vf value_at(const float* cells, int64_t stride, const Taps& taps) {
    vf a, b, c, d;
    gather_pairs(cells, taps.first, a, b);
    gather_pairs(cells + stride, taps.first, c, d);
    const vf upper = a + taps.fx * (b - a), lower = c + taps.fx * (d - c);
    return upper + taps.fy * (lower - upper);
}

// ---- Maps as floats with a border.

SPROMPT_INLINE void clear(float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = 0.0f;
}
// Floats of `rows` rows of w + 2 cells and the zeros behind them.
SPROMPT_INLINE int64_t bordered(int64_t rows, int64_t w) { return ((rows + 1) * (w + 2) + 2 + 15) / 16 * 16; }

// cells <- rows [top, top + rows) of a map, and zeros for rows outside of it and behind them.
template <class T>
static void take_rows(const T* map, int64_t row_stride, int64_t h, int64_t w, int64_t top, int64_t rows, float* cells) {
    for (int64_t r = 0; r < rows; ++r, cells += w + 2) {
        const int64_t y = top + r;
        if (y < 0 || y >= h) {
            clear(cells, w + 2);
            continue;
        }
        cells[0] = cells[w + 1] = 0.0f;
        row_to_float(map + y * row_stride, w, cells + 1);
    }
    clear(cells, w + 4);
}

// A whole map: row -1 is the first row of the cells.
struct Map {
    float* cells;
    int64_t h, w;

    SPROMPT_INLINE int64_t stride() const { return w + 2; }
    SPROMPT_INLINE Taps taps(vf x, vf y) const { return taps_of(x, y, h, w, -1, static_cast<int32_t>((h + 2) * (w + 2))); }
    SPROMPT_INLINE vf at(const Taps& taps) const { return value_at(cells, stride(), taps); }
    // Adds grad times the shares of the four cells, lane by lane, so that the order is fixed.
    SPROMPT_INLINE void add(const Taps& taps, vf grad) const {
        float share[4][W];
        int32_t first[W];
        const vf ex = 1.0f - taps.fx, ey = 1.0f - taps.fy, upper = grad * ey, lower = grad * taps.fy;
        store(share[0], upper * ex);
        store(share[1], upper * taps.fx);
        store(share[2], lower * ex);
        store(share[3], lower * taps.fx);
        store(first, taps.first);
        typedef float pair __attribute__((vector_size(8)));
        const auto add_pair = [](float* cell, pair more) __attribute__((always_inline)) {
            pair both;
            __builtin_memcpy(&both, cell, sizeof both);
            both += more;
            __builtin_memcpy(cell, &both, sizeof both);
        };
        for (int i = 0; i < W; ++i) {
            add_pair(cells + first[i], pair{share[0][i], share[1][i]});
            add_pair(cells + first[i] + stride(), pair{share[2][i], share[3][i]});
        }
    }
    SPROMPT_INLINE void clear_cells() const { clear(cells, bordered(h + 2, w)); }
    template <class T>
    SPROMPT_INLINE void write(T* out) const {
        for (int64_t y = 0; y < h; ++y) row_from_float(cells + (y + 1) * stride() + 1, w, out + y * w);
    }
};

template <class T>
SPROMPT_INLINE Map whole_map(const T* map, int64_t row_stride, int64_t h, int64_t w, float* cells) {
    take_rows(map, row_stride, h, w, -1, h + 2, cells);
    return {cells, h, w};
}

// ---- Bit masks.

struct Bits {
    const char* bytes;
    int64_t height, width;

    // Values at W points. The two bits of a row are read in one 32-bit word, which begins at the byte of the first bit, but at
    // the last word of the mask at most.
    SPROMPT_INLINE vf at(vf x, vf y) const {
        const float right = static_cast<float>(width - 1), bottom = static_cast<float>(height - 1);
        const vf px = x * static_cast<float>(width) - 0.5f, py = y * static_cast<float>(height) - 0.5f;
        const vi interior = (px >= 0.0f) & (px < right) & (py >= 0.0f) & (py < bottom);
        if (all(interior)) {  // nearly always
            vf fx, fy;
            const vi pixel = floor_of(py, fy) * static_cast<int32_t>(width) + floor_of(px, fx);
            const auto value = [&](vi first) __attribute__((always_inline)) {
                const vi word = word_at(first);
                const vf a = __builtin_convertvector(word & 1, vf), b = __builtin_convertvector(word >> 1 & 1, vf);
                return a + fx * (b - a);
            };
            const vf upper = value(pixel), lower = value(pixel + static_cast<int32_t>(width));
            return upper + fy * (lower - upper);
        }
        return at_border(x, y);
    }
    // The bits of a pixel and of the next pixel, as bits 0 and 1. If there is no next pixel, bit 1 means nothing.
    SPROMPT_INLINE vi word_at(vi pixel) const {
        const int32_t last = static_cast<int32_t>((height * width + 31) / 32 * 4 - 4);
        const vi byte = pixel >> 3, start = select_int(byte < last, byte, broadcast(last));
        return gather<1>(bytes, start) >> (pixel - (start << 3));
    }
    SPROMPT_INLINE vf at_border(vf x, vf y) const {
        if (height * width == 0) return vf{};
        vf px, py, fx, fy;
        const vi inside = place_of(x, y, height, width, px, py);
        const vi column = floor_of(px, fx), row = floor_of(py, fy);
        const vi left = column >= 0, right = (column + 1 < static_cast<int32_t>(width)) & inside;
        const auto value = [&](vi r, vi valid) __attribute__((always_inline)) {
            const vi first = r * static_cast<int32_t>(width) + select_int(left, column, vi{});
            const vi word = word_at(select_int(valid, first, vi{})), second = select_int(left, word >> 1, word);
            const vf a = __builtin_convertvector(word & 1 & left & valid, vf);
            const vf b = __builtin_convertvector(second & 1 & right & valid, vf);
            return a + fx * (b - a);
        };
        const vf upper = value(row, (row >= 0) & inside);
        const vf lower = value(row + 1, (row + 1 < static_cast<int32_t>(height)) & inside);
        return upper + fy * (lower - upper);
    }
};

// ---- The losses at W points.

// sigmoid(z) and log(1 + e^z).
struct Logistic {
    vf p, rest, softplus;

    SPROMPT_INLINE explicit Logistic(vf z) {
        const vf zero = {}, e = exp_small(max_or_second(broadcast(-87.3f), -absolute(z)));
        const vf inverse = 1.0f / (e + 1.0f), far = e * inverse;
        p = select(z < zero, far, inverse);
        rest = select(z < zero, inverse, far);
        softplus = log1p_unit(e) + max_or_second(zero, z);
    }
};

}  // namespace SPROMPT_ISA
}  // namespace sprompt
