// A tile is 32 rows (a band) of 32 columns (a strip) of one mask. As on the CPU, d[y, x] = m[y, x] ^ m[y - 1, x], and d[0, x] =
// m[0, x] ^ m[height - 1, x - 1]. d is set exactly where a run begins. One read of the row-major words finds the tiles without
// a set bit, which are nearly all tiles. They are not read again. For the other tiles, a warp transposes d, so that a lane has
// one column, and walks down its strip. A number depends on the runs before it only through a Context: the number of changes so
// far and the places of the last three. Contexts are combined over lanes and over strips by a prefix sum. So the start of every
// strip, and of every column in it, is known before it is written.
#include "rle/rle.h"

#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int block = 256, warps = block / warp;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % warp; }
// Index of the warp in the whole grid. It is the same for all lanes.
__device__ inline int64_t warp_id() { return static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / warp; }

__device__ inline uint32_t low_bits(int64_t count) { return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0u; }

// Row-major words of L masks, and how they are cut into tiles.
struct Masks {
    const uint32_t* words;  // (L, n)
    int64_t n, height, width, strips, bands;
    int64_t groups;  // of 32 bands
};

// 32 pixels of a mask from pixel `first` >= 0 on. Pixels behind its last word are 0.
__device__ inline uint32_t pixels_at(const uint32_t* mask, int64_t n, int64_t first) {
    const int64_t i = first / 32;
    const uint32_t low = i < n ? mask[i] : 0, high = i + 1 < n ? mask[i + 1] : 0;
    return __funnelshift_r(low, high, static_cast<unsigned>(first % 32));
}

// For row y, columns x .. x + 31: the pixels one place before them in column-major order. Before the first pixel of the mask it
// is 0.
__device__ inline uint32_t pixels_before(const Masks& m, const uint32_t* mask, int64_t y, int64_t x) {
    if (y > 0) return pixels_at(mask, m.n, (y - 1) * m.width + x);
    const int64_t p = (m.height - 1) * m.width + x;
    return x > 0 ? pixels_at(mask, m.n, p - 1) : pixels_at(mask, m.n, p) << 1;
}

// -- which tiles have changes: one thread per tile, and neighbouring threads read neighbouring columns

__global__ void __launch_bounds__(block) used_kernel(const Masks m, uint32_t* used,  // (L, strips, groups), zeros
                                                     int64_t total) {                // L * bands * strips
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * block + threadIdx.x;
    if (tile >= total) return;
    const int64_t strip = tile % m.strips, above = tile / m.strips, band = above % m.bands, index = above / m.bands;
    const uint32_t* mask = m.words + index * m.n;
    const int64_t x = 32 * strip, y = 32 * band;
    const int rows = m.height - y < 32 ? static_cast<int>(m.height - y) : 32;
    uint32_t before = pixels_before(m, mask, y, x), any = 0;
    int64_t p = y * m.width + x;
#pragma unroll 8
    for (int i = 0; i < rows; ++i) {
        const uint32_t here = pixels_at(mask, m.n, p);
        any |= here ^ before;
        before = here;
        p += m.width;
    }
    if ((any & low_bits(m.width - x)) != 0) atomicOr(&used[(index * m.strips + strip) * m.groups + band / 32], 1u << band % 32);
}

// -- tiles, one warp per tile

// Bit y of the word of lane x is set where a run begins in row 32 band + y of column 32 strip + x. All lanes must take part.
__device__ inline uint32_t changes(const Masks& m, const uint32_t* mask, int64_t strip, int64_t band) {
    const int lane = lane_id();
    const int64_t x = 32 * strip, y = 32 * band + lane;
    const uint32_t here = y < m.height ? pixels_at(mask, m.n, y * m.width + x) : 0;
    uint32_t before = __shfl_up_sync(whole_warp, here, 1);
    if (lane == 0) before = pixels_before(m, mask, y, x);
    uint32_t word = y < m.height ? (here ^ before) & low_bits(m.width - x) : 0;
    // Transposes: quarters of the tile are exchanged across the diagonal, then quarters of the quarters, and so on.
    uint32_t low = 0x0000ffffu;
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
        const uint32_t other = __shfl_xor_sync(whole_warp, word, half);
        word = (lane & half) != 0 ? (word & ~low) | (other >> half & low) : (word & low) | (other << half & ~low);
        low ^= low << (half / 2);
    }
    return word;
}

// Calls visit(word, place) for the tiles of a strip that have changes, from top to bottom. `place` is the column-major place of
// bit 0 of the lane's word. All lanes must take part.
template <class F>
__device__ inline void walk(const Masks& m, const uint32_t* used, int64_t job, F visit) {  // job = index * strips + strip
    const int64_t strip = job % m.strips;
    const uint32_t* mask = m.words + job / m.strips * m.n;
    const int64_t column = (32 * strip + lane_id()) * m.height;
    for (int64_t group = 0; group < m.groups; ++group)
        for (uint32_t rest = used[job * m.groups + group]; rest != 0; rest &= rest - 1) {
            const int64_t band = 32 * group + __ffs(static_cast<int>(rest)) - 1;
            visit(changes(m, mask, strip, band), static_cast<int32_t>(column + 32 * band));
        }
}

