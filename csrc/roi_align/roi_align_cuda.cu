// Forward: a block reads some channels of one box. It first lists the cells of every row and column of bins with their weights.
// Backward: a block owns a tile of cells of some channels and sums the gradients that reach them, box after box. So every cell
// is written once and no sum needs an atomic operation.
#include "roi_align/roi_align.h"

#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int threads = 256;
constexpr int box_channels = 64;                                     // of a block, forward
constexpr int tile_rows = 8, tile_columns = 32, tile_channels = 16;  // of a block, backward
constexpr int lines = tile_rows + tile_columns;
static_assert(tile_rows * tile_columns == threads);

struct Map {
    void* data;
    int64_t b, c, y, x;  // strides
    int32_t height, width;
    float pixels;  // of a cell
    int64_t tile;  // the first tile of this level
};

struct Problem {
    Map maps[max_views];
    int32_t levels;
    const float* boxes;  // (B, N, 4)
    const int64_t* counts;
    int64_t counts_b;
    int64_t N, C;
    int32_t size, sampling;
};

// The samples of one axis of a box.
struct Axis {
    float start, step, unit;  // unit: the weight of a sample in a bin
    int32_t cells, samples;   // of the map; of a side of the box

    // Of the columns of a box, or of its rows.
    __device__ Axis(const Problem& p, const Map& map, const float* box, bool column)
        : cells(column ? map.width : map.height), samples(p.size * p.sampling) {
        const float low = column ? box[0] : box[1], high = column ? box[2] : box[3], pixels = map.pixels;
        const float extent = high > low ? high - low : 0.0f;
        start = low / pixels - 0.5f;
        step = extent / pixels / static_cast<float>(samples);
        unit = 1.0f / static_cast<float>(p.sampling);
    }
    // Calls f(cell, weight) for the one or two cells of sample i that have a weight.
    template <class F>
    __device__ void cells_of(int32_t i, const F& f) const {
        const float at = place(i);
        if (!(at >= -1.0f && at <= static_cast<float>(cells))) return;
        const float held = clamped(at);
        const int32_t cell = static_cast<int32_t>(held);
        const float after = held - static_cast<float>(cell);
        f(cell, (1.0f - after) * unit);
        if (after > 0.0f) f(cell + 1, after * unit);
    }
    // Whether a sample may have a weight in cells [first, last).
    __device__ bool reaches(int32_t first, int32_t last) const {
        return clamped(place(0)) < static_cast<float>(last) && clamped(place(samples - 1)) > static_cast<float>(first) - 1.0f;
    }

  private:
    __device__ float place(int32_t i) const { return start + (static_cast<float>(i) + 0.5f) * step; }
    __device__ float clamped(float at) const {
        const float end = static_cast<float>(cells - 1);
        return at < 0.0f ? 0.0f : at > end ? end : at;
    }
};

// The level of box n of picture b, or -1 if the box is not read.
__device__ int32_t level_of(const Problem& p, int64_t b, int64_t n) {
    if (p.counts != nullptr && n >= p.counts[b * p.counts_b]) return -1;
    const float* box = p.boxes + 4 * (b * p.N + n);
    for (int k = 0; k < 4; ++k)
        if (!(fabsf(box[k]) < INFINITY)) return -1;
    const float width = box[2] > box[0] ? box[2] - box[0] : 0.0f, height = box[3] > box[1] ? box[3] - box[1] : 0.0f;
    const float t = sqrtf(width * height) / 56.0f + 1e-6f;  // floor(log2 t) is at least v where t is at least 2^v
    int32_t level = 0;
    for (float power = 2.0f; level + 1 < p.levels && t >= power; power *= 2.0f) ++level;
    return p.maps[level].height > 0 && p.maps[level].width > 0 ? level : -1;
}

