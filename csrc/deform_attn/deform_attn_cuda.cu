// A group of lanes computes one query of one head. Each lane has the same few neighbouring channels of every cell.
//
// The gradient of values is summed by atomics, in integers of fixed point, so the order of the additions has no influence.
// limits_kernel finds the largest exponent of a product of a gradient and a weight, for every head of an image. It sets the
// unit of that head: Q times the points of a level, the largest number of products in a sum, cannot leave 63 bits.
// finish_kernel converts the sums. Products that are not finite stay out of the sums, and mark_kernel writes NaN where they
// belong. It does something only for heads that have such products.
#include "deform_attn/deform_attn.h"

#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int threads = 128;
constexpr int most_levels = 64;
constexpr int least_exponent = -80;  // smaller products are below the resolution of float sums of normal numbers

struct Levels {
    int32_t count;
    int32_t height[most_levels], width[most_levels], number[most_levels];
};

// A float tensor (B, Q, H, n) with last stride 1.
struct Numbers {
    const void* data;
    int64_t b, q, h;  // strides
    DType dtype;

    __device__ float at(int64_t i) const {
        if (dtype == DType::f32) return static_cast<const float*>(data)[i];
        if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(data)[i]);
        return to_float(static_cast<const f16*>(data)[i]);
    }
};

// A contiguous gradient of the points or weights, or null.
struct Output {
    void* data;
    DType dtype;

    __device__ void put(int64_t i, float x) const {
        if (data == nullptr) return;
        if (dtype == DType::f32)
            static_cast<float*>(data)[i] = x;
        else if (dtype == DType::bf16)
            from_float(x, static_cast<bf16*>(data) + i);
        else
            from_float(x, static_cast<f16*>(data) + i);
    }
};

struct Problem {
    Levels levels;
    Numbers points, weights;
    int64_t B, S, H, D, Q, P;
    int64_t value_b, value_s, value_h;  // strides of values
    int64_t grad_b, grad_q;             // strides of grad
    int group;                          // lanes of a query and head: a power of 2
    int unit;                           // of a head with products up to 2^e it is 2^(e - unit)
};

// The query and head of a group of lanes.
struct Job {
    int64_t b, q, h, index;
    bool valid;
    int lane;

    __device__ explicit Job(const Problem& p) {
        const int64_t thread = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x, jobs = p.B * p.Q * p.H;
        lane = static_cast<int>(threadIdx.x) & (p.group - 1);
        index = thread / p.group;
        valid = index < jobs;
        if (!valid) index = jobs - 1;
        h = index % p.H;
        q = index / p.H % p.Q;
        b = index / p.H / p.Q;
    }
};

// One point of a level: its four corners, numbered by row, then column.
struct Point {
    float x, y, right, below, weight;
    int32_t left, top, height, width;
    bool samples;

    __device__ Point(const Problem& p, const Job& job, int64_t place, int32_t height_, int32_t width_)
        : height(height_), width(width_) {
        const int64_t at = job.b * p.points.b + job.q * p.points.q + job.h * p.points.h + 2 * place;
        x = __fmaf_rn(p.points.at(at), static_cast<float>(width), -0.5f);
        y = __fmaf_rn(p.points.at(at + 1), static_cast<float>(height), -0.5f);
        samples = x > -1.0f && x < static_cast<float>(width) && y > -1.0f && y < static_cast<float>(height);
        if (!samples) x = y = 0.0f;
        weight = samples ? p.weights.at(job.b * p.weights.b + job.q * p.weights.q + job.h * p.weights.h + place) : 0.0f;
        left = static_cast<int32_t>(floorf(x));
        top = static_cast<int32_t>(floorf(y));
        right = x - static_cast<float>(left);
        below = y - static_cast<float>(top);
    }
    __device__ bool holds(int corner) const {
        const int32_t i = top + corner / 2, j = left + corner % 2;
        return samples && i >= 0 && i < height && j >= 0 && j < width;
    }
    __device__ int64_t cell(int corner) const { return static_cast<int64_t>(top + corner / 2) * width + left + corner % 2; }
    __device__ float across(int corner) const { return corner % 2 ? right : 1 - right; }
    __device__ float down(int corner) const { return corner / 2 ? below : 1 - below; }
    __device__ float share(int corner) const { return across(corner) * down(corner); }
};

// N neighbouring elements, loaded and stored at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T x[N];
};

