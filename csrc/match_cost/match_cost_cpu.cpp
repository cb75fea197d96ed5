#include "match_cost/match_cost.h"

#include "common/scratch.h"
#include "common/targets.h"
#include "common/threads.h"
#include "common/upsample.h"
#include "common/vmath.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr int64_t block = 4, group = 3;  // masks and targets of one register tile: 12 sums, 3 targets, 1 mask
// Upper bounds, in floats, of the probabilities and of the targets of a tile of rows: half of the L1 and half of the L2 cache.
constexpr int64_t most_p = 1400, most_t = 65536;
// A chunk of rows is one piece of parallel work with its own sums. There are at most most_chunks chunks, of at least least_rows
// rows.
constexpr int64_t most_chunks = 32, least_rows = 8;

SPROMPT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SPROMPT_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// Scratch buffers of one worker. A tile is tile_rows rows of `line` floats, which is a whole number of vectors, with zeros
// behind the end of a row.
struct Buffers {
    float *low, *stretched;
    float* p;         // (block, tile_rows, line)
    float* t;         // (G, tile_rows, line)
    int32_t* extent;  // (G, tile_rows, 2): begin of the first and end of the last vector of a row that are not 0
    int32_t* live;    // (G): the targets that have such a vector
};

// The sums of one chunk: pt (N, G), p and p^2 (N), t and t^2 (G).
struct Sums {
    float *pt, *p, *pp, *t, *tt;
};
static Sums sums_at(float* partial, int64_t N, int64_t G) {
    return {partial, partial + N * G, partial + N * G + N, partial + N * G + 2 * N, partial + N * G + 2 * N + G};
}

// Writes row Y of a target into the tile, adds its sums, and sets its extent.
static void take_target(const TargetMap& map, int64_t Y, float* row, int64_t line, int32_t* extent, float& sum_t,
                        float& sum_tt) {
    extent[0] = extent[1] = 0;
    if (!target_row(map, Y, row)) {  // other targets of the group may have pixels in this row, so it must be 0
        for (int64_t x = 0; x < line; x += W) store(row + x, vf{});
        return;
    }
    vf t_sum = {}, tt_sum = {};
    const vf zero = {};
    int32_t first = -1, last = 0;
    for (int64_t x = 0; x < line; x += W) {
        const vf t = load(row + x);
        t_sum += t;
        tt_sum = fma(t, t, tt_sum);
        if (bits_at_least(zero, absolute(t)) != (1u << W) - 1) {  // NaN is not 0
            if (first < 0) first = static_cast<int32_t>(x);
            last = static_cast<int32_t>(x) + W;
        }
    }
    if (first < 0) return;
    extent[0] = first;
    extent[1] = last;
    sum_t += sum(t_sum);
    sum_tt += sum(tt_sum);
}

// pt[4][J] <- the products of the tile's 4 masks with J targets. Only vectors inside the extents of the targets are multiplied.
// Elsewhere the product is 0 for every finite p, and a NaN reaches the cost through the sums of p.
template <int J>
static void tile_products(const float* p, const float* const* t, const int32_t* const* extents, int64_t rows, int64_t line,
                          int64_t mask_stride, float (*pt)[group]) {
    vf total[block][J] = {};
    for (int64_t r = 0; r < rows; ++r) {
        int64_t first = line, last = 0;
        for (int j = 0; j < J; ++j) {
            const int64_t from = extents[j][2 * r], to = extents[j][2 * r + 1];
            if (from >= to) continue;
            if (from < first) first = from;
            if (to > last) last = to;
        }
        for (int64_t x = r * line + first; x < r * line + last; x += W) {
            vf target[J];
            for (int j = 0; j < J; ++j) target[j] = load(t[j] + x);
            for (int i = 0; i < block; ++i) {
                const vf mask = load(p + i * mask_stride + x);
                for (int j = 0; j < J; ++j) total[i][j] = fma(mask, target[j], total[i][j]);
            }
        }
    }
    for (int i = 0; i < block; ++i)
        for (int j = 0; j < J; ++j) pt[i][j] = sum(total[i][j]);
}

