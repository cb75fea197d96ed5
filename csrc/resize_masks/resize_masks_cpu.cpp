// Enlarging: an interpolated value never leaves the range of its cells, because interpolation is monotone in each cell,
// rounding included. So 32 pixels of a row (a "segment") need no arithmetic if all their cells lie on one side of the
// threshold. A source row is read once and compared cell by cell. Only segments with cells on both sides are widened to output
// columns and interpolated vertically. Reducing to half or less: every segment is interpolated, because comparing all cells
// would cost more than it saves.
#include "resize_masks/resize_masks.h"

#include "common/bits.h"
#include "common/half.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {  // without it, member functions would be shared code (common/isa.h)

constexpr int64_t segment = 32;
constexpr uint8_t below = 1, above = 2, widened = 4;  // flags of a segment in one source row; below, above: all its cells are

SPROMPT_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// The two cells of an output coordinate, and their weights.
struct Tap {
    int64_t first, second;
    float w0, w1;
};
SPROMPT_INLINE Tap tap_of(int64_t x, double step, int64_t cells) {
    double s = (static_cast<double>(x) + 0.5) * step - 0.5;
    s = s > 0.0 ? s : 0.0;
    const double last = static_cast<double>(cells - 1);
    s = s < last ? s : last;
    const int64_t k = static_cast<int64_t>(s);
    const float w1 = static_cast<float>(s - static_cast<double>(k)), w0 = 1.0f - w1;
    return {w0 > 0.0f ? k : k + 1, w1 > 0.0f ? k + 1 : k, w0, w1};
}

// The values that all masks share. Output columns are padded to whole segments with copies of the last column.
struct Plan {
    int64_t h, w, height, width;
    double step_y, step_x;
    float threshold, low, high;  // cells below `low` (above `high`) on all sides give a pixel that is not set (is set)
    int64_t segments, used;      // used: source columns [0, used) are read
    bool compares;               // true: cells are compared; false: every segment is interpolated
    int32_t *first, *second;     // (32 segments)
    int32_t* pair;               // (32 segments) first, but at most used - 2: two cells can be read from there
    float *w0, *w1;              // (32 segments)
};

// One source row.
struct Row {
    int64_t index;                        // of the source row, or -1
    const float* cells;                   // (used) in the source itself or in `buffer`
    float* buffer;                        // (w, padded to 32)
    float* wide;                          // (32 segments) the cells interpolated at output columns, where widened
    uint32_t *below_cells, *above_cells;  // bit i: cell i is below `low`, above `high`
    uint8_t* state;                       // (segments)
    uint8_t common;                       // the state if all segments have the same, below or above; else 0
};

SPROMPT_INLINE vf held(vf x) {  // clamps to +-2^127; NaN stays
    x = x > broadcast(0x1p127f) ? broadcast(0x1p127f) : x;
    return x < broadcast(-0x1p127f) ? broadcast(-0x1p127f) : x;
}

// Sources. row() returns the first `used` cells of row y as contiguous floats, in place or in `buffer` (used, padded to 32).
template <class T>
struct Dense {
    const T* data;
    int64_t row_stride, column_stride;
    SPROMPT_INLINE const float* row(int64_t y, int64_t used, float* buffer) const {
        const T* p = data + y * row_stride;
        if (column_stride == 1) return unit(p, used, buffer);
        for (int64_t i = 0; i < used; ++i) buffer[i] = to_float(p[i * column_stride]);
        return buffer;
    }
    static SPROMPT_INLINE const float* unit(const float* p, int64_t, float*) { return p; }
    template <class U>
    static SPROMPT_INLINE const float* unit(const U* p, int64_t used, float* buffer) {
        row_to_float(p, used, buffer);
        return buffer;
    }
};
struct Bits {
    const uint32_t* words;
    int64_t n, w;
    SPROMPT_INLINE const float* row(int64_t y, int64_t used, float* buffer) const {
        for (int64_t i = 0; i < used; i += 32) {
            const uint32_t bits = static_cast<uint32_t>(bits_at(words, n, y * w + i));
            for (int k = 0; k < 32; ++k) buffer[i + k] = static_cast<float>(static_cast<int32_t>(bits >> k & 1));
        }
        return buffer;
    }
};

// Compares 32 cells. Bit k of is_below is set where cells[k] is below `low`, bit k of is_above where it is above `high`.
SPROMPT_INLINE void compare(const float* cells, vf low, vf high, uint32_t& is_below, uint32_t& is_above) {
    is_below = is_above = 0;
    for (int k = 0; k < 32; k += W) {
        const vf x = load(cells + k);
        is_below |= bits_greater(low, x) << k;
        is_above |= bits_greater(x, high) << k;
    }
}

