#include "common/vmath.h"
#include "mask_nms/masks_by_score.h"

namespace sprompt {
namespace SPROMPT_ISA {

namespace {
// ---- Matrix. c and decay are maxima and minima, so pairs may come in any order. A pair need not be counted if its IoU can
// change neither c nor decay of its column.
template <bool gaussian>
struct Matrix {
    const Image& im;
    const Binning& cut;
    const int64_t* labels;
    int64_t label_stride;

    // Called once c[i] is known. Sets limit[i], which pairs with mask i need. gaussian: c^2; linear: 1 / max(1 - c, 1e-6).
    SPROMPT_INLINE void close(int64_t i) const {
        const double c = im.c[i], f = 1 - c > 1e-6 ? 1 - c : 1e-6;
        im.limit[i] = static_cast<float>(gaussian ? c * c : 1 / f);
    }

    // Takes pairs (i, j) for i in [first, last). These masks i must be closed. decay holds max(iou^2 - c^2) if gaussian, else
    // the decay. Returns the number of counted pairs.
    int64_t column(int64_t j, int64_t first, int64_t last) const {
        if (im.area[j] == 0 || first >= last) return 0;
        int64_t counted = 0;
        const Probe probe(im.profile + j * bins);
        const float scale = static_cast<float>(int64_t{1} << cut.shift) * 1.00001f;  // still an upper bound after rounding
        const vf area = broadcast(im.area_f[j]);
        double c = im.c[j], decay = im.decay[j];
        const int64_t label = labels ? labels[im.order[j] * label_stride] : 0;
        for (int64_t start = first / lanes * lanes; start < last; start += lanes) {
            int16_t units[lanes];
            store(units, probe.common(im.interleaved + start / group * group * bins + start % group));
            uint32_t open = 0;
            for (int half = 0; half < 2; ++half) {
                int16_t part __attribute__((vector_size(2 * W)));
                __builtin_memcpy(&part, units + half * W, sizeof part);
                const vf other = load(im.area_f + start + half * W);
                const vf common =
                    minimum(__builtin_convertvector(__builtin_convertvector(part, vi), vf) * scale, minimum(area, other));
                const vf iou = common / (area + other - common) * 1.00001f;
                const vf limit = load(im.limit + start + half * W);
                uint32_t changes;
                if (gaussian)
                    changes = bits_greater(iou * iou, limit * 0.99999f + broadcast(static_cast<float>(decay) * 0.99999f));
                else
                    changes = bits_greater(broadcast(static_cast<float>(decay) * 1.00001f), (1.0f - iou) * limit) &
                              bits_greater(iou, vf{});
                open |= (changes | bits_greater(iou, broadcast(static_cast<float>(c) * 0.99999f))) << half * W;
            }
            if (start < first) open &= ~uint32_t{0} << (first - start);
            if (start + lanes > last) open &= (uint32_t{1} << (last - start)) - 1;
            for (; open != 0; open &= open - 1) {
                const int64_t i = start + __builtin_ctz(open);
                if (labels && labels[im.order[i] * label_stride] != label) continue;
                ++counted;
                const int64_t both = count_common(im, cut, i, j), either = im.area[i] + im.area[j] - both;
                const double iou = static_cast<double>(both) / static_cast<double>(either);
                if (gaussian) {
                    const double excess = iou * iou - im.c[i] * im.c[i];
                    decay = excess > decay ? excess : decay;
                } else {
                    const double f = 1 - im.c[i] > 1e-6 ? 1 - im.c[i] : 1e-6, ratio = (1 - iou) / f;
                    decay = ratio < decay ? ratio : decay;
                }
                c = iou > c ? iou : c;
            }
        }
        im.c[j] = c;
        im.decay[j] = decay;
        return counted;
    }

    // A block of columns is compared in parallel with the masks before it, then column by column with the masks of the block.
    // The number of pairs that a block counted decides whether run_by_product takes over.
    void run(int threads) const {
        uint32_t* counted = im.keys;  // (N)
        for (int64_t begin = 0, end; begin < im.N; begin = end) {
            const int64_t block = begin == 0 || im.N < 8 * 64 ? 64 : (im.N + 7) / 8;
            end = begin + block < im.N ? begin + block : im.N;
            parallel_for(end - begin, 4, threads_for((end - begin) * begin * (3 + cut.n / 64), threads),
                         [&](int64_t first, int64_t last, int) {
                             for (int64_t j = begin + first; j < begin + last; ++j)
                                 counted[j] = static_cast<uint32_t>(column(j, 0, begin));
                         });
            int64_t all = 0;
            for (int64_t j = begin; j < end; ++j) {
                all += counted[j] + column(j, begin, j);
                close(j);
            }
            if (im.N >= 128 && product_pays(all, (end - begin) * (begin + end) / 2, cut.n)) return run_by_product(end, threads);
        }
    }