// -- contexts

struct alignas(16) Context {
    int32_t count;                   // changes so far, at most 2^31 - 1
    int32_t last, before, earliest;  // places of the last three changes, 0 where there are fewer

    // The number that is written for the run that ends at `place`.
    __device__ inline int32_t number(int32_t place) const { return place - last - (count > 2 ? before - earliest : 0); }
    __device__ inline void add(int32_t place) {
        ++count;
        earliest = before;
        before = last;
        last = place;
    }
};

__device__ inline Context joined(const Context& a, const Context& b) {
    Context c;
    c.count = a.count + b.count;
    c.last = b.count > 0 ? b.last : a.last;
    c.before = b.count > 1 ? b.before : b.count == 1 ? a.last : a.before;
    c.earliest = b.count > 2 ? b.earliest : b.count == 2 ? a.last : b.count == 1 ? a.before : a.earliest;
    return c;
}

__device__ inline Context from_lane(const Context& c, int source) {
    return {__shfl_sync(whole_warp, c.count, source), __shfl_sync(whole_warp, c.last, source),
            __shfl_sync(whole_warp, c.before, source), __shfl_sync(whole_warp, c.earliest, source)};
}

// The joined context of lanes 0 up to and including this lane, in that order.
__device__ inline Context joined_up_to_lane(Context c) {
    for (int step = 1; step < warp; step *= 2) {
        const Context other = from_lane(c, (lane_id() - step) & 31);
        if (lane_id() >= step) c = joined(other, c);
    }
    return c;
}

// The joined context of `start` and the lanes before this lane. `all` is the result of joined_up_to_lane.
__device__ inline Context joined_before_lane(const Context& start, const Context& all) {
    const Context other = from_lane(all, (lane_id() - 1) & 31);
    return lane_id() > 0 ? joined(start, other) : start;
}

// The changes of the lane's column in a strip.
__device__ inline Context of_column(const Masks& m, const uint32_t* used, int64_t job) {
    Context own = {0, 0, 0, 0};
    walk(m, used, job, [&](uint32_t word, int32_t place) {
        for (; word != 0; word &= word - 1) own.add(place + __ffs(static_cast<int>(word)) - 1);
    });
    return own;
}

// One warp per strip: contexts[index, strip] <- the context of the strip's own changes.
__global__ void __launch_bounds__(block, 4) strip_kernel(const Masks m, const uint32_t* used,
                                                         Context* contexts,  // (L, strips + 1)
                                                         int64_t total) {    // L * strips
    const int64_t job = warp_id();
    if (job >= total) return;
    const Context all = joined_up_to_lane(of_column(m, used, job));
    if (lane_id() == 31) contexts[job + job / m.strips] = all;
}

// One warp per mask: contexts[index, strip] <- the joined context of all strips before this strip.
__global__ void __launch_bounds__(block) join_kernel(int64_t strips, Context* contexts,  // (L, strips + 1)
                                                     int64_t masks) {
    const int64_t index = warp_id();
    if (index >= masks) return;
    Context* own = contexts + index * (strips + 1);
    Context start = {0, 0, 0, 0};
    for (int64_t first = 0; first < strips; first += warp) {
        const int64_t strip = first + lane_id();
        const Context nothing = {0, 0, 0, 0};
        const Context all = joined_up_to_lane(strip < strips ? own[strip] : nothing);
        const Context before = joined_before_lane(start, all);
        if (strip < strips) own[strip] = before;
        start = joined(start, from_lane(all, 31));
    }
    if (lane_id() == 0) own[strips] = start;
}

// -- characters

// A number of b bits, sign included, has ceil(b / 5) characters.
__device__ inline int length_of(int32_t number) { return (37 - __clz(number ^ (number >> 31))) / 5; }

__device__ inline void write(int32_t number, uint8_t* at) {
    for (int left = length_of(number); left > 0; --left) {
        *at++ = static_cast<uint8_t>(48 + (number & 31) + (left > 1 ? 32 : 0));
        number >>= 5;
    }
}

__device__ inline int64_t sum_up_to_lane(int64_t x) {
    for (int step = 1; step < warp; step *= 2) {
        const int64_t other = __shfl_up_sync(whole_warp, x, step);
        if (lane_id() >= step) x += other;
    }
    return x;
}

