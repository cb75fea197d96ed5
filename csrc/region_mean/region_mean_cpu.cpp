#include "common/bits.h"
#include "common/lanes.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "region_mean/region_mean.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr int64_t block = 8;  // channels that share one pass over the runs

// ---- runs

// The map as the runs see it: strides of rows and columns in elements, and the end of a channel's plane.
struct Plane {
    int64_t height, width, row, column, end;
    // True: neighbouring cells of a row are neighbouring elements, and rows do not overlap.
    // False: neighbouring channels are neighbouring elements.
    bool along_x;
};
static Plane plane_of(const View& map) {  // (B, C, H, W)
    const int64_t height = map.size[2], width = map.size[3], row = map.stride[2];
    const bool along_x = (map.stride[3] == 1 || width <= 1) && (row >= width || height <= 1);
    const int64_t column = along_x ? 1 : map.stride[3];
    return {height, width, row, column, (height - 1) * row + (width - 1) * column + 1, along_x};
}

struct Runs {
    int64_t* out;
    int64_t* head;  // number of runs; of leading runs whose W lanes lie inside the plane; of cells
    int64_t end;

    SPROMPT_INLINE Runs(int64_t* runs, int64_t* heads, int64_t plane_end) : out(runs), head(heads), end(plane_end) {
        head[0] = head[1] = head[2] = 0;
    }
    SPROMPT_INLINE void put(int64_t offset, uint32_t lanes) {
        out[head[0]++] = offset << 16 | lanes;
        if (offset + W <= end) head[1] = head[0];
        head[2] += popcount(lanes);
    }
};

struct Span {
    int64_t first, last;
};
// Cells of one axis that a box covers: from floor(from) to ceil(to), at least one cell, inside [0, size). A NaN counts as 0.
static Span cells_of(double from, double to, int64_t size) {
    const double limit = static_cast<double>(size);
    const auto held = [&](double x) { return x != x ? 0.0 : x < -1.0 ? -1.0 : x > limit ? limit : x; };
    from = held(from);
    to = held(to);
    int64_t first = static_cast<int64_t>(from);  // rounds towards 0: differs from floor only below 0, where it is clamped to 0
    first = first < 0 ? 0 : first > size - 1 ? size - 1 : first;
    int64_t last = static_cast<int64_t>(to);
    last += static_cast<double>(last) < to;
    return {first, last < first + 1 ? first + 1 : last};
}
SPROMPT_INLINE double coordinate(const View& boxes, int64_t i) {
    if (boxes.dtype == DType::f32) return boxes.as<const float>()[i];
    if (boxes.dtype == DType::f64) return boxes.as<const double>()[i];
    return static_cast<double>(boxes.as<const int64_t>()[i]);
}
static void runs_of_box(const View& boxes, int64_t box, const Plane& plane, Runs& runs) {
    const Span columns = cells_of(coordinate(boxes, 4 * box), coordinate(boxes, 4 * box + 2), plane.width);
    const Span rows = cells_of(coordinate(boxes, 4 * box + 1), coordinate(boxes, 4 * box + 3), plane.height);
    for (int64_t y = rows.first; y < rows.last; ++y)
        for (int64_t x = columns.first; x < columns.last; x += W)
            runs.put(y * plane.row + x * plane.column,
                     static_cast<uint32_t>(low_bits(columns.last - x < W ? columns.last - x : W)));
}
static void runs_of_mask(const uint32_t* words, int64_t n, const Plane& plane, Runs& runs) {
    for (int64_t y = 0; y < plane.height; ++y)
        for (int64_t x = 0; x < plane.width;) {
            const uint64_t v = bits_at(words, n, y * plane.width + x) & low_bits(plane.width - x);
            if (v == 0) {
                x += 64;
                continue;
            }
            const int first = __builtin_ctzll(v);
            x += first;
            if (first + W > 64) continue;  // reads again from x, so that v holds all W cells of the run
            runs.put(y * plane.row + x * plane.column, static_cast<uint32_t>(v >> first & low_bits(W)));
            x += W;
        }
}

// The runs of every box or mask, and their heads.
struct Listed {
    int64_t *runs, *heads;
    int64_t most;  // runs of one mask, at most

    SPROMPT_INLINE const int64_t* of(int64_t i) const { return runs + i * most; }
    SPROMPT_INLINE const int64_t* head(int64_t i) const { return heads + 3 * i; }
};

// Lists the runs of every mask, or of every box if words are none. Boxes behind `counts` get no runs.
static Listed list_runs(const View& boxes, const View& words, const View& counts, const Plane& plane, int threads,
                        Scratch& memory) {
    const View& shapes = words.given() ? words : boxes;
    const int64_t B = shapes.size[0], L = shapes.size[1], n = words.given() ? words.size[2] : 0;
    const int64_t most = plane.height * ((plane.width + W - 1) / W);
    const Listed listed{memory.take<int64_t>(B, L, most), memory.take<int64_t>(B, L, 3), most};
    parallel_for(B * L, 32, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            Runs r(listed.runs + i * most, listed.heads + 3 * i, plane.end);
            if (plane.height == 0 || plane.width == 0 ||
                (counts.given() && i % L >= counts.as<const int64_t>()[i / L * counts.stride[0]]))
                continue;
            if (words.given())
                runs_of_mask(words.as<const uint32_t>() + i * n, n, plane, r);
            else
                runs_of_box(boxes, i, plane, r);
        }
    });
    return listed;
}

