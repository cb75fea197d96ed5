// A warp makes one output. A lane has a column of the part, and takes the rows one after the other. Row weights are computed
// for 32 rows at a time, one per lane. Few parts of a box have more pixels than that on an axis.
#include "box_masks/axes.h"
#include "box_masks/box_masks.h"
#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int threads = 256;

// The weight of a pixel in a part. At most five samples of a part reach a pixel.
__device__ inline int32_t weight_of(const Samples& samples, int32_t part, int64_t pixel) {
    const int32_t near = samples.near(pixel), begin = part * samples.g, end = begin + samples.g;
    double sum = 0.0;
    for (int32_t j = near > begin ? near : begin; j < end; ++j) {
        const double place = samples.place(j);
        if (place > static_cast<double>(pixel + 1)) break;
        if (!samples.has_weight(place)) continue;
        const Share share = samples.share(place);
        if (share.pixel == pixel) sum += share.lower;
        if (share.pixel + 1 == pixel) sum += share.upper;
    }
    return static_cast<int32_t>(sum);
}

__global__ void __launch_bounds__(threads)
    crop_masks_kernel(const uint32_t* words, int64_t n,  // (B * masks_per_image, n)
                      Boxes box,
                      const int64_t* index,  // of a box: its mask
                      int64_t masks_per_image, int64_t boxes_per_image, int64_t height, int64_t width, int32_t size,
                      float* out,       // (boxes, size, size)
                      int64_t total) {  // elements of out
    const int64_t job = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) / warp;
    if (job >= total) return;
    const int lane = static_cast<int>(threadIdx.x % warp);
    const int64_t i = job / (size * size), of = index[i];
    const int32_t place = static_cast<int32_t>(job - i * (size * size)), row = place / size, column = place % size;
    const double x1 = box(i, 0), y1 = box(i, 1), x2 = box(i, 2), y2 = box(i, 3);
    int64_t sum = 0;
    double area = 1.0;
    if (of >= 0 && of < masks_per_image && n > 0 && is_cropped(x1, x2) && is_cropped(y1, y2)) {
        const uint32_t* mask = words + (i / boxes_per_image * masks_per_image + of) * n;
        const Samples across(x1, x2, size, width), down(y1, y2, size, height);
        area = across.whole() * down.whole();
        const Span xs = across.span(column), ys = down.span(row);
        for (int64_t left = xs.begin; left < xs.end; left += warp) {
            const int64_t x = left + lane;
            int32_t under = 0;  // the sum of the weights of the rows in which pixel x is set: at most 2^26
            for (int64_t top = ys.begin; top < ys.end; top += warp) {
                const int32_t own = top + lane < ys.end ? weight_of(down, row, top + lane) : 0;
                const int rows = static_cast<int>(ys.end - top < warp ? ys.end - top : warp);
                for (int k = 0; k < rows; ++k) {
                    const int32_t weight = __shfl_sync(whole_warp, own, k);
                    const int64_t pixel = (top + k) * width + x;
                    if (x < xs.end && (mask[pixel / 32] >> (pixel % 32) & 1) != 0) under += weight;
                }
            }
            if (under > 0) sum += static_cast<int64_t>(under) * weight_of(across, column, x);
        }
        sum = warp_sum(sum);
    }
    if (lane == 0) out[job] = static_cast<float>(static_cast<double>(sum) / area);
}

}  // namespace

void crop_masks(const Stream& stream, const View& words, const View& boxes, const View& index, int64_t masks_per_image,
                int64_t boxes_per_image, int64_t height, int64_t width, int64_t size, const View& out) {
    const int64_t total = index.size[0] * size * size;
    launch(stream, crop_masks_kernel, tiles(total, threads / warp), threads, 0, words.as<const uint32_t>(), words.size[1],
           Boxes(boxes), index.as<const int64_t>(), masks_per_image, boxes_per_image, height, width, size, out.as<float>(),
           total);
}

}  // namespace cuda
}  // namespace sprompt