// f(level's first cell, place of the point among those of the query, point) for every point of the job.
template <class F>
__device__ inline void for_points(const Problem& p, const Job& job, const F& f) {
    int64_t first = 0, place = 0;
    for (int v = 0; v < p.levels.count; ++v) {
        const int32_t height = p.levels.height[v], width = p.levels.width[v];
        for (const int64_t end = place + p.levels.number[v]; place < end; ++place)
            f(first, place, Point(p, job, place, height, width));
        first += static_cast<int64_t>(height) * width;
    }
}

template <class T, int N>
__global__ void __launch_bounds__(threads, 8) forward_kernel(Problem p, const T* values,  // (B, S, H, D)
                                                             T* out) {                    // (B, Q, H * D)
    const Job job(p);
    if (!job.valid) return;
    const T* map = values + job.b * p.value_b + job.h * p.value_h;
    for (int64_t c = job.lane * N; c < p.D; c += p.group * N) {
        float sum[N] = {};
        for_points(p, job, [&](int64_t first, int64_t, const Point& point) {
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                if (!point.holds(corner)) continue;
                const float weight = point.weight * point.share(corner);
                const auto row = *reinterpret_cast<const Pack<T, N>*>(map + (first + point.cell(corner)) * p.value_s + c);
#pragma unroll
                for (int i = 0; i < N; ++i) sum[i] = __fmaf_rn(weight, to_float(row.x[i]), sum[i]);
            }
        });
        Pack<T, N> result;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            T rounded;
            from_float(sum[i], &rounded);
            result.x[i] = rounded;
        }
        *reinterpret_cast<Pack<T, N>*>(out + job.index * p.D + c) = result;
    }
}

// The incoming gradient; infinity becomes NaN.
template <class T>
__device__ inline float incoming(T x) {
    const float y = to_float(x);
    return y + (y - y);
}

__device__ inline float power_of_2(int e) { return __int_as_float((e + 127) << 23); }
__device__ inline int exponent(float x) { return (__float_as_int(x) >> 23 & 255) - 127; }

// limits (B, H, 2): 1 + e - least_exponent, where the products of a gradient and a weight are at most 2^e; 1 if some of them
// may not be finite.
template <class T>
__global__ void __launch_bounds__(threads) limits_kernel(Problem p, const T* grad, int32_t* limits) {
    const Job job(p);
    float most_grad = 0, most_weight = 0;
    int finite = 1;
    const auto see = [&](float x, float& most) {
        x = fabsf(x);
        if (!(x < INFINITY))
            finite = 0;
        else if (x > most)
            most = x;
    };
    const int64_t weights = job.b * p.weights.b + job.q * p.weights.q + job.h * p.weights.h;
    for (int64_t c = job.lane; c < p.D; c += p.group)
        see(to_float(grad[job.b * p.grad_b + job.q * p.grad_q + job.h * p.D + c]), most_grad);
    for (int64_t i = job.lane; i < p.P; i += p.group) see(p.weights.at(weights + i), most_weight);
    for (int step = p.group / 2; step > 0; step /= 2) {
        most_grad = fmaxf(most_grad, __shfl_xor_sync(whole_warp, most_grad, step));
        most_weight = fmaxf(most_weight, __shfl_xor_sync(whole_warp, most_weight, step));
        finite &= __shfl_xor_sync(whole_warp, finite, step);
    }
    if (!job.valid || job.lane != 0) return;
    const int e = max(exponent(most_grad) + exponent(most_weight) + 2, least_exponent);
    if (e > 127) finite = 0;
    int32_t* at = limits + 2 * (job.b * p.H + job.h);
    // Most jobs see a value that is large enough and need no atomic. The value only grows, so an old one does no harm.
    if (*static_cast<volatile int32_t*>(at) < 1 + e - least_exponent) atomicMax(at, 1 + e - least_exponent);
    if (finite == 0 && *static_cast<volatile int32_t*>(at + 1) == 0) atomicMax(at + 1, 1);
}

// The two factors that convert a product to units; their product may be beyond float.
struct Scale {
    float first, second;

    __device__ Scale(const Problem& p, int32_t limit, bool back) {
        int e = p.unit - (limit - 1 + least_exponent);
        if (back) e = -e;
        first = power_of_2(e / 2);
        second = power_of_2(e - e / 2);
    }
};

