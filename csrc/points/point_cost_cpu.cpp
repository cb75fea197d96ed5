// The points of an image are sorted by the row of the map in which they lie, and cut into blocks. So a block reads few rows of
// each map, which are copied to floats once.
#include "common/scratch.h"
#include "common/threads.h"
#include "mask_conv/product.h"
#include "points/points.h"
#include "points/sampling.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {

constexpr int64_t most_points = 512;   // of a block: a multiple of every NR
constexpr int64_t most_cells = 16384;  // of the rows of a block, or two rows
constexpr int64_t most_chunks = 16;    // of the blocks of an image; each is one piece of parallel work with its own sums
constexpr int64_t together = 3;        // targets of one register tile, with two masks
constexpr int64_t rows_at_once = MR;   // masks whose values at the points of a block are held

constexpr int64_t direct_rows = 4;  // the same for logits that are sampled themselves, so that they stay in the L1 cache

SPROMPT_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// How the points of an image are cut. It depends on the shapes only, except for the blocks' ends.
struct Cut {
    int64_t number, h, w, most_rows, most_blocks, chunks;

    SPROMPT_INLINE Cut(int64_t number_, int64_t h_, int64_t w_) : number(number_), h(h_), w(w_) {
        most_rows = smaller(h + 2, larger(2, most_cells / (w + 2)));
        most_blocks = number / most_points + (h + 1) / larger(most_rows - 1, 1) + 2;
        chunks = number > 0 ? smaller(most_chunks, most_blocks) : 0;
    }
};

// The sorted points of one image: x and y, their rows (-1 to h - 1), and the ends of the blocks.
struct Sorted {
    float *x, *y;
    int32_t *row, *ends;
    int64_t blocks;
};

static Sorted sorted_at(float* memory, const Cut& cut) {
    int32_t* row = reinterpret_cast<int32_t*>(memory + 2 * cut.number);
    return {memory, memory + cut.number, row, row + cut.number, row[cut.number + cut.most_blocks]};
}
SPROMPT_INLINE int64_t sorted_size(const Cut& cut) { return (3 * cut.number + cut.most_blocks + 1 + 15) / 16 * 16; }

// Fills `sorted` with the points of an image by increasing row; points of one row keep their order. `buffer` has 3 number
// floats, `starts` h + 2 numbers.
static void sort_points(const Points& points, const Cut& cut, float* buffer, int32_t* starts, float* memory) {
    const int64_t T = cut.number;
    float *x = buffer, *y = buffer + T;
    int32_t* row = reinterpret_cast<int32_t*>(buffer + 2 * T);
    for (int64_t r = 0; r < cut.h + 2; ++r) starts[r] = 0;
    for (int64_t i = 0; i < T; i += W) {
        const vi index = static_cast<int32_t>(i) + lanes(), end = broadcast(static_cast<int32_t>(T - 1));
        vf px, py, cx, cy, rest;
        points.at(select_int(index < end, index, end), px, py);
        place_of(px, py, cut.h, cut.w, cx, cy);
        float xs[W], ys[W];
        int32_t rows[W];
        store(xs, px);
        store(ys, py);
        store(rows, floor_of(cy, rest));
        for (int64_t l = 0; l < W && i + l < T; ++l) {
            x[i + l] = xs[l];
            y[i + l] = ys[l];
            row[i + l] = rows[l];
            ++starts[rows[l] + 1];
        }
    }
    int32_t before = 0;
    for (int64_t r = 0; r < cut.h + 2; ++r) {
        const int32_t count = starts[r];
        starts[r] = before;
        before += count;
    }
    Sorted sorted = sorted_at(memory, cut);
    for (int64_t i = 0; i < T; ++i) {
        const int32_t place = starts[row[i] + 1]++;
        sorted.x[place] = x[i];
        sorted.y[place] = y[i];
        sorted.row[place] = row[i];
    }
    int32_t blocks = 0;
    for (int64_t begin = 0; begin < T;) {
        int64_t end = smaller(begin + most_points, T);
        while (sorted.row[end - 1] - sorted.row[begin] + 2 > cut.most_rows) --end;
        sorted.ends[blocks++] = static_cast<int32_t>(end);
        begin = end;
    }
    sorted.ends[cut.most_blocks] = blocks;
}

// The sums of one chunk: z t and p t (N, G), softplus(z) and p (N), t (G).
struct Sums {
    float *zt, *pt, *softplus, *p, *t;
};
SPROMPT_INLINE Sums sums_at(float* partial, int64_t N, int64_t G) {
    return {partial, partial + N * G, partial + 2 * N * G, partial + 2 * N * G + N, partial + 2 * N * G + 2 * N};
}

