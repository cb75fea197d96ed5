// A block makes the words that start in one tile of a picture: some rows (the "band") of up to 2048 columns. Pixels are made
// row by row, 32 columns per warp and one bit per lane, into rows of bits in shared memory. The words of the flattened picture
// are not aligned to its rows. At the end they are cut out of the rows of bits. The last word of a row continues in the rows
// below.
//
// Enlarging: the cells under the tile are staged in shared memory and clamped to +-2^127. Each cell is compared with the
// threshold once. An interpolated value never leaves the range of its cells, except for rounding. So 64 pixels of a row need no
// arithmetic if all their cells lie on one side. A warp decides that for 32 rows at once, one row per lane. The other rows are
// taken in runs that lie between the same two source rows. A lane keeps both source rows, interpolated at its columns, in
// registers. Reducing: every pixel loads its four cells.
#include "resize_masks/resize_masks.h"

#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int threads = 256, warps = threads / warp;
constexpr int slot_words = 2;           // a slot: the words of 32 columns that a warp makes at a time when enlarging
constexpr int tile_words = 64;          // words of a row of a tile, at most
constexpr int batch = 4;                // loads of a lane in flight
constexpr int64_t most_shared = 40960;  // bytes of a block: 227 KB of a multiprocessor hold five blocks, 100 KB hold two
constexpr int64_t least_blocks = 256;   // with fewer blocks, bands are made shorter
constexpr float largest = 0x1p127f;

// floor(s) and s - floor(s) of an output coordinate; the header defines s.
struct alignas(8) Place {
    int32_t cell;
    float weight;
};

// The two cells of an output coordinate and their weights.
struct alignas(16) Tap {
    int32_t first, second;
    float w0, w1;
};

__device__ inline Tap tap_of(Place p) {
    const float w0 = __fsub_rn(1.0f, p.weight);
    return {w0 > 0.0f ? p.cell : p.cell + 1, p.weight > 0.0f ? p.cell + 1 : p.cell, w0, p.weight};
}

struct Plan {
    const Place* columns;                     // (width)
    const Place* rows;                        // (height)
    int64_t stride_m, stride_y, stride_x, n;  // of soft; words a picture
    int32_t height, width;
    float threshold, low, high;          // cells below `low` (above `high`) on all sides give a pixel that is not set (is set)
    int32_t band, tail;                  // rows of a band; rows below the band that its last word may reach
    int32_t bands, tiles, tile_columns;  // of a picture; a tile's columns are a multiple of 32
    int32_t pitch, wrap;                 // words of a row of bits; the word among them that holds columns 0 to 31
    // Staging. window_y: rows, at most. line: floats of a line. A line has two words of bits for every 32 cells, then the
    // cells. Bit i of the first word is set where cell i is above `high`, of the second where it is below `low`. windows: pairs
    // of words in a line.
    int32_t window_y, line, windows;
};

// The tile of this block.
struct Tile {
    int64_t map;
    int32_t y, x;                 // the first pixel
    int32_t band, rows, columns;  // the block writes the words of `band` rows and `columns` columns; `rows` is band + tail
    int32_t words;                // words of a row to make: the last word of a row may reach 31 columns beyond the tile
};

__device__ inline Tile tile_of(const Plan& plan) {
    const unsigned tile = blockIdx.x % static_cast<unsigned>(plan.tiles), rest = blockIdx.x / static_cast<unsigned>(plan.tiles);
    Tile t;
    t.map = rest / static_cast<unsigned>(plan.bands);
    t.y = static_cast<int32_t>(rest % static_cast<unsigned>(plan.bands)) * plan.band;
    t.x = static_cast<int32_t>(tile) * plan.tile_columns;
    t.band = min(plan.band, plan.height - t.y);
    t.rows = min(plan.band + plan.tail, plan.height - t.y);
    t.columns = min(plan.tile_columns, plan.width - t.x);
    t.words = min((plan.width - t.x - 1) / 32 + 1, plan.tile_columns / 32 + (plan.tiles > 1 ? 1 : 0));
    return t;
}

__device__ inline uint32_t low_bits(int count) { return count >= 32 ? ~0u : (1u << count) - 1; }

