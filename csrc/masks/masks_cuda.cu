#include "masks/masks.h"

#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// -- pack: a thread reads 16 bytes, which are E = 16 / sizeof(T) pixels, and makes E bits. 32 / E neighbouring lanes share a
// word.

template <class T>
__device__ inline bool is_set(T pixel, float threshold) {
    return to_float(pixel) > threshold;
}
__device__ inline bool is_set(uint8_t pixel, float) { return pixel != 0; }

template <class T>
__global__ void __launch_bounds__(256) pack_kernel(const T* pixels,  // (R, P), rows `stride` apart
                                                   int64_t stride, int64_t P,
                                                   uint32_t* words,  // (R, n)
                                                   int64_t total,    // R * n
                                                   int64_t n, float threshold) {
    constexpr int E = 16 / sizeof(T), lanes = 32 / E;
    const int64_t word = global_thread() / lanes;
    const int part = static_cast<int>(threadIdx.x) % lanes;
    uint32_t bits = 0;
    if (word < total) {
        const int64_t row = word / n, first = word % n * 32 + part * E;
        const T* at = pixels + row * stride + first;
        if (first + E <= P && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
            union {
                uint4 all;
                T pixel[E];
            } v;
            v.all = *reinterpret_cast<const uint4*>(at);
#pragma unroll
            for (int i = 0; i < E; ++i) bits |= static_cast<uint32_t>(is_set(v.pixel[i], threshold)) << i;
        } else {
#pragma unroll
            for (int i = 0; i < E; ++i)
                if (first + i < P) bits |= static_cast<uint32_t>(is_set(at[i], threshold)) << i;
        }
        bits <<= part * E;
    }
    for (int step = 1; step < lanes; step *= 2) bits |= __shfl_xor_sync(whole_warp, bits, step);
    if (word < total && part == 0) words[word] = bits;
}

template <class T>
void pack_rows(const Stream& stream, const View& pixels, float threshold, const View& words) {
    constexpr int lanes = 32 / (16 / static_cast<int>(sizeof(T)));
    const int64_t n = words.size[1], total = words.size[0] * n;
    launch(stream, pack_kernel<T>, tiles(total * lanes, 256), 256, 0, pixels.as<const T>(), pixels.stride[0], pixels.size[1],
           words.as<uint32_t>(), total, n, threshold);
}

// -- unpack: a thread writes 16 pixels.

__global__ void __launch_bounds__(256) unpack_kernel(const uint32_t* words,  // (R, n)
                                                     int64_t n,
                                                     uint8_t* pixels,  // (R, P)
                                                     int64_t P,
                                                     int64_t total) {  // R * 2 n halves of words
    const int64_t half = global_thread();
    if (half >= total) return;
    const int64_t row = half / (2 * n), first = half % (2 * n) * 16;
    const uint32_t bits = words[row * n + first / 32] >> (first % 32);
    uint8_t* at = pixels + row * P + first;
    if (first + 16 <= P && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
        // Four bits to four bytes: the product puts bit i at bit 7 i + i = 8 i.
        const auto spread = [&](int shift) { return ((bits >> shift & 15u) * 0x00204081u) & 0x01010101u; };
        *reinterpret_cast<uint4*>(at) = make_uint4(spread(0), spread(4), spread(8), spread(12));
    } else {
        for (int i = 0; i < 16 && first + i < P; ++i) at[i] = bits >> i & 1;
    }
}

// -- area and boxes: one block per mask, with a single warp if masks are short.

int threads_for(int64_t n) { return n > 512 ? 256 : warp; }

// The least or largest value of all threads. `combine` is warp_min or warp_max.
template <class F>
__device__ inline int64_t over_block(int64_t value, int64_t* shared, F combine) {  // shared (8)
    value = combine(value);
    if (blockDim.x == warp) return value;
    __syncthreads();  // threads may still read `shared` of the previous call
    if (threadIdx.x % warp == 0) shared[threadIdx.x / warp] = value;
    __syncthreads();
    return combine(shared[threadIdx.x % (blockDim.x / warp)]);  // every warp reads all values, some more than once
}

__global__ void __launch_bounds__(256) area_kernel(const uint32_t* words,  // (R, n)
                                                   int64_t n,
                                                   int64_t* area,  // mask k of image i is at i * stride + k
                                                   int64_t per_image, int64_t stride) {
    SPROMPT_SHARED(int64_t, sums, 8);
    const uint32_t* row = words + blockIdx.x * n;
    int64_t mine = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) mine += __popc(row[i]);
    int64_t total = warp_sum(mine);
    if (blockDim.x > warp) {
        if (threadIdx.x % warp == 0) sums[threadIdx.x / warp] = total;
        __syncthreads();
        total = 0;
        for (int i = 0; i < static_cast<int>(blockDim.x) / warp; ++i) total += sums[i];
    }
    if (threadIdx.x == 0) area[blockIdx.x / per_image * stride + blockIdx.x % per_image] = total;
}