// One warp per strip. If not `writes`: starts[index, strip] <- the number of the strip's characters. If `writes`: writes the
// strip's characters to `text`, a buffer of `capacity` characters, from offsets[index] + starts[index, strip] on. The last
// strip also writes the characters of the last run.
template <bool writes>
__global__ void __launch_bounds__(block, 4) text_kernel(const Masks m, const uint32_t* used,
                                                        const Context* contexts,  // (L, strips + 1)
                                                        int64_t* starts,          // (L, strips)
                                                        const int64_t* offsets,   // (L + 1)
                                                        uint8_t* text, int64_t capacity,
                                                        int64_t total) {  // L * strips
    const int64_t job = warp_id();
    if (job >= total) return;
    const int64_t index = job / m.strips;
    const Context start = contexts[job + index], end = contexts[job + index + 1];
    if (writes && lane_id() == 0 && job % m.strips == m.strips - 1) {
        const int32_t number = end.number(static_cast<int32_t>(m.height * m.width));
        const int64_t at = offsets[index + 1] - length_of(number);
        if (at >= 0 && offsets[index + 1] <= capacity) write(number, text + at);
    }
    if (start.count == end.count) {
        if (!writes && lane_id() == 0) starts[job] = 0;
        return;
    }
    const Context before = joined_before_lane(start, joined_up_to_lane(of_column(m, used, job)));
    Context context = before;
    int64_t length = 0;
    walk(m, used, job, [&](uint32_t word, int32_t place) {
        for (; word != 0; word &= word - 1) {
            const int32_t change = place + __ffs(static_cast<int>(word)) - 1;
            length += length_of(context.number(change));
            context.add(change);
        }
    });
    const int64_t lengths = sum_up_to_lane(length);
    if (!writes) {
        if (lane_id() == 31) starts[job] = lengths;
        return;
    }
    int64_t at = offsets[index] + starts[job] + lengths - length;
    context = before;
    walk(m, used, job, [&](uint32_t word, int32_t place) {
        for (; word != 0; word &= word - 1) {
            const int32_t change = place + __ffs(static_cast<int>(word)) - 1;
            const int32_t number = context.number(change);
            const int size = length_of(number);
            if (at + size <= capacity) write(number, text + at);  // beyond it only if the words changed since rle_measure
            at += size;
            context.add(change);
        }
    });
}

// One warp per mask: starts[index, strip] <- the number of characters of all strips before this strip; lengths[index] <- the
// number of all characters.
__global__ void __launch_bounds__(block) sum_kernel(int64_t strips, int64_t pixels,
                                                    const Context* contexts,  // (L, strips + 1)
                                                    int64_t* starts,          // (L, strips)
                                                    int64_t* lengths,         // (L)
                                                    int64_t masks) {
    const int64_t index = warp_id();
    if (index >= masks) return;
    int64_t* own = starts + index * strips;
    int64_t sum = 0;
    for (int64_t first = 0; first < strips; first += warp) {
        const int64_t strip = first + lane_id();
        const int64_t length = strip < strips ? own[strip] : 0, all = sum_up_to_lane(length);
        if (strip < strips) own[strip] = sum + all - length;
        sum += __shfl_sync(whole_warp, all, 31);
    }
    if (lane_id() == 0)
        lengths[index] = sum + length_of(contexts[index * (strips + 1) + strips].number(static_cast<int32_t>(pixels)));
}

Masks tiled(const View& words, int64_t height, int64_t width, const View& used) {
    const int64_t bands = height * width > 0 ? tiles(height, 32) : 0;
    return {words.as<const uint32_t>(), words.size[1], height, width, used.size[1], bands, used.size[2]};
}

}  // namespace

void rle_measure(const Stream& stream, const View& words, int64_t height, int64_t width, const View& used, const View& contexts,
                 const View& starts, const View& lengths) {
    const Masks m = tiled(words, height, width, used);
    const int64_t masks = words.size[0], strips = masks * m.strips;
    uint32_t* flags = used.as<uint32_t>();
    Context* context = contexts.as<Context>();
    int64_t *start = starts.as<int64_t>(), *none = nullptr;
    uint8_t* text = nullptr;
    launch(stream, used_kernel, tiles(strips * m.bands, block), block, 0, m, flags, strips * m.bands);
    launch(stream, strip_kernel, tiles(strips, warps), block, 0, m, flags, context, strips);
    launch(stream, join_kernel, tiles(masks, warps), block, 0, m.strips, context, masks);
    launch(stream, text_kernel<false>, tiles(strips, warps), block, 0, m, flags, context, start, none, text, 0, strips);
    launch(stream, sum_kernel, tiles(masks, warps), block, 0, m.strips, height * width, context, start, lengths.as<int64_t>(),
           masks);
}

void rle_write(const Stream& stream, const View& words, int64_t height, int64_t width, const View& used, const View& contexts,
               const View& starts, const View& offsets, const View& characters) {
    const Masks m = tiled(words, height, width, used);
    const int64_t strips = words.size[0] * m.strips;
    launch(stream, text_kernel<true>, tiles(strips, warps), block, 0, m, used.as<uint32_t>(), contexts.as<Context>(),
           starts.as<int64_t>(), offsets.as<int64_t>(), characters.as<uint8_t>(), characters.size[0], strips);
}

}  // namespace cuda
}  // namespace sprompt
