#include "common/least.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "points/points.h"
#include "points/sampling.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {

SPROMPT_INLINE int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Keys increase with |z|; NaN has the smallest. They use 31 bits.
SPROMPT_INLINE vi key_of(vf z) {
    const vi bits = bits_to_int(absolute(z));
    return (bits + 1) & (z == z);
}

// ---- The points of the loss.

// f(lanes, x, y) for the chosen points and the points that are added, W at a time. Lanes behind the last point repeat it.
template <class F>
SPROMPT_INLINE void for_each_final(const Points& points, const int32_t* chosen, int64_t kept, int64_t number, int64_t drawn,
                                   const F& f) {
    vf x, y;
    for (int64_t i = 0; i < kept; i += W) {
        int32_t index[W];
        for (int64_t l = 0; l < W; ++l) index[l] = chosen[i + l < kept ? i + l : kept - 1];
        points.at(load(index), x, y);
        f(kept - i, x, y);
    }
    const vi end = broadcast(static_cast<int32_t>(drawn + number - kept - 1));
    for (int64_t i = 0; i < number - kept; i += W) {
        const vi index = static_cast<int32_t>(drawn + i) + lanes();
        points.at(select_int(index < end, index, end), x, y);
        f(number - kept - i, x, y);
    }
}

SPROMPT_INLINE Bits target_of(const View& words, int64_t m, int64_t height, int64_t width) {
    return {words.as<const char>() + 4 * m * words.stride[0], height, width};
}

template <class T>
SPROMPT_INLINE Map map_of(const View& logits, int64_t m, float* cells) {
    return whole_map(logits.as<const T>() + m * logits.stride[0], logits.stride[1], logits.size[1], logits.size[2], cells);
}

}  // namespace

void point_loss(const View& logits, const View& words, int64_t height, int64_t width, const View& seed, const View& points,
                int64_t number, int64_t drawn, const View& bce, const View& dice, const View& chosen, const View& sums,
                int threads) {
    const int64_t M = logits.size[0], kept = chosen.size[1];
    const int64_t cells = bordered(logits.size[1] + 2, logits.size[2]), slots = padded(drawn + 2 * W);
    Scratch memory;
    float* maps = memory.take<float>(threads, cells);
    int32_t* buffers = memory.take<int32_t>(threads, 2 * slots + least_counts);  // keys, keys that share digits, counts
    parallel_for(M, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        int32_t *keys = buffers + worker * (2 * slots + least_counts), *rest = keys + slots, *counts = rest + slots;
        for (int64_t m = begin; m < end; ++m) {
            Map map{};
            SPROMPT_FLOAT_TYPES(logits.dtype, T, map = map_of<T>(logits, m, maps + worker * cells))
            const Points source(points, seed, m);
            int32_t* selected = chosen.as<int32_t>() + m * kept;
            vf x, y;
            if (kept > 0) {
                const vi last = broadcast(static_cast<int32_t>(drawn - 1));
                for (int64_t i = 0; i < drawn; i += W) {
                    const vi index = static_cast<int32_t>(i) + lanes();
                    source.at(select_int(index < last, index, last), x, y);
                    store(keys + i, key_of(map.at(map.taps(x, y))));
                }
                choose_least(keys, drawn, kept, rest, counts, rest);
                for (int64_t i = 0; i < kept; ++i) selected[i] = rest[i];
            }
            const Bits target = target_of(words, m, height, width);
            double total[4] = {};  // softplus(z) - z t, p t, p, t
            vf part[4] = {};
            int steps = 0;
            const auto flush = [&]() {
                for (int i = 0; i < 4; ++i) {
                    total[i] += static_cast<double>(sum(part[i]));
                    part[i] = vf{};
                }
                steps = 0;
            };
            for_each_final(source, selected, kept, number, drawn,
                           [&](int64_t count, vf px, vf py) __attribute__((always_inline)) {
                               const vf z = map.at(map.taps(px, py)), t = target.at(px, py);
                               const Logistic logistic(z);
                               const vi real = first_lanes(count);
                               const vf zero = {};
                               part[0] += select(real, fma(-z, t, logistic.softplus), zero);
                               part[1] += select(real, logistic.p * t, zero);
                               part[2] += select(real, logistic.p, zero);
                               part[3] += select(real, t, zero);
                               if (++steps == 64) flush();
                           });
            flush();
            const double both = total[2] + total[3], above = 2.0 * total[1] + 1.0;
            bce.as<float>()[m] = static_cast<float>(total[0] / static_cast<double>(number > 0 ? number : 1));
            dice.as<float>()[m] = static_cast<float>(1.0 - above / (both + 1.0));
            sums.as<float>()[2 * m] = static_cast<float>(total[1]);
            sums.as<float>()[2 * m + 1] = static_cast<float>(both);
        }
    });
}

void point_loss_backward(const View& grad_bce, const View& grad_dice, const View& logits, const View& words, int64_t height,
                         int64_t width, const View& seed, const View& points, const View& chosen, const View& sums,
                         int64_t number, int64_t drawn, const View& grad, int threads) {
    const int64_t M = logits.size[0], h = logits.size[1], w = logits.size[2], kept = chosen.size[1];
    const int64_t cells = bordered(h + 2, w);
    Scratch memory;
    float* maps = memory.take<float>(threads, 2, cells);
    parallel_for(M, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t m = begin; m < end; ++m) {
            const float to_bce = grad_bce.as<const float>()[m * grad_bce.stride[0]];
            const float to_dice = grad_dice.as<const float>()[m * grad_dice.stride[0]];
            const Map slopes{maps + (2 * worker + 1) * cells, h, w};
            if (to_bce - to_bce != 0.0f || to_dice - to_dice != 0.0f) {  // NaN or infinite
                for (int64_t i = 0; i < cells; ++i) slopes.cells[i] = __builtin_nanf("");
            } else {
                Map map{};
                SPROMPT_FLOAT_TYPES(logits.dtype, T, map = map_of<T>(logits, m, maps + 2 * worker * cells))
                slopes.clear_cells();
                const Points source(points, seed, m);
                const Bits target = target_of(words, m, height, width);
                // bce (p - t) + p (1 - p) (same - toward t)
                const float* known = sums.as<const float>() + m * sums.stride[0];
                const double below = static_cast<double>(known[1]) + 1.0, above = 2.0 * known[0] + 1.0;
                const vf bce = broadcast(to_bce / static_cast<float>(number > 0 ? number : 1));
                const vf same = broadcast(static_cast<float>(to_dice * above / (below * below)));
                const vf toward = broadcast(static_cast<float>(2.0 * to_dice / below));
                const int32_t* selected = chosen.as<const int32_t>() + m * chosen.stride[0];
                for_each_final(source, selected, kept, number, drawn,
                               [&](int64_t count, vf x, vf y) __attribute__((always_inline)) {
                                   const Taps taps = map.taps(x, y);
                                   const vf t = target.at(x, y), zero = {};
                                   const Logistic logistic(map.at(taps));
                                   const vf slope = fma(bce, logistic.p - t, logistic.p * logistic.rest * (same - toward * t));
                                   slopes.add(taps, select(first_lanes(count), slope, zero));
                               });
            }
            SPROMPT_FLOAT_TYPES(grad.dtype, T, slopes.write(grad.as<T>() + m * h * w))
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