// `across`: neighbouring threads compute neighbouring channels, else neighbouring bins.
template <class T>
__global__ void __launch_bounds__(threads, 4) forward_kernel(Problem p, T* out) {  // (B, N, C, size, size)
    // Of rows, then of columns: the number of cells of each bin, and 2 * sampling places for cells and weights.
    SPROMPT_SHARED_DYNAMIC(int32_t, numbers);
    const int32_t places = 2 * p.sampling, most = p.size * places;
    int32_t* const cells = numbers + 2 * p.size;
    float* const weights = reinterpret_cast<float*>(cells + 2 * most);
    const int64_t groups = (p.C + box_channels - 1) / box_channels, box = blockIdx.x / groups, b = box / p.N;
    const int64_t c = blockIdx.x % groups * box_channels;
    const int32_t channels = static_cast<int32_t>(p.C - c < box_channels ? p.C - c : box_channels);
    const int32_t bins = p.size * p.size, level = level_of(p, b, box % p.N);
    T* const to = out + (box * p.C + c) * bins;
    if (level < 0) {
        for (int32_t i = static_cast<int32_t>(threadIdx.x); i < channels * bins; i += threads) from_float(0.0f, to + i);
        return;
    }
    const Map& map = p.maps[level];
    const float* corner = p.boxes + 4 * box;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < 2 * p.size; i += threads) {
        const bool column = i >= p.size;
        const Axis axis(p, map, corner, column);
        const int32_t bin = column ? i - p.size : i;
        int32_t *own = cells + i * places, count = 0;
        float* own_weights = weights + i * places;
        for (int32_t k = 0; k < p.sampling; ++k)
            axis.cells_of(bin * p.sampling + k, [&](int32_t cell, float weight) {
                // Samples ascend, so a cell that the bin has already is one of the last two.
                for (int32_t j = count - 1; j >= 0 && j >= count - 2; --j)
                    if (own[j] == cell) {
                        own_weights[j] += weight;
                        return;
                    }
                own[count] = cell;
                own_weights[count++] = weight;
            });
        numbers[i] = count;
    }
    __syncthreads();
    const T* planes = static_cast<const T*>(map.data) + b * map.b + c * map.c;
    const bool across = map.c == 1 && map.x != 1;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < channels * bins; i += threads) {
        const int32_t k = across ? i % channels : i / bins, bin = across ? i / channels : i % bins;
        const int32_t y = bin / p.size, x = p.size + bin % p.size;
        const T* plane = planes + k * map.c;
        float sum = 0.0f;
        for (int32_t column = x * places; column < x * places + numbers[x]; ++column) {
            const T* at = plane + cells[column] * map.x;
            float line = 0.0f;
            for (int32_t row = y * places; row < y * places + numbers[y]; ++row)
                line = __fmaf_rn(weights[row], to_float(at[cells[row] * map.y]), line);
            sum = __fmaf_rn(weights[column], line, sum);
        }
        from_float(sum, to + k * bins + bin);
    }
}

template <class T>
__global__ void __launch_bounds__(threads, 2) backward_kernel(Problem p, int64_t tiles_of_picture,
                                                              const T* grad) {  // (B, N, C, size, size)
    // The weights of the tile's rows, then of its columns, in every bin of the box, (lines, size).
    SPROMPT_SHARED_DYNAMIC(float, table);
    SPROMPT_SHARED(unsigned, hits, threads / warp);  // boxes that reach the tile, one bit each
    SPROMPT_SHARED(int32_t, bounds, 2 * lines);      // first and last bin with a weight of every line, -1 if there is none
    const int64_t groups = (p.C + tile_channels - 1) / tile_channels;
    const int64_t c = blockIdx.x % groups * tile_channels, tile = blockIdx.x / groups % tiles_of_picture;
    const int64_t b = blockIdx.x / groups / tiles_of_picture;
    const int thread = static_cast<int>(threadIdx.x), row = thread / tile_columns, column = thread % tile_columns;
    int32_t v = p.levels - 1;
    while (p.maps[v].tile > tile) --v;
    const Map& map = p.maps[v];
    const int32_t tiles_across = (map.width + tile_columns - 1) / tile_columns;
    const int32_t top = static_cast<int32_t>((tile - map.tile) / tiles_across) * tile_rows;
    const int32_t left = static_cast<int32_t>((tile - map.tile) % tiles_across) * tile_columns;
    const int64_t channels = p.C - c < tile_channels ? p.C - c : tile_channels;
    const int64_t bins = static_cast<int64_t>(p.size) * p.size;
    float sum[tile_channels] = {};
    for (int64_t first = 0; first < p.N; first += threads) {
        const int64_t n = first + thread;
        const float* own = p.boxes + 4 * (b * p.N + n);
        const bool hit = n < p.N && level_of(p, b, n) == v && Axis(p, map, own, false).reaches(top, top + tile_rows) &&
                         Axis(p, map, own, true).reaches(left, left + tile_columns);
        const unsigned votes = __ballot_sync(whole_warp, hit);
        if (thread % warp == 0) hits[thread / warp] = votes;
        __syncthreads();
        for (int word = 0; word < threads / warp; ++word)
            for (unsigned left_over = hits[word]; left_over != 0; left_over &= left_over - 1) {
                const int64_t index = b * p.N + first + word * warp + __ffs(static_cast<int>(left_over)) - 1;
                const float* box = p.boxes + 4 * index;
                for (int32_t i = thread; i < lines * p.size; i += threads) {
                    const int32_t line = i / p.size, bin = i % p.size;
                    const bool of_row = line < tile_rows;
                    const int32_t wanted = of_row ? top + line : left + line - tile_rows;
                    const Axis axis(p, map, box, !of_row);
                    float weight = 0.0f;
                    for (int32_t k = 0; k < p.sampling; ++k)
                        axis.cells_of(bin * p.sampling + k, [&](int32_t cell, float part) {
                            if (cell == wanted) weight += part;
                        });
                    table[i] = weight;
                }
                __syncthreads();
                if (thread < lines) {
                    int32_t low = -1, high = -1;
                    for (int32_t bin = 0; bin < p.size; ++bin)
                        if (table[thread * p.size + bin] > 0.0f) {
                            low = low < 0 ? bin : low;
                            high = bin;
                        }
                    bounds[2 * thread] = low;
                    bounds[2 * thread + 1] = high;
                }
                __syncthreads();
                const int32_t* y_bounds = bounds + 2 * row;
                const int32_t* x_bounds = bounds + 2 * (tile_rows + column);
                if (y_bounds[0] >= 0 && x_bounds[0] >= 0)
                    for (int32_t y = y_bounds[0]; y <= y_bounds[1]; ++y)
                        for (int32_t x = x_bounds[0]; x <= x_bounds[1]; ++x) {
                            const float weight = table[row * p.size + y] * table[(tile_rows + column) * p.size + x];
                            const T* g = grad + (index * p.C + c) * bins + y * p.size + x;
#pragma unroll
                            for (int k = 0; k < tile_channels; ++k)
                                if (k < channels) sum[k] = __fmaf_rn(weight, to_float(g[k * bins]), sum[k]);
                        }
                __syncthreads();  // before the table of the next box
            }
        __syncthreads();  // before the next hits
    }
    if (top + row >= map.height || left + column >= map.width) return;
    T* to = static_cast<T*>(map.data) + b * map.b + c * map.c + (top + row) * map.y + (left + column) * map.x;
#pragma unroll
    for (int k = 0; k < tile_channels; ++k)
        if (k < channels) from_float(sum[k], to + k * map.c);
}