__global__ void __launch_bounds__(256) boxes_kernel(const uint32_t* words,  // (R, n) of rows of `width` pixels
                                                    int64_t n, int64_t width,
                                                    int64_t* boxes) {  // (R, 4)
    SPROMPT_SHARED(int64_t, shared, 8);
    const uint32_t* row = words + blockIdx.x * n;
    int64_t x1 = INT64_MAX, y1 = INT64_MAX, x2 = 0, y2 = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
        uint32_t word = row[i];
        while (word != 0) {  // one run of pixels in one row of the picture
            const int low = __ffs(static_cast<int>(word)) - 1;
            const int64_t p = 32 * i + low, y = p / width, x = p % width;
            const int64_t remaining = width - x;
            const uint32_t rest = word >> low;
            const uint32_t run = remaining < 32 ? rest & ((1u << remaining) - 1) : rest;
            const int64_t last = x + 31 - __clz(static_cast<int>(run));
            x1 = x < x1 ? x : x1;
            y1 = y < y1 ? y : y1;
            x2 = last + 1 > x2 ? last + 1 : x2;
            y2 = y + 1 > y2 ? y + 1 : y2;
            word ^= run << low;
        }
    }
    const auto least = [](int64_t v) { return warp_min(v); };
    const auto most = [](int64_t v) { return warp_max(v); };
    x1 = over_block(x1, shared, least);
    y1 = over_block(y1, shared, least);
    x2 = over_block(x2, shared, most);
    y2 = over_block(y2, shared, most);
    if (threadIdx.x == 0) {
        int64_t* box = boxes + 4 * static_cast<int64_t>(blockIdx.x);
        box[0] = x2 > 0 ? x1 : 0;
        box[1] = x2 > 0 ? y1 : 0;
        box[2] = x2;
        box[3] = y2;
    }
}

// -- IoU: a block counts 32 x 32 pairs, a thread 2 x 2 of them. Shared memory holds 32 words of every mask at a time.

constexpr int side = 32, depth = 32, pitch = depth + 1;  // the odd pitch spreads a column over the banks

template <class T>
__global__ void __launch_bounds__(256)
    iou_kernel(const uint32_t* a,                                                     // (B, N, n)
               const uint32_t* b,                                                     // (B, M, n)
               const int64_t* areas_a, const int64_t* areas_b, int64_t areas_stride,  // rows of (B, areas_stride)
               T* iou,                                                                // (B, N, M)
               int64_t N, int64_t M, int64_t n, bool self) {
    SPROMPT_SHARED(uint32_t, tile_a, side* pitch);
    SPROMPT_SHARED(uint32_t, tile_b, side* pitch);
    const int64_t columns = (M + side - 1) / side, rows = (N + side - 1) / side;
    const int64_t image = blockIdx.x / (rows * columns);
    const int64_t first_a = blockIdx.x / columns % rows * side, first_b = blockIdx.x % columns * side;
    if (self && first_b < first_a) return;  // the mirrored tile writes these pairs
    const int row = threadIdx.x / 16, column = threadIdx.x % 16;
    int64_t common[2][2] = {};
    for (int64_t k = 0; k < n; k += depth) {
        for (int i = threadIdx.x; i < side * depth; i += 256) {
            const int mask = i / depth, word = i % depth;
            const bool inside = k + word < n;
            tile_a[mask * pitch + word] = inside && first_a + mask < N ? a[(image * N + first_a + mask) * n + k + word] : 0;
            tile_b[mask * pitch + word] = inside && first_b + mask < M ? b[(image * M + first_b + mask) * n + k + word] : 0;
        }
        __syncthreads();
        int counts[2][2] = {};
#pragma unroll 8
        for (int word = 0; word < depth; ++word) {
            const uint32_t a0 = tile_a[row * pitch + word], a1 = tile_a[(row + 16) * pitch + word];
            const uint32_t b0 = tile_b[column * pitch + word], b1 = tile_b[(column + 16) * pitch + word];
            counts[0][0] += __popc(a0 & b0);
            counts[0][1] += __popc(a0 & b1);
            counts[1][0] += __popc(a1 & b0);
            counts[1][1] += __popc(a1 & b1);
        }
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j) common[i][j] += counts[i][j];
        __syncthreads();
    }
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) {
            const int64_t mask_a = first_a + row + 16 * i, mask_b = first_b + column + 16 * j;
            if (mask_a >= N || mask_b >= M) continue;
            const int64_t either =
                areas_a[image * areas_stride + mask_a] + areas_b[image * areas_stride + mask_b] - common[i][j];
            const T value = either > 0 ? static_cast<T>(static_cast<double>(common[i][j]) / static_cast<double>(either)) : T(0);
            iou[(image * N + mask_a) * M + mask_b] = value;
            if (self) iou[(image * N + mask_b) * M + mask_a] = value;
        }
}

// -- windows: a thread writes one word. It takes one run of pixels after another; the pixels of a run share a row.

