#include "roi_align/roi_align.h"

#include "common/huge_pages.h"
#include "common/product.h"
#include "roi_align/bins.h"

namespace sprompt {
namespace SPROMPT_ISA {

// n rounded up to whole vectors.
SPROMPT_INLINE int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Memory of a job, which computes W channels of one box.
struct Room {
    float* tile;  // (W, W)
    float* line;  // (columns of all blocks, W): one row of bins, by column, then channel
    float* bins;  // (padded(R * R), W)
    float* rows;  // (W, padded(R * R)): the transpose of bins

    static int64_t floats(const Sampling& sampling) {
        return W * W + sampling.most() * W * W + 2 * W * padded(sampling.size * sampling.size);
    }
    Room(float* memory, const Sampling& sampling) {
        tile = memory;
        line = tile + W * W;
        bins = line + sampling.most() * W * W;
        rows = bins + W * padded(sampling.size * sampling.size);
    }
};

// ---- forward

// K sums of the rows of one row of bins, for W cells of K channels. Rows have `cells` cells from p on.
template <int K, class T>
SPROMPT_INLINE void sum_rows(const T* p, const View& map, int64_t cells, const Axis& rows, int64_t bin, float* out) {
    const int64_t channel = map.stride[1], row = map.stride[2];
    vf sum[K] = {};
    for (int32_t i = rows.begin[bin]; i < rows.begin[bin + 1]; ++i) {
        const vf weight = broadcast(rows.weight[i]);
        const T* q = p + rows.cell[i] * row;
        for (int k = 0; k < K; ++k) {
            const vf x = cells >= W ? load_as_float(q + k * channel) : load_some(q + k * channel, cells);
            sum[k] = fma(weight, x, sum[k]);
        }
    }
    for (int k = 0; k < K; ++k) store(out + k * W, sum[k]);
}

// Fills room.line with the columns that the box needs, each summed over the rows of one row of bins.
template <class T>
SPROMPT_INLINE void read_line(const T* plane, const View& map, int64_t channels, const Box& box, int64_t bin,
                              const Room& room) {
    const Axis& rows = box.rows;
    for (int32_t b = 0; b < box.blocks.count; ++b) {
        const int64_t start = box.blocks.start[b], cells = map.size[3] - start;
        if (contiguous_rows(map)) {
            const T* p = plane + start;
            int64_t c = 0;
            for (; c + 4 <= channels; c += 4) sum_rows<4>(p + c * map.stride[1], map, cells, rows, bin, room.tile + c * W);
            for (; c < channels; ++c) sum_rows<1>(p + c * map.stride[1], map, cells, rows, bin, room.tile + c * W);
            transpose(room.tile, W, room.line + b * W * W, W);
        } else {
            const T* p = plane + start * map.stride[3];
            vf sum = {};
            for (int32_t i = rows.begin[bin]; i < rows.begin[bin + 1]; ++i) {
                const T* q = p + rows.cell[i] * map.stride[2];
                sum = fma(broadcast(rows.weight[i]), channels == W ? load_as_float(q) : load_some(q, channels), sum);
            }
            store(room.line + b * W, sum);
        }
    }
}

template <class T>
static void read_box(const View& map, int64_t b, int64_t c, int64_t channels, const Box& box, const Sampling& sampling,
                     const Room& room, T* out) {
    const int64_t R = sampling.size, P = R * R;
    const T* plane = map.as<const T>() + b * map.stride[0] + c * map.stride[1];
    for (int64_t y = 0; y < R; ++y) {
        if (box.rows.begin[y] < box.rows.begin[y + 1]) read_line(plane, map, channels, box, y, room);
        for (int64_t x = 0; x < R; ++x) {
            vf sum = {};
            if (box.rows.begin[y] < box.rows.begin[y + 1])
                for (int32_t i = box.columns.begin[x]; i < box.columns.begin[x + 1]; ++i)
                    sum = fma(broadcast(box.columns.weight[i]), load(room.line + box.columns.cell[i] * W), sum);
            store(room.bins + (y * R + x) * W, sum);
        }
    }
    for (int64_t i = 0; i < P; i += W) transpose(room.bins + i * W, W, room.rows + i, padded(P));
    for (int64_t k = 0; k < channels; ++k) row_from_float(room.rows + k * padded(P), P, out + k * P);
}

template <class T>
static void forward(const Views& maps, const View& boxes, const View& counts, const View& strides, const Sampling& sampling,
                    const View& out, int threads) {
    const int64_t N = boxes.size[1], C = out.size[2], P = sampling.size * sampling.size, groups = (C + W - 1) / W;
    Scratch memory;
    const Box* located = locate_boxes(maps, boxes, counts, strides, sampling, threads, memory);
    const int64_t floats = Room::floats(sampling);
    float* scratch = memory.take<float>(threads, floats);
    // The boxes of W channels follow each other, because they read the same planes. Where channels are contiguous, the groups
    // of channels of one box follow each other.
    const bool planes = contiguous_rows(maps.view[0]);
    parallel_for(out.size[0] * N * groups, 8, threads, [&](int64_t begin, int64_t end, int worker) {
        const Room room(scratch + worker * floats, sampling);
        __builtin_memset(room.tile, 0, sizeof(float) * W * W);
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / (N * groups), n = planes ? job % N : job / groups % N;
            const int64_t c = (planes ? job / N : job) % groups * W, channels = smaller(C - c, W);
            const Box& box = located[b * N + n];
            T* to = out.as<T>() + ((b * N + n) * C + c) * P;
            if (box.level < 0)
                __builtin_memset(to, 0, sizeof(T) * static_cast<size_t>(channels * P));
            else
                read_box<T>(maps.view[box.level], b, c, channels, box, sampling, room, to);
        }
    });
}

void roi_align(const Views& maps, const View& boxes, const View& counts, const View& strides, int64_t sampling, const View& out,
               int threads) {
    SPROMPT_FLOAT_TYPES(out.dtype, T, forward<T>(maps, boxes, counts, strides, {out.size[3], sampling}, out, threads))
}

// ---- backward

// Adds K rows of `tile` to the rows of one row of bins. Rows have `cells` cells from p on.
template <int K>
SPROMPT_INLINE void add_rows(const float* tile, const View& map, int64_t cells, const Axis& rows, int64_t bin, float* p) {
    vf x[K];
    for (int k = 0; k < K; ++k) x[k] = load(tile + k * W);
    for (int32_t i = rows.begin[bin]; i < rows.begin[bin + 1]; ++i) {
        const vf weight = broadcast(rows.weight[i]);
        for (int k = 0; k < K; ++k) {
            float* q = p + k * map.stride[1] + rows.cell[i] * map.stride[2];
            if (cells >= W)
                store(q, fma(weight, x[k], load(q)));
            else
                store_some(q, fma(weight, x[k], load_some(q, cells)), cells);
        }
    }
}

// Adds the gradients of one box and `channels` channels to their planes.
template <class T>
static void add_box(const T* grad, const View& map, int64_t channels, const Box& box, const Sampling& sampling,
                    const Room& room, float* planes) {
    const int64_t R = sampling.size, P = R * R;
    for (int64_t k = 0; k < channels; ++k) row_to_float(grad + k * P, P, room.rows + k * padded(P));
    for (int64_t i = 0; i < P; i += W) transpose(room.rows + i, padded(P), room.bins + i * W, W);
    for (int64_t y = 0; y < R; ++y) {
        if (box.rows.begin[y] == box.rows.begin[y + 1]) continue;
        for (int64_t i = 0; i < box.blocks.count * W; ++i) store(room.line + i * W, vf{});
        for (int64_t x = 0; x < R; ++x) {
            const vf bin = load(room.bins + (y * R + x) * W);
            for (int32_t i = box.columns.begin[x]; i < box.columns.begin[x + 1]; ++i) {
                float* column = room.line + box.columns.cell[i] * W;
                store(column, fma(broadcast(box.columns.weight[i]), bin, load(column)));
            }
        }
        for (int32_t b = 0; b < box.blocks.count; ++b) {
            transpose(room.line + b * W * W, W, room.tile, W);
            const int64_t start = box.blocks.start[b], cells = map.size[3] - start;
            int64_t c = 0;
            for (; c + 4 <= channels; c += 4)
                add_rows<4>(room.tile + c * W, map, cells, box.rows, y, planes + c * map.stride[1] + start);
            for (; c < channels; ++c)
                add_rows<1>(room.tile + c * W, map, cells, box.rows, y, planes + c * map.stride[1] + start);
        }
    }
}

// A job owns the planes of W channels of a picture.
template <class T>
static void backward(const View& grad, const View& boxes, const View& counts, const View& strides, const Sampling& sampling,
                     const Views& out, int threads) {
    const int64_t B = grad.size[0], N = grad.size[1], C = grad.size[2], P = sampling.size * sampling.size;
    const int64_t groups = (C + W - 1) / W;
    constexpr bool in_place = sizeof(T) == sizeof(float);
    int64_t cells = 0;
    for (int32_t v = 0; v < out.count; ++v) {
        const View& map = out.view[v];
        const int64_t area = map.size[2] * map.size[3];
        cells = area > cells ? area : cells;
        ask_for_huge_pages(map.data, B * C * area * static_cast<int64_t>(sizeof(T)));
    }
    Scratch memory;
    const Box* located = locate_boxes(out, boxes, counts, strides, sampling, threads, memory);
    const int64_t floats = Room::floats(sampling);
    float* scratch = memory.take<float>(threads, floats);
    float* sums = memory.take<float>(in_place ? 0 : threads, W, cells);
    parallel_for(B * groups, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        const Room room(scratch + worker * floats, sampling);
        __builtin_memset(room.rows, 0, sizeof(float) * static_cast<size_t>(W * padded(P)));
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / groups, c = job % groups * W, channels = smaller(C - c, W);
            for (int32_t v = 0; v < out.count; ++v) {
                const View& map = out.view[v];
                const int64_t area = map.size[2] * map.size[3];
                T* to = map.as<T>() + (b * C + c) * area;
                float* planes = in_place ? reinterpret_cast<float*>(to) : sums + worker * W * cells;
                __builtin_memset(planes, 0, sizeof(float) * static_cast<size_t>(channels * area));
                for (int64_t n = 0; n < N; ++n)
                    if (located[b * N + n].level == v)
                        add_box(grad.as<const T>() + ((b * N + n) * C + c) * P, map, channels, located[b * N + n], sampling,
                                room, planes);
                if (!in_place) row_from_float(planes, channels * area, to);
            }
        }
    });
}

void roi_align_backward(const View& grad, const View& boxes, const View& counts, const View& strides, int64_t sampling,
                        const Views& out, int threads) {
    SPROMPT_FLOAT_TYPES(grad.dtype, T, backward<T>(grad, boxes, counts, strides, {grad.size[3], sampling}, out, threads))
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