// ---- forward

// Lanes of a run as a mask of W lanes.
SPROMPT_INLINE vi lanes_of(int64_t run) {
    vi bit;
    for (int i = 0; i < W; ++i) bit[i] = 1 << i;
    return (broadcast(static_cast<int32_t>(run & 0xffff)) & bit) != 0;
}
SPROMPT_INLINE vf masked(vf v, vi lanes) { return bits_to_float(bits_to_int(v) & lanes); }

// acc[c] += the cells of the runs in the plane at plane + c * stride, for K channels.
template <int K, class T>
SPROMPT_INLINE void add_runs(const T* plane, int64_t stride, const int64_t* runs, const int64_t* head, int64_t end, vf* acc) {
    int64_t i = 0;
    for (; i < head[1]; ++i) {
        const vi lanes = lanes_of(runs[i]);
        const T* p = plane + (runs[i] >> 16);
        for (int c = 0; c < K; ++c) acc[c] += masked(load_as_float(p + c * stride), lanes);
    }
    for (; i < head[0]; ++i) {
        const vi lanes = lanes_of(runs[i]);
        const int64_t offset = runs[i] >> 16;
        for (int c = 0; c < K; ++c) acc[c] += masked(load_some(plane + c * stride + offset, end - offset), lanes);
    }
}

// Prefetches part `part` of `parts` equal parts of `bytes` bytes into the L2 cache.
static void prefetch_part(const void* data, int64_t bytes, int64_t part, int64_t parts) {
    const char* p = static_cast<const char*>(data);
    for (int64_t i = bytes * part / parts / 64; i < bytes * (part + 1) / parts / 64; ++i) __builtin_prefetch(p + 64 * i, 0, 2);
}

// Boxes are scattered over a plane, so the hardware prefetcher does little. While one block of channels is summed, the next
// block is prefetched if it fits the cache and if most of it will be used.
template <class T>
static void mean_along_x(const View& features, const Listed& listed, const Plane& plane, const View& out, int threads) {
    const int64_t L = out.size[1], C = out.size[2], blocks = (C + block - 1) / block, stride = features.stride[1];
    const int64_t jobs = out.size[0] * blocks, bytes = block * stride * static_cast<int64_t>(sizeof(T));
    const bool fits = stride >= plane.end && bytes <= 1 << 18;
    parallel_for(jobs, jobs < 512 ? jobs / 64 + 1 : 8, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / blocks, c0 = job % blocks * block;
            const T* planes = features.as<const T>() + b * features.stride[0] + c0 * stride;
            int64_t cells = 0;
            for (int64_t l = b * L; l < (b + 1) * L; ++l) cells += listed.head(l)[2];
            const bool fetch = fits && job + 1 < end && c0 + 2 * block <= C && 2 * cells > plane.height * plane.width;
            for (int64_t l = 0; l < L; ++l) {
                if (fetch) prefetch_part(planes + block * stride, bytes, l, L);
                const int64_t *run = listed.of(b * L + l), *head = listed.head(b * L + l);
                vf acc[block] = {};
                if (c0 + block <= C)
                    add_runs<block>(planes, stride, run, head, plane.end, acc);
                else
                    for (int64_t c = 0; c < C - c0; ++c)
                        add_runs<1>(planes + c * stride, stride, run, head, plane.end, acc + c);
                const v8f mean = sum_eight(acc) / static_cast<float>(head[2] > 0 ? head[2] : 1);
                float lane[block];
                __builtin_memcpy(lane, &mean, sizeof lane);
                row_from_float(lane, C - c0 < block ? C - c0 : block, out.as<T>() + (b * L + l) * C + c0);
            }
        }
    });
}

// Channels are neighbours in memory. W channels are summed side by side, with one accumulator per lane of a run. So every sum
// has the order, and the bits, of mean_along_x.
template <class T>
static void mean_along_channels(const View& features, const Listed& listed, const Plane& plane, const View& out, int threads) {
    const int64_t L = out.size[1], C = out.size[2], chunks = (C + W - 1) / W;
    parallel_for(out.size[0] * L * chunks, 16, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t l = job / chunks, c0 = job % chunks * W, left = C - c0;
            const T* in = features.as<const T>() + l / L * features.stride[0] + c0;
            const int64_t *run = listed.of(l), *head = listed.head(l);
            vf acc[W] = {};
            for (int64_t i = 0; i < head[0]; ++i) {
                const uint32_t lanes = static_cast<uint32_t>(run[i] & 0xffff);
                const T* p = in + (run[i] >> 16);
                if (left < W) {
                    for (int x = 0; x < W; ++x)
                        if (lanes >> x & 1) acc[x] += load_some(p + x * plane.column, left);
                } else if (lanes == low_bits(W)) {
                    for (int x = 0; x < W; ++x) acc[x] += load_as_float(p + x * plane.column);
                } else {
                    for (int x = 0; x < W; ++x)
                        if (lanes >> x & 1) acc[x] += load_as_float(p + x * plane.column);
                }
            }
            const vf mean = sum_across(acc) / broadcast(static_cast<float>(head[2] > 0 ? head[2] : 1));
            T* to = out.as<T>() + l * C + c0;
            if (left < W)
                store_some(to, mean, left);
            else
                store_float(to, mean);
        }
    });
}