__global__ void __launch_bounds__(threads)
    places_kernel(Place* places,  // (width + height): of columns, then of rows
                  int64_t width, int64_t height, int64_t w, int64_t h, double step_x, double step_y) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (i >= width + height) return;
    const bool of_row = i >= width;
    double s = (static_cast<double>(of_row ? i - width : i) + 0.5) * (of_row ? step_y : step_x) - 0.5;
    s = s > 0.0 ? s : 0.0;
    const double last = static_cast<double>((of_row ? h : w) - 1);
    s = s < last ? s : last;
    const int32_t k = static_cast<int32_t>(s);
    places[i] = {k, static_cast<float>(s - static_cast<double>(k))};
}

// Makes words [0, words) of the rows of the band, and word `wrap` of the rows from `from` on, without staging.
template <class T>
__device__ inline void sample(const Plan& plan, const Tile& t, const T* map, int words, int from, const Tap* taps, int top,
                              int line, uint32_t* bits) {
    const int lane = static_cast<int>(threadIdx.x % warp), own = t.band * words, jobs = own + t.rows - from;
    for (int job = static_cast<int>(threadIdx.x / warp); job < jobs; job += batch * warps) {
        float a[batch], b[batch], c[batch], d[batch];
        Tap across[batch];
        int row[batch], word[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            const int it = min(job + i * warps, jobs - 1);
            row[i] = it < own ? it / words : from + it - own;
            word[i] = it < own ? it % words : plan.wrap;
            const int column = it < own ? t.x + 32 * word[i] : 0;
            across[i] = tap_of(plan.columns[column + min(lane, plan.width - 1 - column)]);
            const Tap down = taps[row[i]];
            const T* upper = map + (top + down.first / line) * plan.stride_y;
            const T* lower = map + (top + down.second / line) * plan.stride_y;
            a[i] = to_float(upper[across[i].first * plan.stride_x]);
            b[i] = to_float(upper[across[i].second * plan.stride_x]);
            c[i] = to_float(lower[across[i].first * plan.stride_x]);
            d[i] = to_float(lower[across[i].second * plan.stride_x]);
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            const Tap down = taps[row[i]];
            const float upper = blend(held(a[i]), held(b[i]), across[i].w0, across[i].w1);
            const float lower = blend(held(c[i]), held(d[i]), across[i].w0, across[i].w1);
            const uint32_t made = __ballot_sync(whole_warp, blend(upper, lower, down.w0, down.w1) > plan.threshold);
            if (lane == 0 && job + i * warps < jobs) bits[row[i] * plan.pitch + word[i]] = made;
        }
    }
}

// Copies cells [left, left + cells) of rows [top, top + rows) of the map to the lines, and compares them with the threshold.
template <class T>
__device__ inline void stage(const Plan& plan, const T* map, int top, int rows, int left, int cells, float* lines) {
    const int lane = static_cast<int>(threadIdx.x % warp);
    const int64_t next = 32 * plan.stride_x;
    map += top * plan.stride_y + (left + lane) * plan.stride_x;
    for (int row = static_cast<int>(threadIdx.x / warp); row < rows; row += warps) {
        const T* from = map + row * plan.stride_y;
        uint2* sides = reinterpret_cast<uint2*>(lines + row * plan.line);
        float* to = lines + row * plan.line + 2 * plan.windows + lane;
        for (int rest = cells - lane; rest + lane > 0; rest -= 32 * batch, sides += batch, to += 32 * batch) {
            float x[batch];
#pragma unroll
            for (int i = 0; i < batch; ++i, from += next) x[i] = 32 * i < rest ? to_float(*from) : 0.0f;
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                const float cell = held(x[i]);
                const uint32_t above = __ballot_sync(whole_warp, cell > plan.high);
                const uint32_t below = __ballot_sync(whole_warp, cell < plan.low);
                if (32 * i < rest) to[32 * i] = cell;
                if (lane == 0) sides[i] = {above, below};
            }
        }
    }
}