// Whether bits [begin, end) are all set.
SPROMPT_INLINE bool all_set(const uint32_t* words, int64_t begin, int64_t end) {
    for (; end - begin > 56; begin += 56) {  // a 64-bit word from any byte holds at least 57 bits from its first
        uint64_t v;
        __builtin_memcpy(&v, reinterpret_cast<const char*>(words) + begin / 8, 8);
        if ((~(v >> (begin % 8)) & low_bits(56)) != 0) return false;
    }
    uint64_t v;
    __builtin_memcpy(&v, reinterpret_cast<const char*>(words) + begin / 8, 8);
    return (~(v >> (begin % 8)) & low_bits(end - begin)) == 0;
}

template <class Source>
void read_row(const Plan& plan, const Source& source, int64_t y, Row& row) {
    const vf low = broadcast(plan.low), high = broadcast(plan.high);
    const float* cells = row.cells = source.row(y, plan.used, row.buffer);
    row.index = y;
    row.common = 0;
    if (!plan.compares) {
        __builtin_memset(row.state, 0, static_cast<size_t>(plan.segments));
        return;
    }
    uint32_t all_below = ~0u, all_above = ~0u;
    const auto note = [&](int64_t i, const float* p) {
        uint32_t is_below, is_above;
        compare(p, low, high, is_below, is_above);
        row.below_cells[i / 32] = is_below;
        row.above_cells[i / 32] = is_above;
        all_below &= is_below;
        all_above &= is_above;
    };
    int64_t i = 0;
    for (; i + 32 <= plan.used; i += 32) note(i, cells + i);
    if (i < plan.used) {
        float rest[32];
        for (int64_t k = 0; k < 32; ++k) rest[k] = cells[i + k < plan.used ? i + k : plan.used - 1];
        note(i, rest);
    }
    row.common = static_cast<uint8_t>((all_below == ~0u ? below : 0) | (all_above == ~0u ? above : 0));
    if (row.common != 0) {
        __builtin_memset(row.state, row.common, static_cast<size_t>(plan.segments));
        return;
    }
    for (int64_t s = 0; s < plan.segments; ++s) {
        const int64_t begin = plan.first[s * segment], end = plan.second[s * segment + segment - 1] + 1;
        row.state[s] = all_set(row.below_cells, begin, end) ? below : all_set(row.above_cells, begin, end) ? above : 0;
    }
}

// a = cells[first], b = cells[second] at output columns [x, x + W).
SPROMPT_INLINE void two_cells(const Plan& plan, const float* cells, int64_t x, vf& a, vf& b) {
    const vi first = load(plan.first + x), second = load(plan.second + x);
#if defined(__AVX2__)
    const int32_t end = static_cast<int32_t>(plan.used) - W, lowest = plan.first[x] < end ? plan.first[x] : end;
    if (lowest >= 0 && plan.second[x + W - 1] - lowest < W) {  // one load holds them all
#if defined(__AVX512F__)
        a = (vf)_mm512_permutexvar_ps((__m512i)(first - lowest), (__m512)load(cells + lowest));
        b = (vf)_mm512_permutexvar_ps((__m512i)(second - lowest), (__m512)load(cells + lowest));
#else
        a = (vf)_mm256_permutevar8x32_ps((__m256)load(cells + lowest), (__m256i)(first - lowest));
        b = (vf)_mm256_permutevar8x32_ps((__m256)load(cells + lowest), (__m256i)(second - lowest));
#endif
        return;
    }
#endif
#if defined(__AVX512F__)
    a = (vf)_mm512_i32gather_ps((__m512i)first, cells, 4);
    b = (vf)_mm512_i32gather_ps((__m512i)second, cells, 4);
#elif defined(__AVX2__)
    if (plan.used >= 2) {  // pairs of neighbours: far cheaper than two gathers
        const int32_t* pair = plan.pair + x;
        const auto one = [&](int k) {
            double both;
            __builtin_memcpy(&both, cells + pair[k], sizeof both);
            return both;
        };
        const auto two = [&](int k) { return _mm_castpd_ps(_mm_set_pd(one(k + 1), one(k))); };
        const __m256 even = _mm256_set_m128(two(4), two(0)), odd = _mm256_set_m128(two(6), two(2));
        const vf low = (vf)_mm256_shuffle_ps(even, odd, 0x88), high = (vf)_mm256_shuffle_ps(even, odd, 0xdd);
        const vi start = load(pair);
        a = select(first == start, low, high);
        b = select(second == start, low, high);
        return;
    }
    a = b = broadcast(cells[0]);
#else
    for (int k = 0; k < W; ++k) {
        a[k] = cells[first[k]];
        b[k] = cells[second[k]];
    }
#endif
}