// Scratch memory of one worker.
struct Buffers {
    float* cells;     // rows of a map
    float* features;  // [slice][C][NR], of a pair
    float *z, *p;     // (rows_at_once, most_points)
    float* t;         // (G, most_points)
    int32_t* live;    // (G): the targets that are not 0 at all points of the block
    int32_t* first;   // (most_points): taps
    float *fx, *fy;
};
static Buffers buffers_at(float* memory, int64_t G, int64_t features, int64_t cells) {
    Buffers b;
    b.cells = memory;
    b.features = b.cells + cells;
    b.z = b.features + features;
    b.p = b.z + rows_at_once * most_points;
    b.t = b.p + rows_at_once * most_points;
    b.first = reinterpret_cast<int32_t*>(b.t + G * most_points);
    b.fx = reinterpret_cast<float*>(b.first) + most_points;
    b.fy = b.fx + most_points;
    b.live = reinterpret_cast<int32_t*>(b.fy + most_points);
    return b;
}
SPROMPT_INLINE int64_t buffers_size(int64_t G, int64_t features, int64_t cells) {
    return (cells + features + (2 * rows_at_once + G + 3) * most_points + G + 15) / 16 * 16;
}

// Sums over the points of a block of M masks and J targets: zt and pt [M][J].
template <int M, int J>
static void tile_products(const float* z, const float* p, const float* const* t, int64_t count, float (*zt)[together],
                          float (*pt)[together]) {
    vf with_z[M][J] = {}, with_p[M][J] = {};
    for (int64_t i = 0; i < count; i += W) {
        vf mask[M], probability[M];
        for (int m = 0; m < M; ++m) {
            mask[m] = load(z + m * most_points + i);
            probability[m] = load(p + m * most_points + i);
        }
        for (int j = 0; j < J; ++j) {
            const vf target = load(t[j] + i);
            for (int m = 0; m < M; ++m) {
                with_z[m][j] = fma(mask[m], target, with_z[m][j]);
                with_p[m][j] = fma(probability[m], target, with_p[m][j]);
            }
        }
    }
    for (int m = 0; m < M; ++m)
        for (int j = 0; j < J; ++j) {
            zt[m][j] = sum(with_z[m][j]);
            pt[m][j] = sum(with_p[m][j]);
        }
}
template <int M>
SPROMPT_INLINE void products(const float* z, const float* p, const float* const* t, int64_t targets, int64_t count,
                             float (*zt)[together], float (*pt)[together]) {
    if (targets == 3)
        tile_products<M, 3>(z, p, t, count, zt, pt);
    else if (targets == 2)
        tile_products<M, 2>(z, p, t, count, zt, pt);
    else
        tile_products<M, 1>(z, p, t, count, zt, pt);
}

// Adds the sums of `rows` masks, n and following, whose logits at the `count` points of a block are in buffers.z.
static void add_masks(const Buffers& buffers, int64_t n, int64_t rows, int64_t G, int64_t live, int64_t count,
                      const Sums& sums) {
    for (int64_t r = 0; r < rows; ++r) {
        const float* z = buffers.z + r * most_points;
        float* p = buffers.p + r * most_points;
        vf softplus = {}, total = {};
        int64_t i = 0;
        for (; i + W <= count; i += W) {
            const Logistic logistic(load(z + i));
            store(p + i, logistic.p);
            softplus += logistic.softplus;
            total += logistic.p;
        }
        if (i < count) {
            const Logistic logistic(load(z + i));
            const vi real = first_lanes(count - i);
            store(p + i, logistic.p);
            softplus += select(real, logistic.softplus, vf{});
            total += select(real, logistic.p, vf{});
        }
        sums.softplus[n + r] += sum(softplus);
        sums.p[n + r] += sum(total);
    }
    for (int64_t k = 0; k < live; k += together) {
        const int64_t targets = smaller(live - k, together);
        const float* t[together];
        for (int64_t j = 0; j < targets; ++j) t[j] = buffers.t + buffers.live[k + j] * most_points;
        for (int64_t r = 0; r < rows; r += 2) {
            float zt[2][together], pt[2][together];
            const float *z = buffers.z + r * most_points, *p = buffers.p + r * most_points;
            const int64_t masks = smaller(rows - r, 2);
            if (masks == 2)
                products<2>(z, p, t, targets, count, zt, pt);
            else
                products<1>(z, p, t, targets, count, zt, pt);
            for (int64_t m = 0; m < masks; ++m)
                for (int64_t j = 0; j < targets; ++j) {
                    const int64_t place = (n + r + m) * G + buffers.live[k + j];
                    sums.zt[place] += zt[m][j];
                    sums.pt[place] += pt[m][j];
                }
        }
    }
}