// One warp makes the words of one slot in rows [base, stop), from staged cells. `left` is the first staged column.
__device__ inline void slot(const Plan& plan, int column, int left, int base, int stop, const Tap* taps, const float* lines,
                            uint32_t* bits) {
    const int lane = static_cast<int>(threadIdx.x % warp);
    const float *first[slot_words], *second[slot_words];  // the cells of the lane's columns in line 0
    float w0[slot_words], w1[slot_words];
    unsigned begin = 0, end = 0;
#pragma unroll
    for (int i = 0; i < slot_words; ++i) {
        const Tap tap = tap_of(plan.columns[column + min(32 * i + lane, plan.width - 1 - column)]);
        if (i == 0) begin = __shfl_sync(whole_warp, static_cast<unsigned>(tap.first - left), 0);
        if (i == slot_words - 1)
            end = __shfl_sync(whole_warp, static_cast<unsigned>(tap.second - left), warp - 1);  // inclusive
        first[i] = lines + 2 * plan.windows + (tap.first - left);
        second[i] = lines + 2 * plan.windows + (tap.second - left);
        w0[i] = tap.w0, w1[i] = tap.w1;
    }

    bits += base * plan.pitch;
    for (; base < stop; base += warp) {
        // One row per lane.
        const int count = min(stop - base, warp);
        const bool there = lane < count;
        const Tap mine = taps[base + (there ? lane : 0)];
        const uint2* const upper = reinterpret_cast<const uint2*>(lines + mine.first);
        const uint2* const lower = reinterpret_cast<const uint2*>(lines + mine.second);
        uint32_t not_above = 0, not_below = 0;
#pragma unroll 1
        for (unsigned k = begin / 32; k <= end / 32; ++k) {
            const uint32_t under = (k == begin / 32 ? ~0u << begin % 32 : ~0u) & (k == end / 32 ? ~0u >> (31 - end % 32) : ~0u);
            const uint2 a = upper[k], b = lower[k];
            not_above |= ~(a.x & b.x) & under;
            not_below |= ~(a.y & b.y) & under;
        }
        const bool mixed = there && not_above != 0 && not_below != 0;
        const uint32_t fill = not_above == 0 ? ~0u : 0u;
        if (there && !mixed) *reinterpret_cast<uint2*>(bits + lane * plan.pitch) = {fill, fill};
        const int first_above = __shfl_up_sync(whole_warp, mine.first, 1),
                  second_above = __shfl_up_sync(whole_warp, mine.second, 1);
        const uint32_t starts =
            __ballot_sync(whole_warp, lane == 0 || lane == count || first_above != mine.first || second_above != mine.second);

        // Two columns per lane.
        float top[slot_words], bottom[slot_words];
        int bottom_line = -1;
        for (uint32_t rest = __ballot_sync(whole_warp, mixed); rest != 0;) {
            const int row = __ffs(static_cast<int>(rest)) - 1;
            const uint32_t later = starts & ~((2u << row) - 1);
            const int last = later != 0 ? __ffs(static_cast<int>(later)) - 1 : warp;
            rest &= last < warp ? ~0u << last : 0u;  // either all rows of a run are mixed, or none
            const Tap* tap = taps + base + row;
            const int upper_line = tap->first, lower_line = tap->second;
            if (upper_line == bottom_line) {
#pragma unroll
                for (int i = 0; i < slot_words; ++i) top[i] = bottom[i];
            } else {
#pragma unroll
                for (int i = 0; i < slot_words; ++i) top[i] = blend(first[i][upper_line], second[i][upper_line], w0[i], w1[i]);
            }
            bottom_line = lower_line;
#pragma unroll
            for (int i = 0; i < slot_words; ++i) bottom[i] = blend(first[i][lower_line], second[i][lower_line], w0[i], w1[i]);
            uint32_t* out = bits + row * plan.pitch;
#pragma unroll 4
            for (const Tap* const after = tap + (last - row); tap != after; ++tap, out += plan.pitch) {
                uint2 made;
                made.x = __ballot_sync(whole_warp, blend(top[0], bottom[0], tap->w0, tap->w1) > plan.threshold);
                made.y = __ballot_sync(whole_warp, blend(top[1], bottom[1], tap->w0, tap->w1) > plan.threshold);
                if (lane == 0) *reinterpret_cast<uint2*>(out) = made;
            }
        }
        bits += warp * plan.pitch;
    }
}

