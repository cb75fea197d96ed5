// The cells that a pixel is a sum of, along one axis, and their weights. resize_masks.h defines both.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace sprompt {
namespace SPROMPT_ISA {

constexpr int most_taps = 4;

// count: taps that matter, at least 2. The taps behind them repeat the last cell with a weight of 0. Cells increase.
struct Taps {
    int64_t cell[most_taps];
    float weight[most_taps];
    int count;
};

SPROMPT_INLINE bool same_cells(const Taps& a, const Taps& b) {
    int64_t off = a.count ^ b.count;
    for (int i = 0; i < most_taps; ++i) off |= a.cell[i] ^ b.cell[i];
    return off == 0;
}

// The lower cell of a coordinate, and the weight of the next cell.
struct Place {
    int64_t cell;
    double fraction;
};
SPROMPT_INLINE Place place_of(int64_t x, double step, int64_t cells) {
    double s = (static_cast<double>(x) + 0.5) * step - 0.5;
    s = s > 0.0 ? s : 0.0;
    const double last = static_cast<double>(cells - 1);
    s = s < last ? s : last;
    const int64_t k = static_cast<int64_t>(s);
    return {k, s - static_cast<double>(k)};
}

// An axis of `cells` cells that becomes `size` pixels. One map: the first `extent` cells do. Two maps: all cells become `via`
// cells, and the first `extent` of these become the pixels.
struct Axis {
    int64_t cells, size, via;  // via 0: one map
    double extent, step, step_via;

    SPROMPT_INLINE Axis(int64_t cells, int64_t size, double extent, int64_t via)
        : cells(cells),
          size(size),
          via(via),
          extent(extent),
          step(extent / static_cast<double>(size)),
          step_via(via != 0 ? static_cast<double>(cells) / static_cast<double>(via) : 0.0) {}

    SPROMPT_INLINE Taps operator()(int64_t x) const { return via == 0 ? one_map(x) : two_maps(x); }

  private:
    SPROMPT_INLINE Taps one_map(int64_t x) const {
        const Place place = place_of(x, step, cells);
        const float w1 = static_cast<float>(place.fraction), w0 = 1.0f - w1;
        const int64_t k = place.cell, first = w0 > 0.0f ? k : k + 1, second = w1 > 0.0f ? k + 1 : k;
        return {{first, second, second, second}, {w0, w1, 0.0f, 0.0f}, 2};
    }
    SPROMPT_INLINE Taps two_maps(int64_t x) const {
        const Place place = place_of(x, step, static_cast<int64_t>(extent));
        int64_t cell[most_taps];
        double weight[most_taps];
        for (int i = 0; i < 2; ++i) {
            const Place inner = place_of(place.cell + i, step_via, cells);
            const double outer = i == 0 ? 1.0 - place.fraction : place.fraction;
            cell[2 * i] = inner.cell;
            cell[2 * i + 1] = inner.cell + 1;
            weight[2 * i] = outer * (1.0 - inner.fraction);
            weight[2 * i + 1] = outer * inner.fraction;
        }
        for (int j = 2; j < most_taps; ++j)
            for (int i = 0; i < 2; ++i)
                if (cell[j] == cell[i]) {
                    weight[i] += weight[j];
                    weight[j] = 0.0;
                }
        Taps taps;
        taps.count = 0;
        for (int i = 0; i < most_taps; ++i)
            if (weight[i] > 0.0) {
                taps.cell[taps.count] = cell[i];
                taps.weight[taps.count++] = static_cast<float>(weight[i]);
            }
        for (int i = taps.count; i < most_taps; ++i) {
            taps.cell[i] = taps.cell[taps.count - 1];
            taps.weight[i] = 0.0f;
        }
        if (taps.count < 2) taps.count = 2;
        return taps;
    }
};

}  // namespace SPROMPT_ISA
}  // namespace sprompt