Problem problem_of(const Views& maps, const View& boxes, const View& counts, const View& strides, int64_t size,
                   int64_t sampling) {
    Problem p{};
    p.levels = maps.count;
    for (int32_t v = 0; v < maps.count; ++v) {
        const View& map = maps.view[v];
        p.maps[v] = {map.data,
                     map.stride[0],
                     map.stride[1],
                     map.stride[2],
                     map.stride[3],
                     static_cast<int32_t>(map.size[2]),
                     static_cast<int32_t>(map.size[3]),
                     static_cast<float>(strides.as<const int64_t>()[v]),
                     0};
    }
    p.boxes = boxes.as<const float>();
    p.counts = counts.as<const int64_t>();
    p.counts_b = counts.stride[0];
    p.N = boxes.size[1];
    p.C = maps.view[0].size[1];
    p.size = static_cast<int32_t>(size);
    p.sampling = static_cast<int32_t>(sampling);
    return p;
}

}  // namespace

void roi_align(const Stream& stream, const Views& maps, const View& boxes, const View& counts, const View& strides,
               int64_t sampling, const View& out) {
    const Problem p = problem_of(maps, boxes, counts, strides, out.size[3], sampling);
    const int64_t shared = 4 * (2 * p.size + 8 * p.size * p.sampling);
    SPROMPT_DEVICE_FLOATS(
        out.dtype, T,
        launch(stream, forward_kernel<T>, boxes.size[0] * p.N * tiles(p.C, box_channels), threads, shared, p, out.as<T>()));
}

void roi_align_backward(const Stream& stream, const View& grad, const View& boxes, const View& counts, const View& strides,
                        int64_t sampling, const Views& out) {
    Problem p = problem_of(out, boxes, counts, strides, grad.size[3], sampling);
    int64_t number = 0;
    for (int32_t v = 0; v < p.levels; ++v) {
        p.maps[v].tile = number;
        number += tiles(p.maps[v].height, tile_rows) * tiles(p.maps[v].width, tile_columns);
    }
    SPROMPT_DEVICE_FLOATS(grad.dtype, T,
                          launch(stream, backward_kernel<T>, boxes.size[0] * number * tiles(p.C, tile_channels), threads,
                                 int64_t{4} * lines * p.size, p, number, grad.as<const T>()));
}

}  // namespace cuda
}  // namespace sprompt