struct Job {
    const View &maps, &kernels, &words;
    int64_t height, width, N, G;
    const float* packed;  // the kernels of every image as mask_conv/product.h reads them
    Cut cut;
};

// out(i, values) at every W points of the block, for map c of image b. The rows of the block begin at `top`. Meanwhile the rows
// of the next map are fetched, because the hardware does not see that they come next.
template <class F>
SPROMPT_INLINE void sample_map(const Job& job, int64_t b, int64_t c, int64_t top, int64_t rows, int64_t count,
                               const Buffers& buffers, const F& out) {
    const View& maps = job.maps;
    SPROMPT_FLOAT_TYPES(maps.dtype, T,
                        take_rows(maps.as<const T>() + b * maps.stride[0] + c * maps.stride[1], maps.stride[2], job.cut.h,
                                  job.cut.w, top, rows, buffers.cells))
    const int64_t bytes = maps.dtype == DType::f32 ? 4 : 2;
    const int64_t line = maps.stride[2] * bytes, first = top > 0 ? top : 0, last = smaller(top + rows, job.cut.h);
    const char* next = maps.as<const char>() + (b * maps.stride[0] + (c + 1) * maps.stride[1]) * bytes + first * line;
    const int64_t ahead = c + 1 < maps.size[1] && last > first ? (last - first) * line : 0;
    const int64_t share = ((ahead + 63) / 64 * W + count - 1) / count * 64;
    for (int64_t i = 0; i < count; i += W) {
        for (int64_t k = 0, p = i / W * share; k < share && p < ahead; k += 64, p += 64) __builtin_prefetch(next + p);
        const Taps taps{load(buffers.first + i), load(buffers.fx + i), load(buffers.fy + i)};
        out(i, value_at(buffers.cells, job.cut.w + 2, taps));
    }
}

// Adds points [begin, end) of image b to the sums, for its first `real` targets.
static void add_block(const Job& job, int64_t b, int64_t real, const Sorted& sorted, int64_t begin, int64_t end,
                      const Buffers& buffers, const Sums& sums) {
    const int64_t count = end - begin, whole = round_up(count, NR), h = job.cut.h, w = job.cut.w;
    const int32_t top = sorted.row[begin];
    const int64_t rows = sorted.row[end - 1] - top + 2;
    const int32_t outside = static_cast<int32_t>(rows * (w + 2));
    const View& words = job.words;
    // Taps of the maps and values of the targets. Behind the points both are 0.
    for (int64_t g = 0; g < real; ++g) buffers.live[g] = 0;
    for (int64_t i = 0; i < whole; i += W) {
        float xs[W], ys[W];
        for (int64_t l = 0; l < W; ++l) {
            const int64_t place = begin + smaller(i + l, count - 1);
            xs[l] = sorted.x[place];
            ys[l] = sorted.y[place];
        }
        const vf x = load(xs), y = load(ys);
        const Taps taps = taps_of(x, y, h, w, top, outside);
        const vi inside = first_lanes(larger(count - i, 0));
        store(buffers.first + i, select_int(inside, taps.first, broadcast(outside)));
        store(buffers.fx + i, taps.fx);
        store(buffers.fy + i, taps.fy);
        for (int64_t g = 0; g < real; ++g) {
            const char* bytes = words.as<const char>() + 4 * (b * words.stride[0] + g * words.stride[1]);
            const vf t = select(inside, Bits{bytes, job.height, job.width}.at(x, y), vf{});
            store(buffers.t + g * most_points + i, t);
            const float part = sum(t);
            sums.t[g] += part;
            buffers.live[g] |= part > 0.0f;
        }
    }
    int64_t live = 0;
    for (int64_t g = 0; g < real; ++g)
        if (buffers.live[g]) buffers.live[live++] = static_cast<int32_t>(g);
    if (!job.kernels.given()) {
        for (int64_t n = 0; n < job.N; n += direct_rows) {
            const int64_t masks = smaller(job.N - n, direct_rows);
            for (int64_t r = 0; r < masks; ++r)
                sample_map(job, b, n + r, top, rows, whole, buffers, [&](int64_t i, vf value) __attribute__((always_inline)) {
                    store(buffers.z + r * most_points + i, value);
                });
            add_masks(buffers, n, masks, job.G, live, count, sums);
        }
        return;
    }
    const int64_t C = job.maps.size[1];
    for (int64_t c = 0; c < C; ++c)
        sample_map(job, b, c, top, rows, whole, buffers, [&](int64_t i, vf value) __attribute__((always_inline)) {
            store(buffers.features + (i / NR * C + c) * NR + i % NR, value);
        });
    const Groups groups(job.N);
    for (int64_t k = 0; k < groups.count; ++k) {
        const int64_t n = groups.begin(k), masks = groups.begin(k + 1) - n;
        for (int64_t s = 0; s < whole / NR; ++s) {
            float tile[MR * NR];
            product_of_group(masks, job.packed + (b * job.N + n) * C, buffers.features + s * C * NR, C, tile);
            for (int64_t r = 0; r < masks; ++r)
                for (int i = 0; i < NR; i += W) store(buffers.z + r * most_points + s * NR + i, load(tile + r * NR + i));
        }
        add_masks(buffers, n, masks, job.G, live, count, sums);
    }
}

}  // namespace

