// resize_bits: a thread makes one word of 32 pixels. If all cells under a word are equal, the word is 0 or all ones; nearly all
// words are. For the other words, the whole warp makes one after the other, with one lane per pixel.
#include "resize_masks/resize_masks.h"

#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

__device__ inline uint32_t low_bits(int count) { return count >= 32 ? ~0u : (1u << count) - 1; }

// `count` <= 32 bits of words[0..n) from bit `first` >= 0. Bits behind the end are 0.
__device__ inline uint32_t bits_at(const uint32_t* words, int64_t n, int64_t first, int count) {
    const int64_t i = first / 32;
    const uint32_t low = i < n ? words[i] : 0, high = i + 1 < n ? words[i + 1] : 0;
    return __funnelshift_r(low, high, static_cast<unsigned>(first % 32)) & low_bits(count);
}

__device__ inline bool bit_at(const uint32_t* words, int64_t place) { return (words[place / 32] >> place % 32 & 1) != 0; }

// The two cells of an output coordinate, and their weights. Computed in double, without fused operations (--fmad=false).
struct Tap {
    int64_t floor, first, second;
    float w0, w1;
};
__device__ inline Tap tap_of(int64_t x, double step, int64_t cells) {
    double s = (static_cast<double>(x) + 0.5) * step - 0.5;
    s = s > 0.0 ? s : 0.0;
    const double last = static_cast<double>(cells - 1);
    s = s < last ? s : last;
    const int64_t k = static_cast<int64_t>(s);
    const float w1 = static_cast<float>(s - static_cast<double>(k)), w0 = __fsub_rn(1.0f, w1);
    return {k, w0 > 0.0f ? k : k + 1, w1 > 0.0f ? k + 1 : k, w0, w1};
}

// h(r) of the header. The cells are 0 or 1, so their products with the weights are 0 or the weights.
__device__ inline float along_row(const uint32_t* cells, int64_t row, const Tap& x) {
    return __fadd_rn(bit_at(cells, row + x.first) ? x.w0 : 0.0f, bit_at(cells, row + x.second) ? x.w1 : 0.0f);
}

// If there are more columns of cells than this under one word, the cells are not compared.
constexpr int64_t most_columns = 256;

__global__ void __launch_bounds__(256) resize_bits_kernel(const uint32_t* in,  // (M, n) of h x w cells
                                                          int64_t n, int64_t h, int64_t w, double step_y, double step_x,
                                                          uint32_t* out,  // (M, out_n) of height x width pixels
                                                          int64_t out_n, int64_t height, int64_t width,
                                                          int64_t total,  // M * out_n
                                                          float threshold) {
    const int64_t job = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    const int lane = static_cast<int>(threadIdx.x) % warp;
    const bool there = job < total;
    const int64_t mask = there ? job / out_n : 0, first = there ? job % out_n * 32 : 0;
    const int64_t y = first / width, x = first % width;
    const int count = height * width - first < 32 ? static_cast<int>(height * width - first) : 32;
    bool mixed = there;
    uint32_t word = 0;
    if (there && x + count <= width) {
        const int64_t low = tap_of(x, step_x, w).floor, end = tap_of(x + count - 1, step_x, w).floor + 2;
        const int64_t columns = (end < w ? end : w) - low;
        if (columns <= most_columns) {
            const Tap tap = tap_of(y, step_y, h);
            uint32_t ones = 0, zeros = 0;
            for (int64_t c = 0; c < columns; c += 32) {
                const int some = columns - c < 32 ? static_cast<int>(columns - c) : 32;
                const uint32_t upper = bits_at(in + mask * n, n, tap.first * w + low + c, some);
                const uint32_t lower = bits_at(in + mask * n, n, tap.second * w + low + c, some);
                ones |= upper | lower;
                zeros |= ~(upper & lower) & low_bits(some);
            }
            mixed = ones != 0 && zeros != 0;
            if (zeros == 0) word = low_bits(count);
        }
    }
    for (unsigned rest = __ballot_sync(whole_warp, mixed); rest != 0; rest &= rest - 1) {
        const int owner = __ffs(static_cast<int>(rest)) - 1;
        const uint32_t* cells = in + __shfl_sync(whole_warp, mask, owner) * n;
        // Both are below 2^31, and so is width.
        const uint32_t across = __shfl_sync(whole_warp, static_cast<uint32_t>(x), owner) + lane;
        const uint32_t row = __shfl_sync(whole_warp, static_cast<uint32_t>(y), owner) + across / static_cast<uint32_t>(width);
        bool set = false;
        if (row < height) {
            const Tap tap_x = tap_of(across % static_cast<uint32_t>(width), step_x, w), tap_y = tap_of(row, step_y, h);
            const float upper = along_row(cells, tap_y.first * w, tap_x), lower = along_row(cells, tap_y.second * w, tap_x);
            set = __fadd_rn(__fmul_rn(upper, tap_y.w0), __fmul_rn(lower, tap_y.w1)) > threshold;
        }
        const uint32_t made = __ballot_sync(whole_warp, set);
        if (lane == owner) word = made;
    }
    if (there) out[job] = word;
}

}  // namespace

void resize_bits(const Stream& stream, const View& in, int64_t h, int64_t w, int64_t height, int64_t width, float threshold,
                 const View& words) {
    const int64_t total = words.size[0] * words.size[1];
    launch(stream, resize_bits_kernel, tiles(total, 256), 256, 0, in.as<const uint32_t>(), in.size[1], h, w,
           static_cast<double>(h) / static_cast<double>(height), static_cast<double>(w) / static_cast<double>(width),
           words.as<uint32_t>(), words.size[1], height, width, total, threshold);
}

}  // namespace cuda
}  // namespace sprompt
