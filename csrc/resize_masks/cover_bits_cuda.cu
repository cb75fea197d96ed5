// A thread makes one word of 32 pixels, one warp's threads neighbouring words.
#include "resize_masks/resize_masks.h"

#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int threads = 256;

struct Window {
    int64_t begin, end;
};

// The cells under pixel x of an axis. `scale` is the number of cells per pixel in float.
__device__ inline Window window_of(int64_t x, int64_t cells, int64_t size, bool nearest, float scale) {
    if (!nearest) return {x * cells / size, ((x + 1) * cells + size - 1) / size};
    const int64_t k = static_cast<int64_t>(__fmul_rn(static_cast<float>(x), scale));
    return {k < cells ? k : cells - 1, (k < cells ? k : cells - 1) + 1};
}

// Whether one of `count` bits from bit `first` is set.
__device__ inline bool any_set(const uint32_t* words, int64_t first, int64_t count) {
    while (count > 0) {
        const int shift = static_cast<int>(first % 32), some = count < 32 - shift ? static_cast<int>(count) : 32 - shift;
        const uint32_t own = words[first / 32] >> shift;
        if ((some == 32 ? own : own & ((1u << some) - 1)) != 0) return true;
        first += some;
        count -= some;
    }
    return false;
}

__global__ void __launch_bounds__(threads)
    cover_bits_kernel(const uint32_t* in,  // (M, n) of h x w cells
                      int64_t n, int64_t h, int64_t w, bool nearest, float scale_y, float scale_x,
                      uint32_t* out,  // (M, out_n) of height x width pixels
                      int64_t out_n, int64_t height, int64_t width,
                      int64_t total) {  // M * out_n
    const int64_t job = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (job >= total) return;
    const uint32_t* mask = in + job / out_n * n;
    int64_t y = job % out_n * 32 / width, x = job % out_n * 32 % width;
    Window row = window_of(y, h, height, nearest, scale_y);
    uint32_t word = 0;
    for (int k = 0; k < 32 && y < height; ++k) {
        const Window column = window_of(x, w, width, nearest, scale_x);
        for (int64_t r = row.begin; r < row.end; ++r)
            if (any_set(mask, r * w + column.begin, column.end - column.begin)) {
                word |= 1u << k;
                break;
            }
        if (++x == width) {
            x = 0;
            row = window_of(++y, h, height, nearest, scale_y);
        }
    }
    out[job] = word;
}

}  // namespace

void cover_bits(const Stream& stream, const View& in, int64_t h, int64_t w, int64_t height, int64_t width, bool nearest,
                const View& words) {
    const int64_t total = words.size[0] * words.size[1];
    launch(stream, cover_bits_kernel, tiles(total, threads), threads, 0, in.as<const uint32_t>(), in.size[1], h, w, nearest,
           static_cast<float>(h) / static_cast<float>(height), static_cast<float>(w) / static_cast<float>(width),
           words.as<uint32_t>(), words.size[1], height, width, total);
}

}  // namespace cuda
}  // namespace sprompt
