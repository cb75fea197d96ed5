#include "deform_attn/deform_attn.h"

#include "common/scratch.h"
#include "common/threads.h"
#include "deform_attn/samples.h"

namespace sprompt {
namespace SPROMPT_ISA {

static int64_t most_points(const View& levels) {
    int64_t most = 0;
    for (int64_t v = 0; v < levels.size[0]; ++v) {
        const int64_t number = levels.as<const int64_t>()[3 * v + 2];
        most = number > most ? number : most;
    }
    return most;
}

// ---- forward

// sums (D) += the samples of one query on one level. N: see by_vectors.
template <class T, int N>
SPROMPT_INLINE void add_samples(const T* map, int64_t stride, const Level& level, const Located& located, int64_t query,
                                int64_t D, float* sums) {
    constexpr int K = N > 0 ? N : 1;
    vf top[K], bottom[K];
    if constexpr (N > 0) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            top[k] = load(sums + k * W);
            bottom[k] = vf{};
        }
    }
    for (int64_t t = 0; t < level.number; ++t) {
        const Point point(located, query * level.number + t);
        if (N > 0 && point.inside(level)) {
            const T *p = map + point.cell(level, 0) * stride, *r = p + level.width * stride;
            const vf a = broadcast(point.weight * point.share(0)), b = broadcast(point.weight * point.share(1));
            const vf c = broadcast(point.weight * point.share(2)), d = broadcast(point.weight * point.share(3));
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                top[k] = fma(a, load_as_float(p + k * W), top[k]);
                bottom[k] = fma(c, load_as_float(r + k * W), bottom[k]);
                top[k] = fma(b, load_as_float(p + stride + k * W), top[k]);
                bottom[k] = fma(d, load_as_float(r + stride + k * W), bottom[k]);
            }
            continue;
        }
        for (int corner = 0; corner < 4; ++corner) {
            if (!point.holds(level, corner)) continue;
            const T* p = map + point.cell(level, corner) * stride;
            const float weight = point.weight * point.share(corner);
            if constexpr (N > 0) {
#pragma GCC unroll 8
                for (int k = 0; k < K; ++k) top[k] = fma(broadcast(weight), load_as_float(p + k * W), top[k]);
            } else {
                int64_t c = 0;
                for (; c + W <= D; c += W) store(sums + c, fma(broadcast(weight), load_as_float(p + c), load(sums + c)));
                for (; c < D; ++c) sums[c] += weight * to_float(p[c]);
            }
        }
    }
    if constexpr (N > 0) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) store(sums + k * W, top[k] + bottom[k]);
    }
}

template <class T>
static void forward(const View& values, const View& points, const View& weights, const View& levels, const View& out,
                    int threads) {
    const int64_t B = values.size[0], H = values.size[2], D = values.size[3], Q = points.size[1], V = levels.size[0];
    const int64_t blocks = (Q + block - 1) / block, most = most_points(levels), floats = located_floats(most) + block * D;
    Scratch memory;
    float* scratch = memory.take<float>(threads, floats);
    parallel_for(B * H * blocks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        const Located located = located_at(scratch + worker * floats, most);
        float* sums = scratch + worker * floats + located_floats(most);
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / blocks / H, h = job / blocks % H, q = job % blocks * block, count = smaller(Q - q, block);
            __builtin_memset(sums, 0, static_cast<size_t>(4 * count * D));
            for (int64_t v = 0; v < V; ++v) {
                const Level level = level_of(levels, v);
                locate(points, weights, level, b, h, q, count, located);
                const T* map =
                    values.as<const T>() + b * values.stride[0] + level.first * values.stride[1] + h * values.stride[2];
                by_vectors(D, [&](auto vectors) {
                    for (int64_t i = 0; i < count; ++i)
                        add_samples<T, vectors.count>(map, values.stride[1], level, located, i, D, sums + i * D);
                });
            }
            for (int64_t i = 0; i < count; ++i) row_from_float(sums + i * D, D, out.as<T>() + ((b * Q + q + i) * H + h) * D);
        }
    });
}

void deform_attn(const View& values, const View& points, const View& weights, const View& levels, const View& out,
                 int threads) {
    SPROMPT_FLOAT_TYPES(values.dtype, T, forward<T>(values, points, weights, levels, out, threads))
}

// ---- backward