void point_cost(const View& maps, const View& kernels, const View& words, int64_t height, int64_t width, const View& counts,
                const View& seed, const View& points, int64_t number, float bce_weight, float dice_weight, const View& cost,
                int threads) {
    const int64_t B = cost.size[0], N = cost.size[1], G = cost.size[2], C = maps.size[1];
    const Cut cut(number, maps.size[2], maps.size[3]);
    const int64_t chunks = cut.chunks, per_chunk = 2 * N * G + 2 * N + G, per_image = sorted_size(cut);
    const int64_t cells = bordered(cut.most_rows, cut.w), features = kernels.given() ? C * most_points : 0;
    const int64_t per_worker = buffers_size(G, features, cells), per_sort = 3 * number + cut.h + 2;
    Scratch memory;
    float* scratch = memory.take<float>(threads, larger(per_worker, per_sort));
    float* partial = memory.take<float>(B, chunks, per_chunk);
    float* sorted = memory.take<float>(B, per_image);
    float* packed = memory.take<float>(B, kernels.given() ? N * C : 0);
    const int64_t stride = larger(per_worker, per_sort);
    parallel_for(number > 0 ? B : 0, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t b = begin; b < end; ++b) {
            float* own = scratch + worker * stride;
            int32_t* starts = reinterpret_cast<int32_t*>(own + 3 * number);
            sort_points(Points(points, seed, b), cut, own, starts, sorted + b * per_image);
            if (!kernels.given()) continue;
            SPROMPT_FLOAT_TYPES(kernels.dtype, T,
                                pack_groups(kernels.as<const T>() + b * kernels.stride[0], kernels.stride[1], kernels.stride[2],
                                            N, C, packed + b * N * C))
        }
    });
    const auto real_of = [&](int64_t b) { return counts.given() ? counts.as<const int64_t>()[b * counts.stride[0]] : G; };
    const Job job{maps, kernels, words, height, width, N, G, packed, cut};
    parallel_for(B * chunks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        const Buffers buffers = buffers_at(scratch + worker * stride, G, features, cells);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t b = item / chunks, chunk = item % chunks, real = real_of(b);
            float* sums = partial + item * per_chunk;
            clear(sums, per_chunk);
            if (real == 0) continue;
            const Sorted all = sorted_at(sorted + b * per_image, cut);
            for (int64_t k = chunk * all.blocks / chunks; k < (chunk + 1) * all.blocks / chunks; ++k)
                add_block(job, b, real, all, k > 0 ? all.ends[k - 1] : 0, all.ends[k], buffers, sums_at(sums, N, G));
        }
    });
    // Adds the chunks in double.
    parallel_for(B * N, 1 + (1 << 15) / (G * (chunks + 1) + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t b = item / N, n = item % N, real = real_of(b);
            float* out = cost.as<float>() + item * G;
            for (int64_t g = 0; g < G; ++g) {
                out[g] = 0.0f;
                if (g >= real) continue;
                double zt = 0, pt = 0, softplus = 0, p = 0, t = 0;
                for (int64_t c = 0; c < chunks; ++c) {
                    const Sums sums = sums_at(partial + (b * chunks + c) * per_chunk, N, G);
                    zt += sums.zt[n * G + g];
                    pt += sums.pt[n * G + g];
                    softplus += sums.softplus[n];
                    p += sums.p[n];
                    t += sums.t[g];
                }
                const double bce = (softplus - zt) / static_cast<double>(number > 0 ? number : 1);
                const double dice = 1.0 - (2.0 * pt + 1.0) / (p + t + 1.0);
                out[g] = static_cast<float>(bce_weight * bce + dice_weight * dice);
            }
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
