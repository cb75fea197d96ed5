// Only the pixels under the map are computed. A row of cells is interpolated at the columns of a box once, and serves all rows
// of pixels between it and its neighbours.
#include "box_masks/axes.h"
#include "box_masks/box_masks.h"
#include "common/bits.h"
#include "common/cells.h"
#include "common/product.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {  // without it, member functions would be shared code (common/isa.h)

// The pixels of [begin, end) that lie over the map. Places increase with pixels.
SPROMPT_INLINE Span over_map(const Paste& axis, int64_t begin, int64_t end) {
    const auto first = [&](const auto& holds) {
        int64_t low = begin, high = end;
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (holds(axis.place(middle)))
                high = middle;
            else
                low = middle + 1;
        }
        return low;
    };
    return {first([&](double place) { return place > -1.0; }),
            first([&](double place) { return !(place < static_cast<double>(axis.cells)); })};
}

// One mask: the cells under its columns, and two rows of cells interpolated there.
struct Columns {
    // Entry i holds the two cells and weights of column begin + i. Entries up to a multiple of 32 have weights of 0.
    int32_t *first, *second;  // (width)
    float *w0, *w1;           // (width)
    float* wide[2];           // (width) each: row y of cells at y % 2
    int64_t rows[2];          // their rows, or -1
    float* buffer;            // (s)
    int64_t begin, end;

    SPROMPT_INLINE void start(const Paste& axis, Span pixels) {
        begin = pixels.begin, end = pixels.end;
        rows[0] = rows[1] = -1;
        for (int64_t x = begin; x < end; ++x) {
            const Cells cells = axis.at(axis.place(x));
            const int64_t i = x - begin;
            first[i] = static_cast<int32_t>(cells.first), second[i] = static_cast<int32_t>(cells.second);
            w0[i] = cells.w0, w1[i] = cells.w1;
        }
        for (int64_t i = end - begin; i % 32 != 0; ++i) first[i] = second[i] = 0, w0[i] = w1[i] = 0.0f;
    }

    template <class T>
    SPROMPT_INLINE const float* widened(const Dense<T>& soft, int64_t s, int64_t y) {
        float* const out = wide[y % 2];
        if (rows[y % 2] == y) return out;
        rows[y % 2] = y;
        const float* const cells = soft.row(y, s, buffer);
        for (int64_t i = 0; i < end - begin; i += W)
            store(out + i, held(gather(cells, first + i)) * load(w0 + i) + held(gather(cells, second + i)) * load(w1 + i));
        return out;
    }
};

// Writes the pixels of a row that lie over the map. The words from the row's first pixel on are 0.
SPROMPT_INLINE void write_row(const Columns& columns, const float* upper, const float* lower, float w0, float w1,
                              float threshold, int64_t first_pixel, uint32_t* words) {
    const vf weight0 = broadcast(w0), weight1 = broadcast(w1), level = broadcast(threshold);
    BitWriter writer(words + first_pixel / 32);
    writer.count = static_cast<int>(first_pixel % 32);
    writer.pending = *writer.out;
    const int64_t count = columns.end - columns.begin;
    for (int64_t i = 0; i < count; i += 32) {
        uint32_t bits = 0;
        for (int k = 0; k < 32; k += W)
            bits |= bits_greater(load(upper + i + k) * weight0 + load(lower + i + k) * weight1, level) << k;
        const int64_t left = count - i < 32 ? count - i : 32;
        writer.put(bits & static_cast<uint32_t>(low_bits(left)), static_cast<int>(left));
    }
    writer.close();
}

}  // namespace

void paste_masks(const View& soft, const View& boxes, int64_t height, int64_t width, float threshold, const View& words,
                 int threads) {
    const int64_t masks = words.size[0], n = words.size[1], s = soft.size[1];
    if (masks == 0 || n == 0) return;
    Scratch memory;
    Columns* const all = memory.take<Columns>(threads);
    const int64_t padded = round_up(width, 32);
    for (int i = 0; i < threads; ++i) {
        all[i].first = memory.take<int32_t>(padded), all[i].second = memory.take<int32_t>(padded);
        all[i].w0 = memory.take<float>(padded), all[i].w1 = memory.take<float>(padded);
        for (float*& wide : all[i].wide) wide = memory.take<float>(padded);
        all[i].buffer = memory.take<float>(s);
    }
    const Boxes box(boxes);
    // Bands of rows begin at whole words: 64 rows of any width are a multiple of 32 pixels.
    const int64_t band = masks >= 64 ? round_up(height, 64) : 64, bands = (height + band - 1) / band;
    parallel_for(masks * bands, 1, threads, [&](int64_t job, int64_t, int worker) {
        const int64_t mask = job / bands, top = job % bands * band, bottom = top + band < height ? top + band : height;
        uint32_t* const out = words.as<uint32_t>() + mask * n;
        const int64_t first = top * width / 32, last = bottom < height ? bottom * width / 32 : n;
        __builtin_memset(out + first, 0, static_cast<size_t>(last - first) * sizeof(uint32_t));
        const Paste across(box(mask, 0), box(mask, 2), s), down(box(mask, 1), box(mask, 3), s);
        const Span x = over_map(across, 0, width), y = over_map(down, top, bottom);
        if (x.begin >= x.end || y.begin >= y.end) return;
        Columns& columns = all[worker];
        columns.start(across, x);
        SPROMPT_FLOAT_TYPES(soft.dtype, T, {
            const Dense<T> map{soft.as<const T>() + mask * soft.stride[0], soft.stride[1], soft.stride[2]};
            for (int64_t row = y.begin; row < y.end; ++row) {
                const Cells cells = down.at(down.place(row));
                const float *const upper = columns.widened(map, s, cells.first), *const lower =
                                                                                     columns.widened(map, s, cells.second);
                write_row(columns, upper, lower, cells.w0, cells.w1, threshold, row * width + x.begin, out);
            }
        });
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