// Writes p of row Y of one mask into the tile, and adds its sums.
SPROMPT_INLINE void take_mask(DType dtype, const void* logits, int64_t row_stride, int64_t h, int64_t w, int64_t u, int64_t Y,
                              const Buffers& buffers, float* row, vf& sum_p, vf& sum_pp) {
    upsampled_low_row(dtype, logits, row_stride, h, w, u, Y, buffers.low);
    vf total = {}, squares = {};
    for_each_stretched(buffers.low, w, u, buffers.stretched, [&](int64_t X, vf z) __attribute__((always_inline)) {
        const vf p = sigmoid(z);
        store(row + X, p);
        total += p;
        squares = fma(p, p, squares);
    });
    sum_p += total;
    sum_pp += squares;
}

struct Job {
    const View &logits, &targets;
    int64_t ratio, u, tile_rows;
};

// Adds rows [begin, end) of image b to the sums, for its first `real` targets.
static void chunk_sums(const Job& job, int64_t b, int64_t real, int64_t begin, int64_t end, const Buffers& buffers,
                       const Sums& sums) {
    const View& logits = job.logits;
    const int64_t N = logits.size[1], h = logits.size[2], w = logits.size[3], u = job.u, G = job.targets.size[1];
    const int64_t line = (u * w + W - 1) / W * W, stride = job.tile_rows * line;
    const int64_t bytes = logits.dtype == DType::f32 ? 4 : 2;
    for (int64_t Y = begin; Y < end; Y += job.tile_rows) {
        const int64_t rows = end - Y < job.tile_rows ? end - Y : job.tile_rows;
        int64_t live = 0;
        for (int64_t g = 0; g < real; ++g) {
            const TargetMap map =
                target_map(job.targets, b * job.targets.stride[0] + g * job.targets.stride[1], job.ratio, u * w);
            int32_t* extent = buffers.extent + 2 * g * job.tile_rows;
            bool any = false;
            for (int64_t r = 0; r < rows; ++r) {
                take_target(map, Y + r, buffers.t + g * stride + r * line, line, extent + 2 * r, sums.t[g], sums.tt[g]);
                any |= extent[2 * r] < extent[2 * r + 1];
            }
            if (any) buffers.live[live++] = static_cast<int32_t>(g);
        }
        for (int64_t n = 0; n < N; n += block) {
            const int64_t masks = N - n < block ? N - n : block;
            for (int64_t i = 0; i < masks; ++i) {
                const char* mask = logits.as<const char>() + (b * logits.stride[0] + (n + i) * logits.stride[1]) * bytes;
                vf p = {}, pp = {};
                for (int64_t r = 0; r < rows; ++r)
                    take_mask(logits.dtype, mask, logits.stride[2], h, w, u, Y + r, buffers, buffers.p + i * stride + r * line,
                              p, pp);
                sums.p[n + i] += sum(p);
                sums.pp[n + i] += sum(pp);
            }
            for (int64_t k = 0; k < live; k += group) {
                const int64_t targets = live - k < group ? live - k : group;
                const float* t[group];
                const int32_t* extents[group];
                for (int64_t j = 0; j < targets; ++j) {
                    t[j] = buffers.t + buffers.live[k + j] * stride;
                    extents[j] = buffers.extent + 2 * buffers.live[k + j] * job.tile_rows;
                }
                float pt[block][group];
                if (targets == 3)
                    tile_products<3>(buffers.p, t, extents, rows, line, stride, pt);
                else if (targets == 2)
                    tile_products<2>(buffers.p, t, extents, rows, line, stride, pt);
                else
                    tile_products<1>(buffers.p, t, extents, rows, line, stride, pt);
                for (int64_t i = 0; i < masks; ++i)
                    for (int64_t j = 0; j < targets; ++j) sums.pt[(n + i) * G + buffers.live[k + j]] += pt[i][j];
            }
        }
    }
}

// cost[0 .. real) <- weight * class cost of one mask. logits (K) are `stride` elements apart, labels `label_stride`.
template <class T>
static void class_costs(const T* logits, int64_t stride, const int64_t* labels, int64_t label_stride, int64_t real,
                        float weight, float* cost) {
    for (int64_t g = 0; g < real; g += W) {
        float lane[W] = {};
        const int64_t count = real - g < W ? real - g : W;
        for (int64_t i = 0; i < count; ++i) lane[i] = to_float(logits[labels[(g + i) * label_stride] * stride]);
        const vf z = load(lane), q = sigmoid(z), rest = sigmoid(-z);
        const vf positive = 0.25f * rest * rest * log(q + 1e-12f), negative = 0.75f * q * q * log(rest + 1e-12f);
        store(lane, weight * (negative - positive));
        for (int64_t i = 0; i < count; ++i) cost[g + i] = lane[i];
    }
}

