// A warp makes 32 words of a picture. Each lane tells whether its word lies over the map. The warp then makes such words one by
// one, a pixel per lane. The other words are 0.
#include "box_masks/axes.h"
#include "box_masks/box_masks.h"
#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int threads = 256;

// Whether pixels [first, last] of an axis may lie over the map.
__device__ inline bool touches(const Paste& axis, uint32_t first, uint32_t last) {
    return axis.place(last) > -1.0 && axis.place(first) < static_cast<double>(axis.cells);
}

template <class T>
__global__ void __launch_bounds__(threads)
    paste_masks_kernel(const T* soft, int64_t stride_n, int64_t stride_y, int64_t stride_x,  // (N, s, s)
                       int64_t s, Boxes box, uint32_t height, uint32_t width, float threshold, uint32_t* words,
                       int64_t n,                          // (N, n)
                       int64_t per_mask, int64_t total) {  // warps
    const int64_t job = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) / warp;
    if (job >= total) return;
    const int lane = static_cast<int>(threadIdx.x % warp);
    const int64_t mask = job / per_mask, first = job % per_mask * warp;
    const T* map = soft + mask * stride_n;
    const Paste across(box(mask, 0), box(mask, 2), s), down(box(mask, 1), box(mask, 3), s);
    const uint32_t pixels = height * width;

    bool touched = false;
    if (first + lane < n) {
        const uint32_t begin = static_cast<uint32_t>(first + lane) * 32, end = pixels - begin > 31 ? begin + 31 : pixels - 1;
        const uint32_t top = begin / width, bottom = end / width;
        touched = touches(down, top, bottom) && (top < bottom || touches(across, begin % width, end % width));
    }
    uint32_t own = 0;
    for (unsigned left = __ballot_sync(whole_warp, touched); left != 0; left &= left - 1) {
        const int k = __ffs(static_cast<int>(left)) - 1;
        const uint32_t pixel = static_cast<uint32_t>(first + k) * 32 + static_cast<uint32_t>(lane);
        bool set = false;
        if (pixel < pixels) {
            const double x = across.place(pixel % width), y = down.place(pixel / width);
            if (across.inside(x) && down.inside(y)) {
                const Cells column = across.at(x), row = down.at(y);
                const T *upper = map + row.first * stride_y, *lower = map + row.second * stride_y;
                const int64_t a = column.first * stride_x, b = column.second * stride_x;
                const float above = blend(held(to_float(upper[a])), held(to_float(upper[b])), column.w0, column.w1);
                const float below = blend(held(to_float(lower[a])), held(to_float(lower[b])), column.w0, column.w1);
                set = blend(above, below, row.w0, row.w1) > threshold;
            }
        }
        const unsigned made = __ballot_sync(whole_warp, set);
        if (lane == k) own = made;
    }
    if (first + lane < n) words[mask * n + first + lane] = own;
}

}  // namespace

void paste_masks(const Stream& stream, const View& soft, const View& boxes, int64_t height, int64_t width, float threshold,
                 const View& words) {
    const int64_t n = words.size[1], per_mask = tiles(n, warp), total = words.size[0] * per_mask;
    SPROMPT_DEVICE_FLOATS(soft.dtype, T,
                          launch(stream, paste_masks_kernel<T>, tiles(total, threads / warp), threads, 0, soft.as<const T>(),
                                 soft.stride[0], soft.stride[1], soft.stride[2], soft.size[1], Boxes(boxes), height, width,
                                 threshold, words.as<uint32_t>(), n, per_mask, total));
}

}  // namespace cuda
}  // namespace sprompt