// `count` <= 32 bits of words[0..n) from bit `first` >= 0. Bits behind the end are 0.
__device__ inline uint32_t bits_at(const uint32_t* words, int64_t n, int64_t first, int count) {
    const int64_t i = first / 32;
    const uint32_t low = i < n ? words[i] : 0, high = i + 1 < n ? words[i + 1] : 0;
    const uint32_t bits = __funnelshift_r(low, high, static_cast<unsigned>(first % 32));
    return count < 32 ? bits & ((1u << count) - 1) : bits;
}

__global__ void __launch_bounds__(256)
    window_kernel(const uint32_t* words,  // (R, n) of height x width
                  int64_t n, int64_t height, int64_t width, int64_t top, int64_t left, int64_t out_width, bool flip,
                  uint32_t* out,  // (R, out_n) of P pixels
                  int64_t out_n, int64_t P,
                  int64_t total) {  // R * out_n
    const int64_t job = global_thread();
    if (job >= total) return;
    const uint32_t* source = words + job / out_n * n;
    const int64_t first = job % out_n * 32;
    uint32_t word = 0;
    for (int done = 0; done < 32 && first + done < P;) {
        const int64_t y = (first + done) / out_width, x = (first + done) % out_width;
        const int64_t remaining = out_width - x;
        const int run = remaining < 32 - done ? static_cast<int>(remaining) : 32 - done;
        // The run shows columns [low, low + run) of the source, mirrored if `flip`.
        const int64_t low = left + (flip ? out_width - x - run : x), row = top + y;
        const int64_t begin = low > 0 ? low : 0, end = low + run < width ? low + run : width;
        if (row >= 0 && row < height && begin < end) {
            uint32_t bits = bits_at(source, n, row * width + begin, static_cast<int>(end - begin)) << (begin - low);
            if (flip) bits = __brev(bits) >> (32 - run);
            word |= bits << done;
        }
        done += run;
    }
    out[job] = word;
}

}  // namespace

void pack_masks(const Stream& stream, const View& pixels, float threshold, const View& words) {
    if (pixels.dtype == DType::u8 || pixels.dtype == DType::i8 || pixels.dtype == DType::b8)
        return pack_rows<uint8_t>(stream, pixels, threshold, words);
    SPROMPT_DEVICE_FLOATS(pixels.dtype, T, pack_rows<T>(stream, pixels, threshold, words));
}

void unpack_masks(const Stream& stream, const View& words, const View& pixels) {
    const int64_t total = words.size[0] * 2 * words.size[1];
    launch(stream, unpack_kernel, tiles(total, 256), 256, 0, words.as<const uint32_t>(), words.size[1], pixels.as<uint8_t>(),
           pixels.size[1], total);
}

void mask_area(const Stream& stream, const View& words, const View& area) {
    const int64_t n = words.size[1];
    const int64_t masks = words.size[0];
    launch(stream, area_kernel, masks, threads_for(n), 0, words.as<const uint32_t>(), n, area.as<int64_t>(), masks, masks);
}

void mask_boxes(const Stream& stream, const View& words, int64_t width, const View& boxes) {
    const int64_t n = words.size[1];
    launch(stream, boxes_kernel, words.size[0], threads_for(n), 0, words.as<const uint32_t>(), n, width, boxes.as<int64_t>());
}

void mask_iou(const Stream& stream, const View& a, const View& b, const View& areas, const View& iou) {
    const bool self = !b.given();
    const View& other = self ? a : b;
    const int64_t B = a.size[0], N = a.size[1], M = other.size[1], n = a.size[2], all = areas.size[1];
    int64_t *areas_a = areas.as<int64_t>(), *areas_b = self ? areas_a : areas_a + N;
    launch(stream, area_kernel, B * N, threads_for(n), 0, a.as<const uint32_t>(), n, areas_a, N, all);
    if (!self) launch(stream, area_kernel, B * M, threads_for(n), 0, b.as<const uint32_t>(), n, areas_b, M, all);
    const auto count = [&](auto kernel, auto* out) {
        launch(stream, kernel, B * tiles(N, side) * tiles(M, side), 256, 0, a.as<const uint32_t>(), other.as<const uint32_t>(),
               areas_a, areas_b, all, out, N, M, n, self);
    };
    if (iou.dtype == DType::f64) return count(iou_kernel<double>, iou.as<double>());
    count(iou_kernel<float>, iou.as<float>());
}

void window_masks(const Stream& stream, const View& words, int64_t height, int64_t width, int64_t top, int64_t left,
                  int64_t out_height, int64_t out_width, bool flip, const View& out) {
    const int64_t total = out.size[0] * out.size[1];
    launch(stream, window_kernel, tiles(total, 256), 256, 0, words.as<const uint32_t>(), words.size[1], height, width, top,
           left, out_width, flip, out.as<uint32_t>(), out.size[1], out_height * out_width, total);
}

}  // namespace cuda
}  // namespace sprompt