// The gradients of one query on one level. grad (width), in float. `sums` is the gradient of the map, rows sums_stride apart;
// it is not computed if null. `products` takes the products of grad and the values of each corner, 4 of every point; they are
// not computed if null.
template <class T, int N>
SPROMPT_INLINE void add_gradients(const T* map, int64_t stride, const Level& level, const Located& located, int64_t query,
                                  const float* grad, int64_t width, float* sums, int64_t sums_stride, float* products) {
    constexpr int K = N > 0 ? N : 1;
    vf g[K];
    if constexpr (N > 0) {
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) g[k] = load(grad + k * W);
    }
    for (int64_t t = 0; t < level.number; ++t) {
        const Point point(located, query * level.number + t);
        float* product = products != nullptr ? products + 4 * (query * level.number + t) : nullptr;
        if (N > 0 && point.inside(level)) {
            const int64_t cell = point.cell(level, 0);
            if (sums != nullptr) {
                float *p = sums + cell * sums_stride, *r = p + level.width * sums_stride;
                const vf a = broadcast(point.weight * point.share(0)), b = broadcast(point.weight * point.share(1));
                const vf c = broadcast(point.weight * point.share(2)), d = broadcast(point.weight * point.share(3));
#pragma GCC unroll 8
                for (int k = 0; k < K; ++k) {
                    store(p + k * W, fma(a, g[k], load(p + k * W)));
                    store(p + sums_stride + k * W, fma(b, g[k], load(p + sums_stride + k * W)));
                    store(r + k * W, fma(c, g[k], load(r + k * W)));
                    store(r + sums_stride + k * W, fma(d, g[k], load(r + sums_stride + k * W)));
                }
            }
            if (product != nullptr) {
                const T *p = map + cell * stride, *r = p + level.width * stride;
                vf of[4] = {};
#pragma GCC unroll 8
                for (int k = 0; k < K; ++k) {
                    of[0] = fma(g[k], load_as_float(p + k * W), of[0]);
                    of[1] = fma(g[k], load_as_float(p + stride + k * W), of[1]);
                    of[2] = fma(g[k], load_as_float(r + k * W), of[2]);
                    of[3] = fma(g[k], load_as_float(r + stride + k * W), of[3]);
                }
                const v4f four = sum_four(of);
                __builtin_memcpy(product, &four, sizeof four);
            }
        } else {
            for (int corner = 0; corner < 4; ++corner) {
                if (product != nullptr) product[corner] = 0.0f;
                if (!point.holds(level, corner)) continue;
                const int64_t cell = point.cell(level, corner);
                const float weight = point.weight * point.share(corner);
                float* p = sums != nullptr ? sums + cell * sums_stride : nullptr;
                const T* r = map + cell * stride;
                vf of = {};
                float rest = 0;
                int64_t c = 0;
                for (; c + W <= width; c += W) {
                    const vf x = load(grad + c);
                    if (sums != nullptr) store(p + c, fma(broadcast(weight), x, load(p + c)));
                    if (product != nullptr) of = fma(x, load_as_float(r + c), of);
                }
                for (; c < width; ++c) {
                    if (sums != nullptr) p[c] += weight * grad[c];
                    if (product != nullptr) rest += grad[c] * to_float(r[c]);
                }
                if (product != nullptr) product[corner] = sum(of) + rest;
            }
        }
    }
}

// The gradients of the x, y and weight of point i from the products. They are computed when all products of a block are in
// memory: a load that follows the store of one of its parts would wait.
SPROMPT_INLINE void gradients_of(const Level& level, const Located& located, const float* products, int64_t i, float* by_point,
                                 float* by_weight) {
    const Point point(located, i);
    const float a = products[4 * i], b = products[4 * i + 1], c = products[4 * i + 2], d = products[4 * i + 3];
    const float weight = point.x > -2 && point.y > -2 ? point.weight : 0.0f;
    const float across = (b - a) * (1 - point.below) + (d - c) * point.below;
    const float down = (c - a) * (1 - point.right) + (d - b) * point.right;
    by_point[2 * i] = weight * static_cast<float>(level.width) * across;
    by_point[2 * i + 1] = weight * static_cast<float>(level.height) * down;
    by_weight[i] = a * point.share(0) + b * point.share(1) + c * point.share(2) + d * point.share(3);
}

// The part of a backward that one job computes: channels [channel, channel + width) of queries [query, query + queries).
struct Part {
    int64_t b, h, v, channel, width, query, queries;
};

struct Gradients {
    const View &grad, &values, &points, &weights, &levels, &to_values, &to_points, &to_weights;
    int64_t most;  // points of a query on one level

    // Floats of scratch memory for a job, without the sums of to_values.
    int64_t floats(int64_t width) const { return located_floats(most) + block * (width + 7 * most); }
};