    // Columns of a tile, at places [begin, begin + C), with their c and decay so far.
    struct Block {
        double c[BitProduct::columns], decay[BitProduct::columns];
        float area[BitProduct::columns], least_c[BitProduct::columns], least_decay[BitProduct::columns];
        int64_t begin, C;
    };
    // IoU > x is equivalent to |a and b| > x / (1 + x) (|a| + |b|). share(x) is smaller than this factor by more than the
    // float32 rounding error.
    SPROMPT_INLINE static float share(double x) { return static_cast<float>(x / (1 + x) * (1 - 1e-5)); }
    // The IoU that a pair needs to change the decay of its column, for any row.
    SPROMPT_INLINE static double of_decay(double decay) { return gaussian ? __builtin_sqrt(decay) : 1 - decay; }

    SPROMPT_INLINE void open(Block& block, int64_t begin, int64_t C) const {
        block.begin = begin;
        block.C = C;
        for (int64_t j = 0; j < BitProduct::columns; ++j) {
            block.area[j] = j < C ? im.area_f[begin + j] : 0;
            block.c[j] = 0;
            block.decay[j] = gaussian ? 0 : 1;
            block.least_c[j] = block.least_decay[j] = 0;
        }
    }
    // Takes pairs of the mask at place i with columns [from, C), for their c, their decay, or both. For the decay, mask i must
    // be closed.
    template <bool of_c, bool of_d>
    SPROMPT_INLINE void row(Block& block, int64_t i, const uint16_t* counts, int64_t from) const {
        const double ci = im.c[i], f = 1 - ci > 1e-6 ? 1 - ci : 1e-6;
        const vf area = broadcast(im.area_f[i]), least_row = broadcast(share(gaussian ? ci : 1 - f));
        for (int64_t start = from / W * W; start < block.C; start += W) {
            vf least = maximum(load(block.least_decay + start), least_row);
            if (of_c && of_d) least = minimum(least, load(block.least_c + start));
            if (!of_d) least = load(block.least_c + start);
            uint32_t hits = bits_greater(load_counts(counts + start), (load(block.area + start) + area) * least);
            if (start < from) hits &= ~uint32_t{0} << (from - start);
            for (; hits != 0; hits &= hits - 1) {
                const int64_t j = start + __builtin_ctz(hits);
                if (labels && labels[im.order[i] * label_stride] != labels[im.order[block.begin + j] * label_stride]) continue;
                const int64_t both = counts[j], either = im.area[i] + im.area[block.begin + j] - both;
                const double iou = static_cast<double>(both) / static_cast<double>(either);
                if (of_d) {
                    const double value = gaussian ? iou * iou - ci * ci : (1 - iou) / f;
                    if (gaussian ? value > block.decay[j] : value < block.decay[j]) {
                        block.decay[j] = value;
                        block.least_decay[j] = share(of_decay(value));
                    }
                }
                if (of_c && iou > block.c[j]) {
                    block.c[j] = iou;
                    block.least_c[j] = share(iou);
                }
            }
        }
    }

