#include "common/lanes.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "points/points.h"
#include "points/sampling.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {

// f(t, lanes, x, y) for the T points of an image, W at a time. Lanes behind the last point repeat it.
template <class F>
SPROMPT_INLINE void for_each_point(const View& points, int64_t b, const F& f) {
    const int64_t T = points.size[1];
    const float* given = points.as<const float>() + b * points.stride[0];
    for (int64_t t = 0; t < T; t += W) {
        const vi index = static_cast<int32_t>(t) + lanes(), end = broadcast(static_cast<int32_t>(T - 1));
        const vi place = select_int(index < end, index, end);
        vf x, y;
        gather_pairs(given, place + place, x, y);
        f(t, T - t < W ? T - t : W, x, y);
    }
}

template <class T>
void sample(const View& maps, const View& points, const View& out, int threads) {
    const int64_t N = maps.size[1], h = maps.size[2], w = maps.size[3], number = points.size[1];
    Scratch memory;
    const int64_t per_worker = bordered(h + 2, w);
    float* scratch = memory.take<float>(threads, per_worker);
    parallel_for(maps.size[0] * N, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / N, n = job % N;
            const T* first = maps.as<const T>() + b * maps.stride[0] + n * maps.stride[1];
            const Map map = whole_map(first, maps.stride[2], h, w, scratch + worker * per_worker);
            T* result = out.as<T>() + job * number;
            for_each_point(points, b, [&](int64_t t, int64_t count, vf x, vf y) __attribute__((always_inline)) {
                const vf value = map.at(map.taps(x, y));
                if (count == W)
                    store_float(result + t, value);
                else
                    store_some(result + t, value, count);
            });
        }
    });
}

template <class T>
void scatter(const View& grad, const View& points, const View& out, int threads) {
    const int64_t N = out.size[1], h = out.size[2], w = out.size[3];
    Scratch memory;
    const int64_t per_worker = bordered(h + 2, w);
    float* scratch = memory.take<float>(threads, per_worker);
    parallel_for(out.size[0] * N, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / N, n = job % N;
            const T* row = grad.as<const T>() + b * grad.stride[0] + n * grad.stride[1];
            const Map map{scratch + worker * per_worker, h, w};
            map.clear_cells();
            for_each_point(points, b, [&](int64_t t, int64_t count, vf x, vf y) __attribute__((always_inline)) {
                map.add(map.taps(x, y), count == W ? load_as_float(row + t) : load_some(row + t, count));
            });
            map.write(out.as<T>() + job * h * w);
        }
    });
}

}  // namespace

void sample_points(const View& maps, const View& points, const View& out, int threads) {
    SPROMPT_FLOAT_TYPES(maps.dtype, T, sample<T>(maps, points, out, threads))
}

void sample_points_backward(const View& grad, const View& points, const View& out, int threads) {
    SPROMPT_FLOAT_TYPES(grad.dtype, T, scatter<T>(grad, points, out, threads))
}

void sample_bits(const View& words, const View& points, int64_t height, int64_t width, const View& out, int threads) {
    const int64_t N = words.size[1], number = points.size[1];
    parallel_for(words.size[0] * N, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / N, n = job % N;
            const char* first = words.as<const char>() + 4 * (b * words.stride[0] + n * words.stride[1]);
            const Bits bits{first, height, width};
            float* result = out.as<float>() + job * number;
            for_each_point(points, b, [&](int64_t t, int64_t count, vf x, vf y) __attribute__((always_inline)) {
                store_some(result + t, bits.at(x, y), count);
            });
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