void widen(const Plan& plan, Row& row, int64_t s) {
    if (row.state[s] & widened) return;
    row.state[s] |= widened;
    for (int64_t x = s * segment; x < (s + 1) * segment; x += W) {
        vf a, b;
        two_cells(plan, row.cells, x, a, b);
        store(row.wide + x, held(a) * load(plan.w0 + x) + held(b) * load(plan.w1 + x));
    }
}

SPROMPT_INLINE uint32_t segment_bits(const float* upper, const float* lower, vf w0, vf w1, vf threshold) {
    uint32_t bits = 0;
    for (int k = 0; k < segment; k += W) bits |= bits_greater(load(upper + k) * w0 + load(lower + k) * w1, threshold) << k;
    return bits;
}

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

// A worker's memory: two source rows, and the runs of segments with equal state in the current pair of rows.
struct Worker {
    Row rows[2];
    uint8_t* run_state;  // (segments) below, above, or 0 if the segments must be interpolated
    int32_t* run_end;    // (segments) the segment behind the run
    int64_t runs;

    // Returns row y. Reading it must not replace row `keep`.
    template <class Source>
    SPROMPT_INLINE Row& get(const Plan& plan, const Source& source, int64_t y, int64_t keep) {
        for (Row& row : rows)
            if (row.index == y) return row;
        Row& row = rows[rows[0].index == keep];
        read_row(plan, source, y, row);
        return row;
    }

    void find_runs(const Plan& plan, Row& upper, Row& lower) {
        runs = 0;
        if (const uint8_t common = upper.common & lower.common) {
            run_state[0] = common & below ? below : above;
            run_end[0] = static_cast<int32_t>(plan.segments);
            runs = 1;
            return;
        }
        for (int64_t s = 0; s < plan.segments; ++s) {
            const uint8_t state = upper.state[s] & lower.state[s] & (below | above);
            if (state == 0) {
                widen(plan, upper, s);
                widen(plan, lower, s);
            }
            if (runs == 0 || run_state[runs - 1] != state) run_state[runs++] = state;
            run_end[runs - 1] = static_cast<int32_t>(s + 1);
        }
    }

    // Writes output rows [begin, end) of one mask to `words`, which begin with row `begin`.
    template <class Source>
    void resize(const Plan& plan, const Source& source, int64_t begin, int64_t end, uint32_t* words) {
        BitWriter writer(words);
        rows[0].index = rows[1].index = -1;
        Row *upper = nullptr, *lower = nullptr;
        const vf threshold = broadcast(plan.threshold);
        for (int64_t y = begin; y < end; ++y) {
            const Tap tap = tap_of(y, plan.step_y, plan.h);
            if (upper == nullptr || upper->index != tap.first || lower->index != tap.second) {
                upper = &get(plan, source, tap.first, tap.second);
                lower = &get(plan, source, tap.second, tap.first);
                find_runs(plan, *upper, *lower);
            }
            const vf w0 = broadcast(tap.w0), w1 = broadcast(tap.w1);
            int64_t s = 0;
            for (int64_t run = 0; run < runs; ++run) {
                const int64_t last = run_end[run];
                if (run_state[run] != 0) {
                    const int64_t to = last * segment < plan.width ? last * segment : plan.width;
                    put_many(writer, run_state[run] == above ? ~0u : 0u, to - s * segment);
                } else {
                    for (; s < last; ++s) {
                        const uint32_t bits =
                            segment_bits(upper->wide + s * segment, lower->wide + s * segment, w0, w1, threshold);
                        const int64_t left = plan.width - s * segment;
                        if (left >= segment)
                            writer.put(bits, 32);
                        else
                            writer.put(bits & static_cast<uint32_t>(low_bits(left)), static_cast<int>(left));
                    }
                }
                s = last;
            }
        }
        writer.close();
    }
};

