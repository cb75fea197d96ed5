// Points of some queries on one level: their cells, and their rows of values.
#pragma once

#include "common/lanes.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr int64_t block = 32;  // queries whose points are located together

SPROMPT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct Level {
    int64_t first, height, width;  // the first cell, and the size of the map
    int64_t place, number;         // the first point, and the number of points
    int32_t last_x, last_y;        // a cell left of last_x and above last_y has all corners inside the map
};

// Level v of levels (V, 3).
static Level level_of(const View& levels, int64_t v) {
    Level level{};
    const int64_t* size = levels.as<const int64_t>();
    for (int64_t i = 0; i < v; ++i, size += 3) {
        level.first += size[0] * size[1];
        level.place += size[2];
    }
    level.height = size[0];
    level.width = size[1];
    level.number = size[2];
    level.last_y = static_cast<int32_t>(size[0] > 0 ? size[0] - 1 : 0);
    level.last_x = static_cast<int32_t>(size[1] > 0 ? size[1] - 1 : 0);
    return level;
}

// n numbers of a float tensor, from element `offset`.
SPROMPT_INLINE void read_floats(const View& from, int64_t offset, int64_t n, float* to) {
    if (from.dtype == DType::f32) {
        const float* in = from.as<const float>() + offset;
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) __builtin_memcpy(to + i, in + i, 16);
        for (; i < n; ++i) to[i] = in[i];
        return;
    }
    SPROMPT_FLOAT_TYPES(from.dtype, T, row_to_float(from.as<const T>() + offset, n, to))
}
SPROMPT_INLINE void write_floats(const float* from, int64_t n, const View& to, int64_t offset) {
    if (to.dtype == DType::f32) {
        float* out = to.as<float>() + offset;
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) __builtin_memcpy(out + i, from + i, 16);
        for (; i < n; ++i) out[i] = from[i];
        return;
    }
    SPROMPT_FLOAT_TYPES(to.dtype, T, row_from_float(from, n, to.as<T>() + offset))
}

// Prefetches n elements of a float tensor, from element `offset`. The rows of one head lie far apart, so the hardware does not.
template <int write>
SPROMPT_INLINE void prefetch(const View& x, int64_t offset, int64_t n) {
    const int64_t size = x.dtype == DType::f32 ? 4 : 2;
    const char* p = x.as<const char>() + offset * size;
    for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(p + i, write);
    __builtin_prefetch(p + n * size - 1, write);
}

// Memory for the points of one level of `block` queries.
struct Located {
    float* share;   // x and y of every point: its distance from the cell to the left or above, in [0, 1)
    float* weight;  // of every point
    int32_t* cell;  // x and y of every point: the cell to the left or above; -2 if the point samples nothing
};

// Floats that Located takes, for at most `number` points a query on one level.
SPROMPT_INLINE int64_t located_floats(int64_t number) { return 5 * block * number + 3 * W; }
SPROMPT_INLINE Located located_at(float* memory, int64_t number) {
    return {memory, memory + 2 * block * number + W, reinterpret_cast<int32_t*>(memory + 3 * block * number + 2 * W)};
}

// Locates the points of queries [q, q + count) of image b and head h.
static void locate(const View& points, const View& weights, const Level& level, int64_t b, int64_t h, int64_t q, int64_t count,
                   const Located& out) {
    const int64_t n = level.number;
    if (n == 0) return;
    const int64_t point = b * points.stride[0] + h * points.stride[2] + 2 * level.place;
    const int64_t weight = b * weights.stride[0] + h * weights.stride[2] + level.place;
    for (int64_t i = q + block; i < smaller(q + 2 * block, points.size[1]); ++i) {
        prefetch<0>(points, point + i * points.stride[1], 2 * n);
        prefetch<0>(weights, weight + i * weights.stride[1], n);
    }
    for (int64_t i = 0; i < count; ++i) {
        read_floats(points, point + (q + i) * points.stride[1], 2 * n, out.share + 2 * n * i);
        read_floats(weights, weight + (q + i) * weights.stride[1], n, out.weight + n * i);
    }
    vf size;
    for (int i = 0; i < W; ++i) size[i] = static_cast<float>(i % 2 == 0 ? level.width : level.height);
    for (int64_t i = 0; i < 2 * n * count; i += W) {
        const vf at = fma(load(out.share + i), size, broadcast(-0.5f));
        const vi samples = (at > broadcast(-1.0f)) & (at < size);  // false for NaN
        const vf x = select(samples, at, broadcast(0.0f));
        const vi towards_zero = __builtin_convertvector(x, vi);
        const vf whole = __builtin_convertvector(towards_zero, vf);
        const vi above = whole > x;  // -1 where the conversion rounded up
        store(out.share + i, x - select(above, whole - broadcast(1.0f), whole));
        store(out.cell + i, ((towards_zero + above) & samples) | (broadcast(-2) & ~samples));
    }
}

// One point: its four corners, numbered by row, then column.
struct Point {
    int32_t x, y;  // of the corner at the top left
    float right, below, weight;

    SPROMPT_INLINE Point(const Located& located, int64_t i)
        : x(located.cell[2 * i]),
          y(located.cell[2 * i + 1]),
          right(located.share[2 * i]),
          below(located.share[2 * i + 1]),
          weight(located.weight[i]) {}

    // Whether the map holds all corners.
    SPROMPT_INLINE bool inside(const Level& level) const {
        return static_cast<uint32_t>(x) < static_cast<uint32_t>(level.last_x) &&
               static_cast<uint32_t>(y) < static_cast<uint32_t>(level.last_y);
    }
    // Whether the map holds the corner.
    SPROMPT_INLINE bool holds(const Level& level, int corner) const {
        return static_cast<uint32_t>(x + corner % 2) < static_cast<uint32_t>(level.width) &&
               static_cast<uint32_t>(y + corner / 2) < static_cast<uint32_t>(level.height);
    }
    SPROMPT_INLINE int64_t cell(const Level& level, int corner) const {
        return (y + corner / 2) * level.width + x + corner % 2;
    }
    SPROMPT_INLINE float share(int corner) const { return (corner % 2 ? right : 1 - right) * (corner / 2 ? below : 1 - below); }
};

// Calls f(Vectors<N>) with N * W = width for the N that have code of their own, else with N = 0.
template <int N>
struct Vectors {
    static constexpr int count = N;
};
template <class F>
SPROMPT_INLINE void by_vectors(int64_t width, const F& f) {
    if (width == W)
        f(Vectors<1>());
    else if (width == 2 * W)
        f(Vectors<2>());
    else if (width == 4 * W)
        f(Vectors<4>());
    else if (width == 8 * W)
        f(Vectors<8>());
    else
        f(Vectors<0>());
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
