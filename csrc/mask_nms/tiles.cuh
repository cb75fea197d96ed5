// Common parts of greedy and matrix suppression on the GPU: the order of the masks, and tiles of 32 x 32 pairs of places in the
// order. A tile is counted in shared memory, 32 words of every mask at a time.
#pragma once

#include "common/device.cuh"
#include "mask_nms/mask_nms.h"

namespace sprompt {
namespace cuda {
namespace {  // each file has its own

constexpr int side = 32, depth = 32, pitch = depth + 1;  // the odd pitch spreads a column over the banks
constexpr int threads = 256, warps = threads / warp;
constexpr int each = side * side / threads;  // pairs per thread: row threadIdx.x / 32 + 8 q, column threadIdx.x % 32
constexpr uint32_t padding = 0xffffffffu;    // the key of masks that are not real

// Smaller scores have larger keys. NaN counts as -inf, -0 as 0.
__device__ inline uint32_t key_of(float score) {
    if (score != score) return 0xff800000u;
    const uint32_t bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

__device__ inline int64_t count_of(const int64_t* counts, int64_t stride, int64_t image, int64_t N) {
    const int64_t count = counts ? counts[image * stride] : N;
    return count < 0 ? 0 : count > N ? N : count;
}

// -- order and area: one warp per mask counts the masks before it. Real masks come first. Padding has area 0.

template <class T>
__global__ void __launch_bounds__(threads)
    order_kernel(const uint32_t* words, int64_t image_stride, int64_t mask_stride, int64_t n,  // (B, N, n)
                 const T* scores, int64_t score_row, int64_t score_step,                       // (B, N)
                 const int64_t* counts, int64_t count_step,                                    // (B)
                 int64_t N, int64_t total,                                                     // B * N
                 int64_t* order, uint32_t* area,                                               // (B, N), by place
                 uint64_t* c, uint64_t* decay, uint64_t decay_start) {                         // (B, N), by place, or null
    const int64_t job = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / warp;
    if (job >= total) return;  // whole warps
    const int lane = static_cast<int>(threadIdx.x) % warp;
    const int64_t image = job / N, i = job % N, count = count_of(counts, count_step, image, N);
    const T* row = scores + image * score_row;
    const auto key = [&](int64_t j) { return j < count ? key_of(to_float(row[j * score_step])) : padding; };
    const uint32_t mine = key(i);
    int64_t place = 0;
    for (int64_t j = lane; j < N; j += warp) {
        const uint32_t other = key(j);
        place += other < mine || (other == mine && j < i);
    }
    place = warp_sum(place);
    uint32_t set = 0;
    if (i < count) {
        const uint32_t* mask = words + image * image_stride + i * mask_stride;
        for (int64_t k = lane; k < n; k += warp) set += __popc(mask[k]);
    }
    set = warp_sum(set);
    if (lane == 0) {
        order[image * N + place] = i;
        area[image * N + place] = set;
        if (c) {
            c[image * N + place] = 0;
            decay[image * N + place] = decay_start;
        }
    }
}

// -- counting: parts that the threads of a tile use.

// The masks of one image in their order.
struct Masks {
    const uint32_t* words;
    int64_t image_stride, mask_stride, n;
    const int64_t* order;  // (B, N)
    const uint32_t* area;  // (B, N)
    int64_t N;
};

// Fills `source` and `area` for 32 masks from place first_row on and 32 from first_column on. Behind the last mask they are
// null and 0.
__device__ inline void find_masks(const Masks& m, int64_t image, int64_t first_row, int64_t first_column,
                                  const uint32_t** source, uint32_t* area) {  // (2 * side) each
    if (threadIdx.x < 2 * side) {
        const int64_t place = threadIdx.x < side ? first_row + threadIdx.x : first_column + threadIdx.x - side;
        const bool inside = place < m.N;
        const int64_t at = image * m.N + (inside ? place : 0);
        source[threadIdx.x] = inside ? m.words + image * m.image_stride + m.order[at] * m.mask_stride : nullptr;
        area[threadIdx.x] = inside ? m.area[at] : 0;
    }
}

// Calls use(words in this part, a multiple of 8) for each part of `depth` words. The part then lies in `tile`: 32 rows, 32
// columns, zeros behind the end. Meanwhile the next part is loaded. All threads must call it, after a barrier that follows
// find_masks.
template <class F>
__device__ inline void for_parts(const uint32_t* const* source, uint32_t* tile, int64_t n, F use) {
    constexpr int loads = 2 * side * depth / threads;
    const int word = static_cast<int>(threadIdx.x) % depth, mask = static_cast<int>(threadIdx.x) / depth;
    uint32_t next[loads];
    const auto fetch = [&](int64_t k) {
#pragma unroll
        for (int q = 0; q < loads; ++q) {
            const uint32_t* from = source[mask + q * (threads / depth)];
            next[q] = from && k + word < n ? from[k + word] : 0;
        }
    };
    fetch(0);
    for (int64_t k = 0; k < n; k += depth) {
#pragma unroll
        for (int q = 0; q < loads; ++q) tile[(mask + q * (threads / depth)) * pitch + word] = next[q];
        __syncthreads();
        fetch(k + depth);
        use(n - k < depth ? static_cast<int>(n - k + 7) / 8 * 8 : depth);
        __syncthreads();
    }
}

// -- launching

inline void check_size(int64_t n) {
    if (n >= int64_t{1} << 27) throw Failure("suppression of masks of 2^32 pixels or more");
}

template <class T>
void find_order(const Stream& stream, const View& words, const View& scores, const View& counts, const View& order,
                const View& area, uint64_t* c, uint64_t* decay, double no_decay) {
    const int64_t N = words.size[1], total = words.size[0] * N;
    uint64_t start;
    static_assert(sizeof start == sizeof no_decay);
    __builtin_memcpy(&start, &no_decay, sizeof start);
    launch(stream, order_kernel<T>, tiles(total, warps), threads, 0, words.as<const uint32_t>(), words.stride[0],
           words.stride[1], words.size[2], scores.as<const T>(), scores.stride[0], scores.stride[1], counts.as<const int64_t>(),
           counts.stride[0], N, total, order.as<int64_t>(), area.as<uint32_t>(), c, decay, start);
}

inline Masks masks_of(const View& words, const View& order, const View& area) {
    return {words.as<const uint32_t>(), words.stride[0],           words.stride[1], words.size[2],
            order.as<const int64_t>(),  area.as<const uint32_t>(), words.size[1]};
}

}  // namespace
}  // namespace cuda
}  // namespace sprompt
