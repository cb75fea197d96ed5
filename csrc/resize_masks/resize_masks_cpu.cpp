// Enlarging: an interpolated value never leaves the range of its cells, because interpolation is monotone in each cell,
// rounding included. So 32 pixels of a row (a "segment") need no arithmetic if all their cells lie on one side of the
// threshold. A source row is read once and compared cell by cell. Only segments with cells on both sides are widened to output
// columns and interpolated vertically. Reducing to half or less: every segment is interpolated, because comparing all cells
// would cost more than it saves.
//
// With sums, segments whose cells all lie above the threshold are interpolated as well, because their values count.
#include "resize_masks/resize_masks.h"

#include "common/product.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "common/upsample.h"
#include "common/vmath.h"
#include "resize_masks/rows.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {  // without it, member functions would be shared code (common/isa.h)

// Pixel k of a segment between N source rows, which are interpolated at its columns.
template <int N>
SPROMPT_INLINE vf pixel(const float* const* rows, const vf* weights, int64_t k) {
    vf sum = load(rows[0] + k) * weights[0] + load(rows[1] + k) * weights[1];
    for (int i = 2; i < N; ++i) sum = sum + load(rows[i] + k) * weights[i];
    return sum;
}

template <int N>
SPROMPT_INLINE uint32_t segment_bits(const float* const* rows, const vf* weights, int64_t x, vf threshold) {
    uint32_t bits = 0;
    for (int k = 0; k < segment; k += W) bits |= bits_greater(pixel<N>(rows, weights, x + k), threshold) << k;
    return bits;
}

// The sum of the sigmoids of set pixels. Up to 64 segments of a row are added in float, lane by lane. Their sum is added in
// double.
struct Sum {
    static constexpr int64_t most = 64;
    double total = 0.0;
    vf row{};
    int64_t added = 0;  // segments in `row`

    // Adds the pixels of a segment that are above the threshold, among its first `count` pixels, and returns their bits.
    template <int N>
    SPROMPT_INLINE uint32_t add(const float* const* rows, const vf* weights, int64_t x, vf threshold, int64_t count) {
        uint32_t bits = 0;
        vf part{};
        for (int k = 0; k < segment; k += W) {
            const vf z = pixel<N>(rows, weights, x + k);
            vi set = z > threshold;
            if (count < segment) set &= lane_index() + k < static_cast<int32_t>(count);
            const uint32_t here = bits_greater(z, threshold) & static_cast<uint32_t>(low_bits(count - k < 0 ? 0 : count - k));
            bits |= here << k;
            if (here != 0) part = part + select(set, sigmoid(z), vf{});
        }
        row = row + part;
        if (++added == most) flush();
        return bits;
    }
    SPROMPT_INLINE void flush() {
        if (added == 0) return;
        total += static_cast<double>(sum(row));
        row = vf{};
        added = 0;
    }
};

// Writes the same bit `count` times. `all` is 0 or all ones.
SPROMPT_INLINE void put_many(BitWriter& writer, uint32_t all, int64_t count) {
    if (count >= 32) {
        *writer.out++ = static_cast<uint32_t>(writer.pending) | all << writer.count;
        for (int64_t k = 1; k < count / 32; ++k) *writer.out++ = all;
        writer.pending = all & low_bits(writer.count);
    }
    const int rest = static_cast<int>(count % 32);
    writer.put(all & static_cast<uint32_t>(low_bits(rest)), rest);
}

// A worker's memory: the source rows of an output row, and the runs of segments with equal state in these rows.
struct Worker {
    Row rows[most_taps];
    Row* taken[most_taps];  // the rows of the current taps
    int count;              // of them
    uint8_t* run_state;     // (segments) below, above, or 0 if the segments must be interpolated
    int32_t* run_end;       // (segments) the segment behind the run
    int64_t runs;

    // Takes the rows of the taps.
    template <class Source>
    SPROMPT_INLINE void take(const Plan& plan, const Source& source, const Taps& taps) {
        count = taps.count;
        for (int i = 0; i < count; ++i) taken[i] = &get(plan, source, taps, taps.cell[i]);
    }
    // Returns row y. Reading it replaces no row of `taps`.
    template <class Source>
    SPROMPT_INLINE Row& get(const Plan& plan, const Source& source, const Taps& taps, int64_t y) {
        for (Row& row : rows)
            if (row.index == y) return row;
        const auto needed = [&](int64_t index) {
            bool found = false;
            for (int i = 0; i < taps.count; ++i) found |= taps.cell[i] == index;
            return found;
        };
        int free = 0;
        while (needed(rows[free].index)) ++free;
        read_row(plan, source, y, rows[free]);
        return rows[free];
    }

