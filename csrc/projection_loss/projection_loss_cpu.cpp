#include "projection_loss/projection_loss.h"

#include "common/lanes.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {

constexpr int32_t least = -0x7fffffff - 1, most = 0x7fffffff;

// An integer that orders floats: -0 as 0, NaN as the largest. No float has the key `least`.
SPROMPT_INLINE vi key_of(vf x) {
    const vi bits = bits_to_int(x + 0.0f);
    return select_int(x == x, bits ^ ((bits >> 31) & most), broadcast(most));
}
// The largest key is that of NaN.
SPROMPT_INLINE float value_of(int32_t key) {
    const int32_t bits = key < 0 ? key ^ most : key;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// The largest key of every row and column of a map (h, w), and the lowest place that has it. Arrays over columns have room for
// whole vectors.
struct Maxima {
    int32_t *of_rows, *of_columns, *columns, *rows;  // (h), (w), and the column (h) and the row (w) of each

    SPROMPT_INLINE static int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
    SPROMPT_INLINE static int64_t size(int64_t h, int64_t w) { return 2 * (padded(h) + padded(w)); }
    SPROMPT_INLINE Maxima(int32_t* memory, int64_t h, int64_t w)
        : of_rows(memory), of_columns(of_rows + padded(h)), columns(of_columns + padded(w)), rows(columns + padded(h)) {}
};

// Without PLACES only the keys are written.
template <bool PLACES, class T>
void find_maxima(const T* map, int64_t stride, int64_t h, int64_t w, const Maxima& out) {
    for (int64_t x = 0; x < Maxima::padded(w); ++x) {
        out.of_columns[x] = least;
        if (PLACES) out.rows[x] = 0;
    }
    for (int64_t y = 0; y < h; ++y) {
        const T* row = map + y * stride;
        const vi here = broadcast(static_cast<int32_t>(y));
        vi best = broadcast(least), place{}, column = lanes();
        for (int64_t x = 0; x < w; x += W) {
            const vi key = w - x >= W ? key_of(load_as_float(row + x))
                                      : select_int(first_lanes(w - x), key_of(load_some(row + x, w - x)), broadcast(least));
            const vi in_row = key > best, known = load(out.of_columns + x), in_column = key > known;
            best = select_int(in_row, key, best);
            store(out.of_columns + x, select_int(in_column, key, known));
            if (!PLACES) continue;
            place = select_int(in_row, column, place);
            store(out.rows + x, select_int(in_column, here, load(out.rows + x)));
            if (w - x > W) column += W;
        }
        int32_t key = best[0], at = place[0];
        for (int i = 1; i < W; ++i)
            if (best[i] > key || (best[i] == key && place[i] < at)) {
                key = best[i];
                at = place[i];
            }
        out.of_rows[y] = key;
        if (PLACES) out.columns[y] = at;
    }
}

// Returns the dice of n maxima with those of the box. Writes its slopes.
double dice(const int32_t* of_mask, const int32_t* of_box, int64_t n, float* slopes) {
    double product = 0.0, total = 0.002;
    for (int64_t i = 0; i < n; ++i) {
        const double m = value_of(of_mask[i]), t = value_of(of_box[i]);
        product += m * t;
        total += m * m + t * t;
    }
    const double at_mask = 4.0 * product / (total * total), at_box = 2.0 / total;
    for (int64_t i = 0; i < n; ++i)
        slopes[i] = static_cast<float>(at_mask * value_of(of_mask[i]) - at_box * value_of(of_box[i]));
    return 1.0 - 2.0 * product / total;
}

}  // namespace

void projection_loss(const View& masks, const View& boxes, const View& loss, const View& slopes, const View& places,
                     int threads) {
    const int64_t B = masks.size[0], h = masks.size[1], w = masks.size[2], size = Maxima::size(h, w);
    Scratch memory;
    int32_t* keys = memory.take<int32_t>(threads, 2, size);
    parallel_for(B, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        const Maxima mask(keys + 2 * worker * size, h, w), box(keys + (2 * worker + 1) * size, h, w);
        for (int64_t b = begin; b < end; ++b) {
            float* slope = slopes.as<float>() + b * (h + w);
            int32_t* place = places.as<int32_t>() + b * (h + w);
            if (h == 0 || w == 0) {
                loss.as<float>()[b] = 2.0f;
                for (int64_t i = 0; i < h + w; ++i) {
                    slope[i] = 0.0f;
                    place[i] = 0;
                }
                continue;
            }
            SPROMPT_FLOAT_TYPES(masks.dtype, T,
                                find_maxima<true>(masks.as<const T>() + b * masks.stride[0], masks.stride[1], h, w, mask))
            SPROMPT_FLOAT_TYPES(boxes.dtype, T,
                                find_maxima<false>(boxes.as<const T>() + b * boxes.stride[0], boxes.stride[1], h, w, box))
            loss.as<float>()[b] = static_cast<float>(dice(mask.of_rows, box.of_rows, h, slope) +
                                                     dice(mask.of_columns, box.of_columns, w, slope + h));
            __builtin_memcpy(place, mask.columns, 4 * h);
            __builtin_memcpy(place + h, mask.rows, 4 * w);
        }
    });
}

void projection_loss_backward(const View& grad, const View& slopes, const View& places, const View& out, int threads) {
    const int64_t B = out.size[0], h = out.size[1], w = out.size[2];
    if (h == 0 || w == 0) return;
    parallel_for(B, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
            const float g = grad.as<const float>()[b * grad.stride[0]];
            const float* slope = slopes.as<const float>() + b * (h + w);
            const int32_t *columns = places.as<const int32_t>() + b * (h + w), *rows = columns + h;
            SPROMPT_FLOAT_TYPES(out.dtype, T, {
                T* map = out.as<T>() + b * h * w;
                __builtin_memset(static_cast<void*>(map), 0, sizeof(T) * h * w);
                for (int64_t y = 0; y < h; ++y) {
                    const int32_t x = columns[y];
                    from_float(g * (rows[x] == y ? slope[y] + slope[h + x] : slope[y]), map + y * w + x);
                }
                for (int64_t x = 0; x < w; ++x) {
                    const int32_t y = rows[x];
                    if (columns[y] != x) from_float(g * slope[h + x], map + y * w + x);
                }
            })
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