// source_of(m) is the source of mask m.
template <class SourceOf>
void resize_all(int64_t masks, int64_t h, int64_t w, int64_t height, int64_t width, float threshold, double extent_height,
                double extent_width, const View& words, int threads, const SourceOf& source_of) {
    if (masks == 0 || height == 0 || width == 0) return;
    Plan plan;
    plan.h = h;
    plan.w = w;
    plan.height = height;
    plan.width = width;
    plan.step_y = extent_height / static_cast<double>(height);
    plan.step_x = extent_width / static_cast<double>(width);
    plan.threshold = threshold;
    // A pixel lies in the range of its cells with a relative error of 2^-20: four products, three sums and two roundings of
    // weights.
    const float margin = __builtin_fabsf(threshold) * 0x1p-18f + 0x1p-120f;
    const bool far = __builtin_fabsf(threshold) > 0x1p126f;  // near the clamp of cells: every segment is interpolated
    plan.low = far ? -__builtin_inff() : threshold - margin;
    plan.high = far ? __builtin_inff() : threshold + margin;
    plan.segments = (width + segment - 1) / segment;

    const int64_t columns = plan.segments * segment;
    Scratch memory;
    plan.first = memory.take<int32_t>(columns);
    plan.second = memory.take<int32_t>(columns);
    plan.pair = memory.take<int32_t>(columns);
    plan.w0 = memory.take<float>(columns);
    plan.w1 = memory.take<float>(columns);
    for (int64_t x = 0; x < columns; ++x) {
        const Tap tap = tap_of(x < width ? x : width - 1, plan.step_x, w);
        plan.first[x] = static_cast<int32_t>(tap.first);
        plan.second[x] = static_cast<int32_t>(tap.second);
        plan.w0[x] = tap.w0;
        plan.w1[x] = tap.w1;
    }
    plan.used = plan.second[columns - 1] + 1;
    plan.compares = plan.used < 2 * width;
    for (int64_t x = 0; x < columns; ++x)
        plan.pair[x] = plan.first[x] < plan.used - 2 ? plan.first[x] : static_cast<int32_t>(plan.used) - 2;

    // The buffers of the workers. Each buffer is a whole number of cache lines.
    const int64_t padded = round_up(w, 32), bit_words = round_up(padded / 32 + 2, 16), states = round_up(plan.segments, 64);
    float* buffers = memory.take<float>(threads, 2, padded);
    float* wides = memory.take<float>(threads, 2, columns);
    uint32_t* cell_bits = memory.take<uint32_t>(threads, 4, bit_words);
    uint8_t* row_states = memory.take<uint8_t>(threads, 3, states);
    int32_t* run_ends = memory.take<int32_t>(threads, round_up(plan.segments, 16));

    // Bands of rows begin at whole words: 64 rows of any width are a multiple of 32 pixels.
    const int64_t band = masks >= 64 ? round_up(height, 64) : 64, bands = (height + band - 1) / band;
    const int64_t n = words_for(height * width), rows = band < height ? band : height;
    parallel_for(masks * bands, 1 + (1 << 16) / (rows * width), threads, [&](int64_t begin, int64_t end, int index) {
        Worker worker;
        for (int64_t i = 0; i < 2; ++i) {
            Row& row = worker.rows[i];
            row.buffer = buffers + (2 * index + i) * padded;
            row.wide = wides + (2 * index + i) * columns;
            row.below_cells = cell_bits + (4 * index + 2 * i) * bit_words;
            row.above_cells = row.below_cells + bit_words;
            row.state = row_states + (3 * index + i) * states;
        }
        worker.run_state = row_states + (3 * index + 2) * states;
        worker.run_end = run_ends + index * round_up(plan.segments, 16);
        for (int64_t job = begin; job < end; ++job) {
            const int64_t mask = job / bands, top = job % bands * band, bottom = top + band < height ? top + band : height;
            worker.resize(plan, source_of(mask), top, bottom, words.as<uint32_t>() + mask * n + top * width / 32);
        }
    });
}

}  // namespace

void resize_masks(const View& soft, int64_t height, int64_t width, float threshold, double extent_height, double extent_width,
                  const View& words, int threads) {
    SPROMPT_FLOAT_TYPES(
        soft.dtype, T,
        resize_all(
            soft.size[0], soft.size[1], soft.size[2], height, width, threshold, extent_height, extent_width, words, threads,
            [&](int64_t mask) { return Dense<T>{soft.as<const T>() + mask * soft.stride[0], soft.stride[1], soft.stride[2]}; }))
}

void resize_bits(const View& in, int64_t h, int64_t w, int64_t height, int64_t width, const View& words, int threads) {
    resize_all(in.size[0], h, w, height, width, 0.5f, static_cast<double>(h), static_cast<double>(w), words, threads,
               [&](int64_t mask) { return Bits{in.as<const uint32_t>() + mask * in.stride[0], in.size[1], w}; });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
