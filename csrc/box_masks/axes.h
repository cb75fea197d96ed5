// One axis of a box, as box_masks.h defines it: the samples of a crop, and the cells under the pixels of a paste.
#pragma once

#include "common/isa.h"
#include "common/views.h"

#if defined(__CUDACC__)
#define SPROMPT_AXIS __host__ __device__ __forceinline__
#else
#define SPROMPT_AXIS SPROMPT_INLINE
#endif

namespace sprompt {

// Boxes (M, 4) f32 or f64, contiguous.
struct Boxes {
    const void* data;
    bool wide;

    SPROMPT_INLINE explicit Boxes(const View& view) : data(view.data), wide(view.dtype == DType::f64) {}
    // Coordinate i: x1, y1, x2, y2.
    SPROMPT_AXIS double operator()(int64_t box, int i) const {
        return wide ? static_cast<const double*>(data)[4 * box + i]
                    : static_cast<double>(static_cast<const float*>(data)[4 * box + i]);
    }
};

// ---- crops

SPROMPT_AXIS bool is_cropped(double low, double high) {
    const double far = 0x1p24;
    return low < high && low >= -far && low <= far && high >= -far && high <= far;
}

// Pixels [begin, end).
struct Span {
    int64_t begin, end;
};

// A sample adds `lower` to the weight of its pixel and `upper` to that of the next pixel. The sum of both is Samples::unit.
struct Share {
    int64_t pixel;
    double lower, upper;
};

// The samples of an axis of a box that is cropped.
struct Samples {
    double start, step;
    double unit;      // a power of 2, at least 2: the weight of a sample
    int32_t size, g;  // size * g is below 2^26
    int32_t pixels;   // at least 1; no sample lies beyond 2^25

    SPROMPT_AXIS Samples(double low, double high, int32_t size, int64_t of_mask)
        : start(low - 0.5),
          step(0.0),
          unit(0x1p26),
          size(size),
          g(1),
          pixels(static_cast<int32_t>(of_mask < (1 << 25) ? of_mask : 1 << 25)) {
        const double extent = high - low, part = extent / static_cast<double>(size);
        if (part > 1.0) {
            g = static_cast<int32_t>(part);
            if (static_cast<double>(g) < part) ++g;
        }
        step = extent / static_cast<double>(size * g);
        while (whole() > 0x1p26) unit *= 0.5;
    }

    // The weight of all samples of a part.
    SPROMPT_AXIS double whole() const { return unit * static_cast<double>(g); }
    SPROMPT_AXIS double place(int32_t j) const { return start + (static_cast<double>(j) + 0.5) * step; }
    SPROMPT_AXIS bool has_weight(double place) const { return place >= -1.0 && place <= static_cast<double>(pixels); }
    SPROMPT_AXIS Share share(double place) const {
        const double last = static_cast<double>(pixels - 1);
        double s = place > 0.0 ? place : 0.0;
        s = s < last ? s : last;
        const int32_t k = static_cast<int32_t>(s);
        const double upper = static_cast<double>(static_cast<int32_t>((s - static_cast<double>(k)) * unit + 0.5));
        return {k, unit - upper, upper};
    }

    // A sample of [0, size * g] that is at most `pixel` - 1, or the first, up to rounding. A step of 0 gives NaN or infinity.
    SPROMPT_AXIS int32_t near(int64_t pixel) const {
        const double j = (static_cast<double>(pixel - 1) - start) / step - 1.5, all = static_cast<double>(size * g);
        return j > 0.0 ? static_cast<int32_t>(j < all ? j : all) : 0;
    }
    // The pixels that get weight in a part, and perhaps some beside them.
    SPROMPT_AXIS Span span(int32_t part) const {
        const double first = place(part * g), last = place(part * g + g - 1);
        if (last < -1.0 || first > static_cast<double>(pixels)) return {0, 0};
        const int32_t begin = first > 0.0 ? static_cast<int32_t>(first) : 0,
                      end = last > 0.0 ? static_cast<int32_t>(last) + 2 : 2;
        return {begin < pixels ? begin : pixels - 1, end < pixels ? end : pixels};
    }
};

// ---- pastes

// The cells under a pixel and their weights.
struct Cells {
    int64_t first, second;
    float w0, w1;
};

struct Paste {
    double low, scale;
    int64_t cells;

    // Without an extent the axis has -1 cells, so that no place is inside.
    SPROMPT_AXIS Paste(double low, double high, int64_t of_map) : low(low), scale(0.0), cells(-1) {
        const double extent = high - low;
        if (extent > 0.0 && extent <= 0x1.fffffffffffffp1023) {
            scale = static_cast<double>(of_map) / extent;
            cells = of_map;
        }
    }

    SPROMPT_AXIS double place(int64_t x) const { return ((static_cast<double>(x) + 0.5) - low) * scale - 0.5; }
    SPROMPT_AXIS bool inside(double place) const { return place > -1.0 && place < static_cast<double>(cells); }
    // The two cells around a place that is inside, and their weights.
    SPROMPT_AXIS Cells at(double place) const {
        const int64_t k = place < 0.0 ? -1 : static_cast<int64_t>(place);
        const float w1 = static_cast<float>(place - static_cast<double>(k)), w0 = 1.0f - w1;
        Cells c{k, k + 1, k < 0 ? 0.0f : w0, k + 1 < cells ? w1 : 0.0f};
        if (!(c.w0 > 0.0f)) c.first = k + 1;
        if (!(c.w1 > 0.0f)) c.second = c.first;
        if (c.first >= cells) c.first = c.second = cells - 1;  // both weights are 0
        return c;
    }
};

}  // namespace sprompt