// Writes the words of the picture that start in the tile. Bits of columns beyond the picture may have any value.
__device__ inline void assemble(const Plan& plan, const Tile& t, const uint32_t* bits, uint32_t* words) {
    const unsigned columns = static_cast<unsigned>(t.columns), in_row = (columns + 31) / 32;  // words of a row, at most
    const unsigned step_row = threads / in_row, step = threads % in_row;
    unsigned row = threadIdx.x / in_row, i = threadIdx.x % in_row;
    while (row < static_cast<unsigned>(t.band)) {
        // A picture has less than 2^31 pixels.
        const unsigned begin =
            (static_cast<unsigned>(t.y) + row) * static_cast<unsigned>(plan.width) + static_cast<unsigned>(t.x);
        const unsigned word = (begin + 31) / 32 + i, x = word * 32 - begin;
        if (x < columns) {
            const uint32_t* line = bits + row * static_cast<unsigned>(plan.pitch) + x / 32;
            uint32_t made = __funnelshift_r(line[0], line[1], x % 32);
            int got = plan.width - t.x - static_cast<int>(x);
            if (got < 32) {
                made &= low_bits(got);
                for (int y = static_cast<int>(row) + 1; got < 32 && y < t.rows; ++y, got += plan.width)
                    made |= (bits[y * plan.pitch + plan.wrap] & low_bits(plan.width)) << got;
            }
            words[word] = made;
        }
        row += step_row, i += step;
        if (i >= in_row) i -= in_row, ++row;
    }
}

// Computes the taps of the tile's rows and returns the first source row. The taps count source rows from there, times `line`.
__device__ inline int take_rows(const Plan& plan, const Tile& t, int line, Tap* taps) {
    const int top = tap_of(plan.rows[t.y]).first;
    const int row = static_cast<int>(threadIdx.x);
    if (row < t.rows) {  // band + tail are below 256
        Tap tap = tap_of(plan.rows[t.y + row]);
        tap.first = (tap.first - top) * line, tap.second = (tap.second - top) * line;
        taps[row] = tap;
    }
    return top;
}

// Shared memory: taps (band + tail), lines (window_y, line), bits (band + tail, pitch) and one more word.
template <class T>
__global__ void __launch_bounds__(threads, 5) enlarge_kernel(const T* __restrict__ soft, uint32_t* words, const Plan plan) {
    SPROMPT_SHARED_DYNAMIC(Tap, taps);
    float* const lines = reinterpret_cast<float*>(taps + plan.band + plan.tail);
    uint32_t* const bits = reinterpret_cast<uint32_t*>(lines + plan.window_y * plan.line);
    const Tile t = tile_of(plan);
    const T* const map = soft + t.map * plan.stride_m;
    const int top = take_rows(plan, t, plan.line, taps), bottom = tap_of(plan.rows[t.y + t.rows - 1]).second;
    const int left = tap_of(plan.columns[t.x]).first;
    const int slots = (t.words + slot_words - 1) / slot_words;
    const int right = tap_of(plan.columns[t.x + min(32 * slot_words * slots, plan.width - t.x) - 1]).second;
    stage(plan, map, top, bottom - top + 1, left, right - left + 1, lines);
    __syncthreads();
    const bool alone = plan.tiles == 1;
    for (int i = static_cast<int>(threadIdx.x / warp); i < slots; i += warps)
        slot(plan, t.x + 32 * slot_words * i, left, 0, t.band, taps, lines, bits + slot_words * i);
    // The last warp has the fewest slots.
    if (alone && t.rows > t.band && threadIdx.x / warp == warps - 1) slot(plan, 0, left, t.band, t.rows, taps, lines, bits);
    if (!alone) sample(plan, t, map, 0, 1, taps, top, plan.line, bits);
    __syncthreads();
    assemble(plan, t, bits, words + t.map * plan.n);
}

// Shared memory: taps (band + tail), bits (band + tail, pitch) and one more word.
template <class T>
__global__ void __launch_bounds__(threads, 4) reduce_kernel(const T* __restrict__ soft, uint32_t* words, const Plan plan) {
    SPROMPT_SHARED_DYNAMIC(Tap, taps);
    uint32_t* const bits = reinterpret_cast<uint32_t*>(taps + plan.band + plan.tail);
    const Tile t = tile_of(plan);
    const int top = take_rows(plan, t, 1, taps);
    __syncthreads();
    sample(plan, t, soft + t.map * plan.stride_m, t.words, plan.tiles == 1 ? t.band : 1, taps, top, 1, bits);
    __syncthreads();
    assemble(plan, t, bits, words + t.map * plan.n);
}

