// A thread makes one word of 32 pixels. The cells under every column and row are computed once per call.
#include "resize_masks/resize_masks.h"

#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int threads = 256;

// The cells under a pixel of an axis.
struct alignas(8) Window {
    int32_t begin, end;
};

__global__ void __launch_bounds__(threads)
    windows_kernel(Window* windows,  // (width + height): of columns, then of rows
                   int64_t width, int64_t height, int64_t w, int64_t h, bool nearest, float scale_x, float scale_y) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (i >= width + height) return;
    const bool of_row = i >= width;
    const int64_t x = of_row ? i - width : i, cells = of_row ? h : w, size = of_row ? height : width;
    if (nearest) {
        const int64_t k = static_cast<int64_t>(__fmul_rn(static_cast<float>(x), of_row ? scale_y : scale_x));
        const int32_t cell = static_cast<int32_t>(k < cells ? k : cells - 1);
        windows[i] = {cell, cell + 1};
    } else {
        windows[i] = {static_cast<int32_t>(x * cells / size), static_cast<int32_t>(((x + 1) * cells + size - 1) / size)};
    }
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

__global__ void __launch_bounds__(threads) cover_bits_kernel(const uint32_t* in,  // (M, n) of rows of w cells
                                                             int64_t n, int64_t w,
                                                             const Window* windows,  // (width + height)
                                                             uint32_t* out,          // (M, out_n) of height x width pixels
                                                             int64_t out_n, int64_t height, int64_t width,
                                                             int64_t total) {  // M * out_n
    const int64_t job = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (job >= total) return;
    const uint32_t* mask = in + job / out_n * n;
    int64_t y = job % out_n * 32 / width, x = job % out_n * 32 % width;
    uint32_t word = 0;
    for (int k = 0; k < 32 && y < height; ++k) {
        const Window row = windows[width + y], column = windows[x];
        for (int64_t r = row.begin; r < row.end; ++r)
            if (any_set(mask, r * w + column.begin, column.end - column.begin)) {
                word |= 1u << k;
                break;
            }
        if (++x == width) x = 0, ++y;
    }
    out[job] = word;
}

}  // namespace

void cover_bits(const Stream& stream, const View& in, int64_t h, int64_t w, int64_t height, int64_t width, bool nearest,
                const View& words, const View& scratch) {
    if (h > INT32_MAX || w > INT32_MAX) throw Failure("a mask of more than 2^31 - 1 rows or columns");
    Window* const windows = scratch.as<Window>();
    launch(stream, windows_kernel, tiles(width + height, threads), threads, 0, windows, width, height, w, h, nearest,
           static_cast<float>(w) / static_cast<float>(width), static_cast<float>(h) / static_cast<float>(height));
    const int64_t total = words.size[0] * words.size[1];
    launch(stream, cover_bits_kernel, tiles(total, threads), threads, 0, in.as<const uint32_t>(), in.size[1], w, windows,
           words.as<uint32_t>(), words.size[1], height, width, total);
}

}  // namespace cuda
}  // namespace sprompt