    // Like run, from `start` on, for inputs where run would have to count most pairs. Tiles of the product count all pairs. In
    // parallel, a block is multiplied with the masks before it, in parts, and with itself. Then the results of the parts are
    // combined.
    __attribute__((noinline)) void run_by_product(int64_t start, int threads) const {
        constexpr int64_t columns = BitProduct::columns;
        struct Found {
            double c[columns], decay[columns];
        };
        static_assert(sizeof(Found) <= 16 * 128, "keys, spare_keys and spare hold one Found per 128 masks, and at least one");
        Found* const found = reinterpret_cast<Found*>(im.keys);
        uint16_t within[columns][columns];
        Block block;
        for (int64_t begin = start; begin < im.N; begin += columns) {
            const int64_t C = begin + columns < im.N ? columns : im.N - begin;
            const Parts parts(begin, threads);
            const auto column = [&](int64_t j) { return im.mask(begin + j); };
            parallel_for(
                parts.count + 1, 1, threads_for((begin + C) * C * (1 + cut.n / 16), threads), [&](int64_t job, int64_t, int) {
                    BitProduct product;
                    if (job == parts.count) {
                        product.multiply(C, column, C, column, 0, cut.n);
                        __builtin_memcpy(within, product.counts, C * sizeof within[0]);
                        return;
                    }
                    const int64_t first = job * parts.size, R = begin - first < parts.size ? begin - first : parts.size;
                    product.multiply(R, [&](int64_t i) { return im.mask(first + i); }, C, column, 0, cut.n);
                    Block part;
                    open(part, begin, C);
                    for (int64_t i = 0; i < R; ++i) row<true, true>(part, first + i, product.counts[i], 0);
                    __builtin_memcpy(found[job].c, part.c, sizeof part.c);
                    __builtin_memcpy(found[job].decay, part.decay, sizeof part.decay);
                });
            open(block, begin, C);
            for (int64_t part = 0; part < parts.count; ++part)
                for (int64_t j = 0; j < C; ++j) {
                    const double c = found[part].c[j], decay = found[part].decay[j];
                    block.c[j] = c > block.c[j] ? c : block.c[j];
                    if (gaussian ? decay > block.decay[j] : decay < block.decay[j]) block.decay[j] = decay;
                }
            for (int64_t j = 0; j < C; ++j) {
                block.least_c[j] = share(block.c[j]);
                block.least_decay[j] = share(of_decay(block.decay[j]));
            }
            // The first pass does not know im.c of the block yet. It computes no decay.
            for (int64_t i = 0; i < C; ++i) im.c[begin + i] = 0;
            for (int64_t i = 0; i < C; ++i) row<true, false>(block, begin + i, within[i], i + 1);
            __builtin_memcpy(im.c + begin, block.c, C * sizeof block.c[0]);
            for (int64_t i = 0; i < C; ++i) row<false, true>(block, begin + i, within[i], i + 1);
            __builtin_memcpy(im.decay + begin, block.decay, C * sizeof block.decay[0]);
        }
    }
};
}  // namespace

// e^x for x <= 0: the float32 exponential of x rounded to float32, times (1 + the rounding error).
SPROMPT_INLINE float exp_of(double x) {
    const float high = static_cast<float>(x);
    float lane[W];
    store(lane, exp(broadcast(high)));
    return lane[0] * (1.0f + static_cast<float>(x - static_cast<double>(high)));
}

template <bool gaussian>
static void decay_image(const View& words, const View& scores, const View& labels, const View& counts, double sigma,
                        const View& out, uint8_t* scratch, const Binning& cut, int64_t image, int threads) {
    const Image im(words, counts, scratch, image, 0);
    sort_by_score(scores, image, im);
    describe(im, cut, threads);
    for (int64_t i = 0; i < im.N; ++i) {
        im.area_f[i] = static_cast<float>(im.area[i]);
        im.c[i] = 0;
        im.decay[i] = gaussian ? 0 : 1;
        for (int bin = 0; bin < bins; ++bin)
            im.interleaved[i / group * group * bins + bin * group + i % group] = im.profile[i * bins + bin];
    }
    Matrix<gaussian>{im, cut, labels.given() ? labels.as<const int64_t>() + image * labels.stride[0] : nullptr,
                     labels.stride[1]}
        .run(threads);
    SPROMPT_FLOAT_TYPES(scores.dtype, T, {
        const T* in = scores.as<const T>() + image * scores.stride[0];
        T* row = out.as<T>() + image * out.size[1];
        for (int64_t i = im.N; i < out.size[1]; ++i) from_float(0.0f, row + i);
        for (int64_t i = 0; i < im.N; ++i) {
            const float decay = gaussian ? exp_of(-sigma * im.decay[i]) : static_cast<float>(im.decay[i]);
            from_float(to_float(in[im.order[i] * scores.stride[1]]) * decay, row + im.order[i]);
        }
    })
}

void matrix_nms(const View& words, const View& scores, const View& labels, const View& counts, bool gaussian, double sigma,
                const View& out, int threads) {
    const Binning cut(words.size[2]);
    Scratch memory;
    uint8_t* const scratch = image_scratch(memory, words, 0);
    for_each_image(words.size[0], threads, [&](int64_t image, int workers) {
        if (gaussian)
            decay_image<true>(words, scores, labels, counts, sigma, out, scratch, cut, image, workers);
        else
            decay_image<false>(words, scores, labels, counts, sigma, out, scratch, cut, image, workers);
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