// Adds the products of grad and weights to sums (B, S, H, D), unless it is null, and writes the gradients of points and
// weights, unless they are null. `alone`: a lane has one pack of channels.
template <class T, int N, bool alone>
__global__ void __launch_bounds__(threads) backward_kernel(Problem p, const T* grad, const T* values, unsigned long long* sums,
                                                           const int32_t* limits, Output to_points, Output to_weights) {
    const Job job(p);
    const T* map = values + job.b * p.value_b + job.h * p.value_h;
    const T* incoming_row = grad + job.b * p.grad_b + job.q * p.grad_q + job.h * p.D;
    const Scale scale(p, sums != nullptr ? limits[2 * (job.b * p.H + job.h)] : 1 - least_exponent, false);
    const bool others = to_points.data != nullptr || to_weights.data != nullptr;
    float g[N] = {};
    const auto read = [&](int64_t c) {
        const auto pack = *reinterpret_cast<const Pack<T, N>*>(incoming_row + c);
#pragma unroll
        for (int i = 0; i < N; ++i) g[i] = incoming(pack.x[i]);
    };
    if (alone && job.lane * N < p.D) read(job.lane * N);
    for_points(p, job, [&](int64_t first, int64_t place, const Point& point) {
        float by_x = 0, by_y = 0, by_weight = 0;
        for (int64_t c = job.lane * N; c < p.D; c += p.group * N) {
            if (!alone) read(c);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                if (!point.holds(corner)) continue;
                const int64_t cell = first + point.cell(corner);
                if (others) {
                    const auto row = *reinterpret_cast<const Pack<T, N>*>(map + cell * p.value_s + c);
                    float product = 0;
#pragma unroll
                    for (int i = 0; i < N; ++i) product = __fmaf_rn(g[i], to_float(row.x[i]), product);
                    by_x += corner % 2 ? product * point.down(corner) : -(product * point.down(corner));
                    by_y += corner / 2 ? product * point.across(corner) : -(product * point.across(corner));
                    by_weight += product * point.share(corner);
                }
                if (sums != nullptr && job.valid) {
                    const float weight = point.weight * point.share(corner);
                    unsigned long long* sum = sums + ((job.b * p.S + cell) * p.H + job.h) * p.D + c;
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        const float product = weight * g[i];
                        if (fabsf(product) < INFINITY)
                            atomicAdd(sum + i, static_cast<unsigned long long>(
                                                   static_cast<long long>(rintf(product * scale.first * scale.second))));
                    }
                }
            }
        }
        if (!others) return;
        for (int step = p.group / 2; step > 0; step /= 2) {
            by_x += __shfl_xor_sync(whole_warp, by_x, step);
            by_y += __shfl_xor_sync(whole_warp, by_y, step);
            by_weight += __shfl_xor_sync(whole_warp, by_weight, step);
        }
        if (job.lane != 0 || !job.valid) return;
        to_points.put(2 * (job.index * p.P + place), point.weight * static_cast<float>(point.width) * by_x);
        to_points.put(2 * (job.index * p.P + place) + 1, point.weight * static_cast<float>(point.height) * by_y);
        to_weights.put(job.index * p.P + place, by_weight);
    });
}

// out (B, S, H, D) <- sums.
template <class T>
__global__ void __launch_bounds__(threads)
    finish_kernel(Problem p, const long long* sums, const int32_t* limits, T* out, int64_t total) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (i >= total) return;
    const int64_t h = i / p.D % p.H, b = i / p.D / p.H / p.S;
    // A head without queries has no limit.
    const int32_t limit = max(limits[2 * (b * p.H + h)], 1);
    const Scale scale(p, limit, true);
    from_float(static_cast<float>(sums[i]) * scale.first * scale.second, out + i);
}

// Writes NaN to out (B, S, H, D) where a product is not finite.
template <class T>
__global__ void __launch_bounds__(threads) mark_kernel(Problem p, const T* grad, const int32_t* limits, T* out) {
    const Job job(p);
    if (!job.valid || limits[2 * (job.b * p.H + job.h) + 1] == 0) return;
    for_points(p, job, [&](int64_t first, int64_t, const Point& point) {
        for (int64_t c = job.lane; c < p.D; c += p.group) {
            const float g = incoming(grad[job.b * p.grad_b + job.q * p.grad_q + job.h * p.D + c]);
            for (int corner = 0; corner < 4; ++corner)
                if (point.holds(corner) && !(fabsf(point.weight * point.share(corner) * g) < INFINITY))
                    from_float(NAN, out + ((job.b * p.S + first + point.cell(corner)) * p.H + job.h) * p.D + c);
        }
    });
}