void match_cost(const View& logits, const View& targets, int64_t ratio, const View& class_logits, const View& labels,
                const View& counts, float class_weight, float bce_weight, float dice_weight, int64_t upsample, const View& cost,
                int threads) {
    const int64_t B = logits.size[0], N = logits.size[1], G = targets.size[1], u = upsample;
    const int64_t H = u * logits.size[2], width = u * logits.size[3], pixels = H * width;
    const int64_t line = (width + 63) / 64 * 64, row = line + 2 * u + 64;
    const int64_t chunk_rows = larger(least_rows, (H + most_chunks - 1) / most_chunks);
    const int64_t tile_rows = larger(1, smaller(chunk_rows, smaller(most_p / larger(line, 1), most_t / larger(G * line, 1))));
    const int64_t chunks = pixels > 0 ? (H + chunk_rows - 1) / chunk_rows : 0, per_chunk = N * G + 2 * N + 2 * G;
    const int64_t per_worker = (2 * row + (block + G) * tile_rows * line + G * (1 + 2 * tile_rows) + 15) / 16 * 16;
    Scratch memory;
    float* scratch = memory.take<float>(threads, per_worker);
    float* partial = memory.take<float>(B, chunks, per_chunk);  // the sums of each chunk
    const auto real_of = [&](int64_t b) { return counts.given() ? counts.as<const int64_t>()[b * counts.stride[0]] : G; };
    const Job job{logits, targets, ratio, u, tile_rows};
    parallel_for(B * chunks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        float* own = scratch + worker * per_worker;
        Buffers buffers;
        buffers.low = own + 16;
        buffers.stretched = own + row;
        buffers.p = buffers.stretched + row;
        buffers.t = buffers.p + block * tile_rows * line;
        buffers.extent = reinterpret_cast<int32_t*>(buffers.t + G * tile_rows * line);
        buffers.live = buffers.extent + 2 * G * tile_rows;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t b = item / chunks, first = item % chunks * chunk_rows, real = real_of(b);
            if (real == 0) continue;
            float* sums = partial + item * per_chunk;
            for (int64_t i = 0; i < per_chunk; ++i) sums[i] = 0.0f;
            chunk_sums(job, b, real, first, first + chunk_rows < H ? first + chunk_rows : H, buffers, sums_at(sums, N, G));
        }
    });
    // For every mask of every image: adds its sums over the chunks in double, then computes its row of costs.
    parallel_for(B * N, 1 + (1 << 16) / (G * (chunks + 1) + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t b = item / N, n = item % N, real = real_of(b);
            float* out = cost.as<float>() + item * G;
            for (int64_t g = 0; g < G; ++g) out[g] = 0.0f;
            if (class_logits.given()) {
                SPROMPT_FLOAT_TYPES(class_logits.dtype, T, {
                    class_costs(class_logits.as<const T>() + b * class_logits.stride[0] + n * class_logits.stride[1],
                                class_logits.stride[2], labels.as<const int64_t>() + b * labels.stride[0], labels.stride[1],
                                real, class_weight, out);
                })
            }
            if (pixels == 0) continue;
            constexpr int64_t many = 16;
            for (int64_t g0 = 0; g0 < real; g0 += many) {
                const int64_t targets_here = real - g0 < many ? real - g0 : many;
                double pt[many] = {}, t[many] = {}, tt[many] = {}, p = 0, pp = 0;
                for (int64_t c = 0; c < chunks; ++c) {
                    const Sums sums = sums_at(partial + (b * chunks + c) * per_chunk, N, G);
                    p += sums.p[n];
                    pp += sums.pp[n];
                    for (int64_t j = 0; j < targets_here; ++j) {
                        pt[j] += sums.pt[n * G + g0 + j];
                        t[j] += sums.t[g0 + j];
                        tt[j] += sums.tt[g0 + j];
                    }
                }
                const double P = static_cast<double>(pixels);
                for (int64_t j = 0; j < targets_here; ++j) {
                    const double agree = P - p - t[j] + 2.0 * pt[j], overlap = 2.0 * pt[j] / (pp + tt[j] + 2e-3);
                    out[g0 + j] = static_cast<float>(out[g0 + j] - bce_weight * agree / P - dice_weight * overlap);
                }
            }
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