// Cells that `pixels` neighbouring pixels reach, at most. Their coordinates span (pixels - 1) * step, and each pixel reaches
// two cells.
int64_t window(int64_t pixels, double step, int64_t cells) {
    const double reach = static_cast<double>(pixels - 1) * step + 4.0;  // 3, and one for rounding
    return reach < static_cast<double>(cells) ? static_cast<int64_t>(reach) : cells;
}

}  // namespace

void resize_masks(const Stream& stream, const View& soft, int64_t height, int64_t width, float threshold, double extent_height,
                  double extent_width, const View& words, const View& scratch) {
    const int64_t h = soft.size[1], w = soft.size[2];
    if (h > INT32_MAX || w > INT32_MAX) throw Failure("a map of more than 2^31 - 1 rows or columns");
    const double step_y = extent_height / static_cast<double>(height), step_x = extent_width / static_cast<double>(width);
    Place* const places = scratch.as<Place>();
    launch(stream, places_kernel, tiles(width + height, threads), threads, 0, places, width, height, w, h, step_x, step_y);

    Plan plan{};
    plan.columns = places;
    plan.rows = places + width;
    plan.stride_m = soft.stride[0], plan.stride_y = soft.stride[1], plan.stride_x = soft.stride[2];
    plan.n = words.size[1];
    plan.height = static_cast<int32_t>(height), plan.width = static_cast<int32_t>(width);
    plan.threshold = threshold;
    // A pixel lies in the range of its cells with a relative error of 2^-20: four products, three sums and two roundings of
    // weights.
    const float size = threshold < 0 ? -threshold : threshold, margin = size * 0x1p-18f + 0x1p-120f;
    const bool far = size > 0x1p126f;  // near the clamp of cells: every pixel is interpolated
    plan.low = far ? -largest : threshold - margin;
    plan.high = far ? largest : threshold + margin;

    // With several tiles, each row of a tile gets one more word than the tile has, unless the tile is the last of the row.
    const int64_t all = tiles(width, 32);
    const int64_t own = all <= tile_words ? all : tiles(all, tiles(all, tile_words - 1));
    plan.tiles = static_cast<int32_t>(tiles(all, own));
    plan.tile_columns = static_cast<int32_t>(32 * own);
    const int64_t slots = tiles(own + (plan.tiles > 1 ? 1 : 0), slot_words);
    plan.wrap = plan.tiles > 1 ? static_cast<int32_t>(slot_words * slots) : 0;
    plan.pitch = static_cast<int32_t>(slot_words * (slots + (plan.tiles > 1 ? 1 : 0)));
    plan.tail = static_cast<int32_t>(tiles(31, width));
    const auto bytes = [&](int64_t band, bool staged) {
        const int64_t rows = band + plan.tail;
        plan.band = static_cast<int32_t>(band);
        plan.bands = static_cast<int32_t>(tiles(height, band));
        const int64_t plain = rows * 16 + (rows * plan.pitch + 1) * 4;
        if (!staged) return plain;
        const int64_t window_y = window(rows < height ? rows : height, step_y, h);
        const int64_t window_x = window(32 * slot_words * slots, step_x, w);
        plan.window_y = static_cast<int32_t>(window_y);
        plan.windows = static_cast<int32_t>(batch * tiles(window_x, 32 * batch));
        plan.line = static_cast<int32_t>(2 * (plan.windows + tiles(window_x, 2)));
        return plain + window_y * plan.line * 4;
    };
    if (step_y <= 1.0 && step_x <= 1.0) {
        for (int64_t band = 64; band >= 8; band /= 2) {
            const int64_t shared = bytes(band, true), blocks = words.size[0] * plan.bands * plan.tiles;
            if (shared > most_shared || (band > 8 && blocks < least_blocks)) continue;
            SPROMPT_DEVICE_FLOATS(
                soft.dtype, T,
                launch(stream, enlarge_kernel<T>, blocks, threads, shared, soft.as<const T>(), words.as<uint32_t>(), plan));
            return;
        }
    }
    const int64_t shared = bytes(8, false);
    SPROMPT_DEVICE_FLOATS(soft.dtype, T,
                          launch(stream, reduce_kernel<T>, words.size[0] * plan.bands * plan.tiles, threads, shared,
                                 soft.as<const T>(), words.as<uint32_t>(), plan));
}

}  // namespace cuda
}  // namespace sprompt