Numbers numbers_of(const View& x) { return {x.data, x.stride[0], x.stride[1], x.stride[2], x.dtype}; }

Problem problem_of(const View& values, const View& points, const View& weights, const View& levels, int pack) {
    Problem p{};
    p.B = values.size[0];
    p.S = values.size[1];
    p.H = values.size[2];
    p.D = values.size[3];
    p.Q = points.size[1];
    p.P = weights.size[3];
    p.points = numbers_of(points);
    p.weights = numbers_of(weights);
    p.value_b = values.stride[0];
    p.value_s = values.stride[1];
    p.value_h = values.stride[2];
    if (levels.size[0] > most_levels) throw Failure("more than 64 levels");
    p.levels.count = static_cast<int32_t>(levels.size[0]);
    int64_t most = 1;
    for (int32_t v = 0; v < p.levels.count; ++v) {
        const int64_t* level = levels.as<const int64_t>() + 3 * v;
        p.levels.height[v] = static_cast<int32_t>(level[0]);
        p.levels.width[v] = static_cast<int32_t>(level[1]);
        p.levels.number[v] = static_cast<int32_t>(level[2]);
        most = level[2] > most ? level[2] : most;
    }
    p.group = 1;
    while (p.group < warp && p.group * pack < p.D) p.group *= 2;
    p.unit = 62;
    for (int64_t products = p.Q * most; products > 0; products /= 2) --p.unit;
    return p;
}

// Runs the statement with N as the elements of a pack: 16 bytes if they divide a row of D elements, else one element.
#define SPROMPT_PACKS(T, D, N, ...)                             \
    do {                                                        \
        if ((D) % static_cast<int64_t>(16 / sizeof(T)) == 0) {  \
            constexpr int N = static_cast<int>(16 / sizeof(T)); \
            __VA_ARGS__;                                        \
        } else {                                                \
            constexpr int N = 1;                                \
            __VA_ARGS__;                                        \
        }                                                       \
    } while (false)

}  // namespace

void deform_attn(const Stream& stream, const View& values, const View& points, const View& weights, const View& levels,
                 const View& out) {
    SPROMPT_DEVICE_FLOATS(values.dtype, T, SPROMPT_PACKS(T, values.size[3], N, {
                              const Problem p = problem_of(values, points, weights, levels, N);
                              launch(stream, forward_kernel<T, N>, tiles(p.B * p.Q * p.H * p.group, threads), threads, 0, p,
                                     values.as<const T>(), out.as<T>());
                          }));
}

void deform_attn_backward(const Stream& stream, const View& grad, const View& values, const View& points, const View& weights,
                          const View& levels, const View& to_values, const View& to_points, const View& to_weights,
                          const View& sums, const View& limits) {
    SPROMPT_DEVICE_FLOATS(
        values.dtype, T, SPROMPT_PACKS(T, values.size[3], N, {
            Problem p = problem_of(values, points, weights, levels, N);
            p.grad_b = grad.stride[0];
            p.grad_q = grad.stride[1];
            const int64_t blocks = tiles(p.B * p.Q * p.H * p.group, threads), total = p.B * p.S * p.H * p.D;
            const T* incoming = grad.as<const T>();
            const Output points_out{to_points.data, to_points.dtype}, weights_out{to_weights.data, to_weights.dtype};
            if (to_values.given()) launch(stream, limits_kernel<T>, blocks, threads, 0, p, incoming, limits.as<int32_t>());
            const auto kernel = p.D <= p.group * N ? backward_kernel<T, N, true> : backward_kernel<T, N, false>;
            launch(stream, kernel, blocks, threads, 0, p, incoming, values.as<const T>(), sums.as<unsigned long long>(),
                   limits.as<const int32_t>(), points_out, weights_out);
            if (to_values.given()) {
                launch(stream, finish_kernel<T>, tiles(total, threads), threads, 0, p, sums.as<const long long>(),
                       limits.as<const int32_t>(), to_values.as<T>(), total);
                launch(stream, mark_kernel<T>, blocks, threads, 0, p, incoming, limits.as<const int32_t>(), to_values.as<T>());
            }
        }));
}

}  // namespace cuda
}  // namespace sprompt