template <class T>
static void compute(const Gradients& all, const Part& part, bool to_values, bool to_others, float* scratch, float* sums) {
    const int64_t b = part.b, h = part.h, H = all.values.size[2], D = all.values.size[3], S = all.values.size[1],
                  Q = all.points.size[1], width = part.width;
    const Level level = level_of(all.levels, part.v);
    const Located located = located_at(scratch, all.most);
    float *grads = scratch + located_floats(all.most), *by_point = grads + block * width,
          *by_weight = by_point + 2 * block * all.most, *products = by_weight + block * all.most;
    const T* map = all.values.as<const T>() + b * all.values.stride[0] + level.first * all.values.stride[1] +
                   h * all.values.stride[2] + part.channel;
    const int64_t cells = level.height * level.width, n = level.number;
    constexpr bool in_place = sizeof(T) == sizeof(float);
    int64_t sums_stride = width;
    T* gradient = to_values ? all.to_values.as<T>() + ((b * S + level.first) * H + h) * D + part.channel : nullptr;
    if (in_place) {
        sums = reinterpret_cast<float*>(gradient);
        sums_stride = H * D;
    }
    for (int64_t cell = 0; cell < cells && to_values; ++cell)
        __builtin_memset(sums + cell * sums_stride, 0, static_cast<size_t>(4 * width));
    const auto row_of = [&](int64_t q) { return b * all.grad.stride[0] + q * all.grad.stride[1] + h * D + part.channel; };
    const auto place_of = [&](int64_t q) { return ((b * Q + q) * H + h) * all.weights.size[3] + level.place; };
    const int64_t end = part.query + part.queries;
    for (int64_t q = part.query; q < end && n > 0; q += block) {
        const int64_t count = smaller(end - q, block);
        for (int64_t i = q; i < q + count && to_others; ++i) {
            if (all.to_points.given()) prefetch<1>(all.to_points, 2 * place_of(i), 2 * n);
            if (all.to_weights.given()) prefetch<1>(all.to_weights, place_of(i), n);
        }
        for (int64_t i = q + block; i < smaller(q + 2 * block, end); ++i) prefetch<0>(all.grad, row_of(i), width);
        locate(all.points, all.weights, level, b, h, q, count, located);
        for (int64_t i = 0; i < count; ++i) row_to_float(all.grad.as<const T>() + row_of(q + i), width, grads + i * width);
        for (int64_t i = 0; i < count * width; ++i) grads[i] += grads[i] - grads[i];  // infinity becomes NaN
        by_vectors(width, [&](auto vectors) {
            for (int64_t i = 0; i < count; ++i)
                add_gradients<T, vectors.count>(map, all.values.stride[1], level, located, i, grads + i * width, width,
                                                to_values ? sums : nullptr, sums_stride, to_others ? products : nullptr);
        });
        for (int64_t i = 0; i < count * n && to_others; ++i) gradients_of(level, located, products, i, by_point, by_weight);
        for (int64_t i = 0; i < count && to_others; ++i) {
            const int64_t place = place_of(q + i);
            if (all.to_points.given()) write_floats(by_point + 2 * n * i, 2 * n, all.to_points, 2 * place);
            if (all.to_weights.given()) write_floats(by_weight + n * i, n, all.to_weights, place);
        }
    }
    for (int64_t cell = 0; cell < cells && to_values && !in_place; ++cell)
        row_from_float(sums + cell * width, width, gradient + cell * H * D);
}

// A job is a level of a head of an image: it owns this part of the gradient of values, so the order of the sums is the order of
// the queries. If the threads are more than half of the jobs, the gradients of points and weights are computed by blocks of
// queries, and those of values by parts of the channels. The bits are the same.
template <class T>
static void backward(const Gradients& all, int threads) {
    const int64_t B = all.values.size[0], H = all.values.size[2], D = all.values.size[3], Q = all.points.size[1],
                  V = all.levels.size[0];
    const bool values = all.to_values.given(), others = all.to_points.given() || all.to_weights.given();
    const int64_t maps = B * H * V;
    if (maps == 0) return;  // no gradient has an element
    const bool together = maps >= 2 * threads;
    int64_t parts = 1, most_cells = 0;
    while (D > 0 && maps * parts < 2 * threads && D % (2 * parts * W) == 0) parts *= 2;
    const int64_t width = D / parts, chunk = 4 * block;
    for (int64_t v = 0; v < V; ++v) {
        const Level level = level_of(all.levels, v);
        most_cells = level.height * level.width > most_cells ? level.height * level.width : most_cells;
    }
    Scratch memory;
    const int64_t workers = smaller(threads, maps * parts);
    float* scratch = memory.take<float>(threads, all.floats(D));
    float* sums = memory.take<float>(values && sizeof(T) < sizeof(float) ? workers : 0, most_cells, width);
    if (values)
        parallel_for(maps * parts, 1, static_cast<int>(workers), [&](int64_t begin, int64_t end, int worker) {
            for (int64_t job = begin; job < end; ++job) {
                const int64_t map = job / parts;
                const Part part{map / V / H, map / V % H, map % V, job % parts * width, width, 0, Q};
                compute<T>(all, part, true, together && others, scratch + worker * all.floats(D),
                           sums + worker * most_cells * width);
            }
        });
    if (others && !(values && together)) {
        const int64_t chunks = (Q + chunk - 1) / chunk;
        parallel_for(maps * chunks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
            for (int64_t job = begin; job < end; ++job) {
                const int64_t map = job / chunks, q = job % chunks * chunk;
                const Part part{map / V / H, map / V % H, map % V, 0, D, q, smaller(Q - q, chunk)};
                compute<T>(all, part, false, true, scratch + worker * all.floats(D), nullptr);
            }
        });
    }
}

void deform_attn_backward(const View& grad, const View& values, const View& points, const View& weights, const View& levels,
                          const View& to_values, const View& to_points, const View& to_weights, int threads) {
    const Gradients all{grad, values, points, weights, levels, to_values, to_points, to_weights, most_points(levels)};
    SPROMPT_FLOAT_TYPES(values.dtype, T, backward<T>(all, threads))
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