    void find_runs(const Plan& plan) {
        runs = 0;
        const int sides = plan.sums ? below : below | above;
        int common = sides;
        for (int i = 0; i < count; ++i) common &= taken[i]->common;
        if (common != 0) {
            run_state[0] = common & below ? below : above;
            run_end[0] = static_cast<int32_t>(plan.segments);
            runs = 1;
            return;
        }
        const uint8_t *a = taken[0]->state, *b = taken[1]->state, *c = taken[count > 2 ? 2 : 1]->state,
                      *d = taken[count - 1]->state;
        for (int64_t s = 0; s < plan.segments; ++s) {
            const int state = a[s] & b[s] & c[s] & d[s] & sides;
            if (state == 0)
                for (int i = 0; i < count; ++i) widen(plan, *taken[i], s);
            if (runs == 0 || run_state[runs - 1] != state) run_state[runs++] = static_cast<uint8_t>(state);
            run_end[runs - 1] = static_cast<int32_t>(s + 1);
        }
    }

    // Writes segments [s, last) of the current row, which lies between N source rows.
    template <int N>
    SPROMPT_INLINE void interpolate(const Plan& plan, const Taps& taps, int64_t s, int64_t last, BitWriter& writer, Sum& sum) {
        const float* wide[N];
        vf weights[N];
        for (int i = 0; i < N; ++i) {
            wide[i] = taken[i]->wide;
            weights[i] = broadcast(taps.weight[i]);
        }
        const vf threshold = broadcast(plan.threshold);
        const int64_t full = plan.width / segment < last ? plan.width / segment : last;
        if (plan.sums)
            for (; s < full; ++s) writer.put(sum.add<N>(wide, weights, s * segment, threshold, segment), segment);
        else
            for (; s < full; ++s) writer.put(segment_bits<N>(wide, weights, s * segment, threshold), segment);
        if (s == last) return;
        const int64_t rest = plan.width - s * segment;  // of the last segment of the row
        const uint32_t bits = plan.sums ? sum.add<N>(wide, weights, s * segment, threshold, rest)
                                        : segment_bits<N>(wide, weights, s * segment, threshold);
        writer.put(bits & static_cast<uint32_t>(low_bits(rest)), static_cast<int>(rest));
    }

    // Writes output rows [begin, end) of one mask to `words`, which begin with row `begin`. Returns the sum of the sigmoids.
    template <class Source>
    double resize(const Plan& plan, const Source& source, int64_t begin, int64_t end, uint32_t* words) {
        BitWriter writer(words);
        Sum sum;
        for (Row& row : rows) row.index = -1;
        for (int64_t y = begin; y < end; ++y) {
            const Taps& taps = plan.rows[y];
            if (y == begin || !same_cells(taps, plan.rows[y - 1])) {
                take(plan, source, taps);
                find_runs(plan);
            }
            int64_t s = 0;
            for (int64_t run = 0; run < runs; ++run) {
                const int64_t last = run_end[run];
                if (run_state[run] != 0) {
                    const int64_t to = last * segment < plan.width ? last * segment : plan.width;
                    put_many(writer, run_state[run] == above ? ~0u : 0u, to - s * segment);
                } else if (taps.count == 2) {
                    interpolate<2>(plan, taps, s, last, writer, sum);
                } else if (taps.count == 3) {
                    interpolate<3>(plan, taps, s, last, writer, sum);
                } else {
                    interpolate<4>(plan, taps, s, last, writer, sum);
                }
                s = last;
            }
            if (plan.sums) sum.flush();
        }
        writer.close();
        return sum.total;
    }
};

// The sizes and the threshold of a call.
struct Shape {
    int64_t masks, h, w, height, width;
    double extent_height, extent_width;
    int64_t via_height, via_width;  // 0: one map
    float threshold;
};