static void mean(const View& features, const View& boxes, const View& words, const View& counts, const View& out, int threads) {
    const Plane plane = plane_of(features);
    Scratch memory;
    const Listed listed = list_runs(boxes, words, counts, plane, threads, memory);
    SPROMPT_FLOAT_TYPES(features.dtype, T, {
        if (plane.along_x)
            mean_along_x<T>(features, listed, plane, out, threads);
        else
            mean_along_channels<T>(features, listed, plane, out, threads);
    })
}

static bool finite(double x) { return x - x == 0.0; }

int64_t region_mean(const View& features, const View& boxes, const View& counts, const View& out, int threads) {
    const int64_t B = boxes.size[0], L = boxes.size[1];
    if (boxes.dtype != DType::i64)
        for (int64_t b = 0; b < B; ++b) {
            const int64_t real = counts.given() ? counts.as<const int64_t>()[b * counts.stride[0]] : L;
            for (int64_t i = 4 * b * L; i < 4 * (b * L + real); ++i)
                if (!finite(coordinate(boxes, i))) return i / 4;
        }
    mean(features, boxes, View{}, counts, out, threads);
    return -1;
}

void mask_mean(const View& features, const View& words, const View& out, int threads) {
    mean(features, View{}, words, View{}, out, threads);
}

// ---- backward

constexpr int64_t spread_block = 4;  // channels whose planes are summed at a time: fewer than `block`, as they are written too

// planes[c] += value[c] on the cells of the runs, for `channels` <= 4 contiguous planes of `end` cells.
static void spread_runs(const int64_t* runs, const int64_t* head, const float* value, int64_t channels, int64_t end,
                        float* planes) {
    int64_t i = 0;
    if (channels == spread_block) {
        vf v[spread_block];
        for (int c = 0; c < spread_block; ++c) v[c] = broadcast(value[c]);
        for (; i < head[1]; ++i) {
            const vi lanes = lanes_of(runs[i]);
            float* p = planes + (runs[i] >> 16);
            for (int c = 0; c < spread_block; ++c) store(p + c * end, load(p + c * end) + masked(v[c], lanes));
        }
    }
    for (; i < head[0]; ++i)
        for (uint32_t lanes = static_cast<uint32_t>(runs[i] & 0xffff); lanes != 0; lanes &= lanes - 1)
            for (int64_t c = 0; c < channels; ++c) planes[c * end + (runs[i] >> 16) + __builtin_ctz(lanes)] += value[c];
}

template <class T>
static void spread(const View& grad, const Listed& listed, const View& out, int threads, Scratch& memory) {
    const int64_t L = grad.size[1], C = out.size[1], P = out.size[2] * out.size[3],
                  blocks = (C + spread_block - 1) / spread_block;
    constexpr bool in_place = sizeof(T) == sizeof(float);
    float* sums = memory.take<float>(in_place ? 0 : threads, spread_block, P);
    parallel_for(out.size[0] * blocks, 2, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / blocks, c0 = job % blocks * spread_block,
                          channels = C - c0 < spread_block ? C - c0 : spread_block;
            T* to = out.as<T>() + (b * C + c0) * P;
            float* planes = in_place ? out.as<float>() + (b * C + c0) * P : sums + worker * spread_block * P;
            __builtin_memset(planes, 0, static_cast<size_t>(4 * channels * P));
            for (int64_t l = 0; l < L; ++l) {
                const int64_t* head = listed.head(b * L + l);
                if (head[0] == 0) continue;
                const T* g = grad.as<const T>() + b * grad.stride[0] + l * grad.stride[1] + c0 * grad.stride[2];
                float value[spread_block];
                for (int64_t c = 0; c < channels; ++c) value[c] = to_float(g[c * grad.stride[2]]) / static_cast<float>(head[2]);
                spread_runs(listed.of(b * L + l), head, value, channels, P, planes);
            }
            if (!in_place) row_from_float(planes, channels * P, to);
        }
    });
}

static void mean_backward(const View& grad, const View& boxes, const View& words, const View& counts, const View& out,
                          int threads) {
    Scratch memory;
    const Listed listed = list_runs(boxes, words, counts, plane_of(out), threads, memory);
    SPROMPT_FLOAT_TYPES(out.dtype, T, spread<T>(grad, listed, out, threads, memory))
}

void region_mean_backward(const View& grad, const View& boxes, const View& counts, const View& out, int threads) {
    mean_backward(grad, boxes, View{}, counts, out, threads);
}

void mask_mean_backward(const View& grad, const View& words, const View& out, int threads) {
    mean_backward(grad, View{}, words, View{}, out, threads);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