// source_of(m) is the source of mask m. sums (M) f32 and areas (M) i64, or none.
template <class SourceOf>
void resize_all(const Shape& shape, const View& words, const View& sums, const View& areas, int threads,
                const SourceOf& source_of) {
    const int64_t masks = shape.masks, height = shape.height, width = shape.width, w = shape.w;
    if (masks == 0 || height == 0 || width == 0) {
        for (int64_t mask = 0; sums.given() && mask < masks; ++mask)
            sums.as<float>()[mask] = 0.0f, areas.as<int64_t>()[mask] = 0;
        return;
    }
    Plan plan;
    plan.width = width;
    plan.sums = sums.given();
    plan.threshold = shape.threshold;
    // A pixel lies in the range of its cells with a relative error of 2^-20: two weighted sums of up to four terms with rounded
    // weights.
    const float margin = __builtin_fabsf(shape.threshold) * 0x1p-18f + 0x1p-120f;
    const bool far = __builtin_fabsf(shape.threshold) > 0x1p126f;  // near the clamp of cells: every segment is interpolated
    plan.low = far ? -__builtin_inff() : shape.threshold - margin;
    plan.high = far ? __builtin_inff() : shape.threshold + margin;
    plan.segments = (width + segment - 1) / segment;

    const int64_t columns = plan.segments * segment;
    Scratch memory;
    const Axis x_axis(w, width, shape.extent_width, shape.via_width);
    const Axis y_axis(shape.h, height, shape.extent_height, shape.via_height);
    plan.taps = shape.via_width == 0 ? 2 : most_taps;
    for (int i = 0; i < plan.taps; ++i) {
        plan.cell[i] = memory.take<int32_t>(columns);
        plan.weight[i] = memory.take<float>(columns);
    }
    for (int64_t x = 0; x < columns; ++x) {
        const Taps taps = x_axis(x < width ? x : width - 1);
        for (int i = 0; i < plan.taps; ++i) {
            plan.cell[i][x] = static_cast<int32_t>(taps.cell[i]);
            plan.weight[i][x] = taps.weight[i];
        }
    }
    plan.used = plan.cell[plan.taps - 1][columns - 1] + 1;
    plan.compares = plan.used < 2 * width;
    plan.pair = nullptr;
    if (plan.taps == 2 && plan.used >= 2) {
        plan.pair = memory.take<int32_t>(columns);
        for (int64_t x = 0; x < columns; ++x)
            plan.pair[x] = plan.cell[0][x] < plan.used - 2 ? plan.cell[0][x] : static_cast<int32_t>(plan.used) - 2;
    }
    Taps* rows_taps = memory.take<Taps>(height);
    for (int64_t y = 0; y < height; ++y) rows_taps[y] = y_axis(y);
    plan.rows = rows_taps;

    // The buffers of the workers. Each buffer is a whole number of cache lines.
    const int64_t padded = round_up(w, 32), bit_words = round_up(padded / 32 + 2, 16), states = round_up(plan.segments, 64);
    float* buffers = memory.take<float>(threads, most_taps, padded);
    float* wides = memory.take<float>(threads, most_taps, columns);
    uint32_t* cell_bits = memory.take<uint32_t>(threads, 2 * most_taps, bit_words);
    uint8_t* row_states = memory.take<uint8_t>(threads, most_taps + 1, states);
    int32_t* run_ends = memory.take<int32_t>(threads, round_up(plan.segments, 16));

    // Bands of rows begin at whole words: 64 rows of any width are a multiple of 32 pixels.
    const int64_t band = masks >= 64 ? round_up(height, 64) : 64, bands = (height + band - 1) / band;
    const int64_t n = words_for(height * width), rows = band < height ? band : height;
    double* band_sums = plan.sums ? memory.take<double>(masks, bands) : nullptr;
    int64_t* band_areas = plan.sums ? memory.take<int64_t>(masks, bands) : nullptr;
    parallel_for(masks * bands, 1 + (1 << 16) / (rows * width), threads, [&](int64_t begin, int64_t end, int index) {
        Worker worker;
        for (int64_t i = 0; i < most_taps; ++i) {
            Row& row = worker.rows[i];
            row.buffer = buffers + (most_taps * index + i) * padded;
            row.wide = wides + (most_taps * index + i) * columns;
            row.below_cells = cell_bits + (2 * most_taps * index + 2 * i) * bit_words;
            row.above_cells = row.below_cells + bit_words;
            row.state = row_states + ((most_taps + 1) * index + i) * states;
        }
        worker.run_state = row_states + ((most_taps + 1) * index + most_taps) * states;
        worker.run_end = run_ends + index * round_up(plan.segments, 16);
        for (int64_t job = begin; job < end; ++job) {
            const int64_t mask = job / bands, top = job % bands * band, bottom = top + band < height ? top + band : height;
            uint32_t* out = words.as<uint32_t>() + mask * n + top * width / 32;
            const double sum = worker.resize(plan, source_of(mask), top, bottom, out);
            if (!plan.sums) continue;
            band_sums[job] = sum;
            band_areas[job] = count_bits(out, words_for((bottom - top) * width));
        }
    });
    if (!plan.sums) return;
    for (int64_t mask = 0; mask < masks; ++mask) {
        double sum = 0.0;
        int64_t area = 0;
        for (int64_t job = mask * bands; job < (mask + 1) * bands; ++job) {
            sum += band_sums[job];
            area += band_areas[job];
        }
        sums.as<float>()[mask] = static_cast<float>(sum);
        areas.as<int64_t>()[mask] = area;
    }
}

}  // namespace

void resize_masks(const View& soft, int64_t height, int64_t width, float threshold, double extent_height, double extent_width,
                  int64_t via_height, int64_t via_width, const View& words, const View& sums, const View& areas, int threads) {
    const Shape shape{soft.size[0],  soft.size[1], soft.size[2], height,    width,
                      extent_height, extent_width, via_height,   via_width, threshold};
    SPROMPT_FLOAT_TYPES(soft.dtype, T, resize_all(shape, words, sums, areas, threads, [&](int64_t mask) {
                            return Dense<T>{soft.as<const T>() + mask * soft.stride[0], soft.stride[1], soft.stride[2]};
                        }))
}

void resize_bits(const View& in, int64_t h, int64_t w, int64_t height, int64_t width, float threshold, const View& words,
                 int threads) {
    const Shape shape{in.size[0], h, w, height, width, static_cast<double>(h), static_cast<double>(w), 0, 0, threshold};
    resize_all(shape, words, View{}, View{}, threads,
               [&](int64_t mask) { return Bits{in.as<const uint32_t>() + mask * in.stride[0], in.size[1], w}; });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
