#include "mask_nms/mask_nms.h"

#include "common/bits.h"
#include "common/half.h"
#include "common/threads.h"
#include "common/vmath.h"

namespace sprompt {
namespace SPROMPT_ISA {

// ---- What a bound needs: a profile of each mask. Its words are cut into at most 16 bins; the profile holds the set pixels
// of each bin in units of 2^shift pixels, rounded up, so that sum(min(profile_a, profile_b)) units is at least |a and b|.
// The shift keeps a whole mask within 2^14 units: sums and comparisons fit 16-bit lanes.
constexpr int bins = 16;
constexpr int group = 32;  // masks whose profiles lie interleaved, [bin][mask]
constexpr int lanes = 2 * W;
typedef int16_t vs __attribute__((vector_size(2 * lanes)));

SPROMPT_INLINE vs load(const int16_t* p) {
    vs v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
SPROMPT_INLINE void store(int16_t* p, vs v) { __builtin_memcpy(p, &v, sizeof v); }
// Wraps: lanes that are not in use hold anything.
SPROMPT_INLINE vs add(vs a, vs b) {
    typedef uint16_t vu __attribute__((vector_size(sizeof(vs))));
    return (vs)((vu)a + (vu)b);
}
SPROMPT_INLINE vs minimum(vs a, vs b) { return a < b ? a : b; }
SPROMPT_INLINE vs maximum(vs a, vs b) { return a > b ? a : b; }
// Bit i is set where lane i of a is at least lane i of b.
SPROMPT_INLINE uint32_t bits_at_least(vs a, vs b) {
#if defined(__AVX512F__)
    return _mm512_cmp_epi16_mask((__m512i)a, (__m512i)b, _MM_CMPINT_NLT);
#elif defined(__AVX2__)
    const __m256i less = (__m256i)(vs)(a < b);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(less), _mm256_extracti128_si256(less, 1));
    return ~static_cast<uint32_t>(_mm_movemask_epi8(bytes)) & 0xffffu;
#elif SPROMPT_X86
    const __m128i less = (__m128i)(vs)(a < b);
    return ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(less, less))) & 0xffu;
#else
    uint32_t bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= static_cast<uint32_t>(a[i] >= b[i]) << i;
    return bits;
#endif
}

struct Binning {
    int64_t n, width;  // words of a mask, of a bin
    int count, shift;

    SPROMPT_INLINE explicit Binning(int64_t words) : n(words) {
        width = (n + bins - 1) / bins;
        width += width & 1;                              // pairs of words
        if (width > 32) width = (width + 63) / 64 * 64;  // what count_and takes at a time
        if (width == 0) width = 2;
        count = static_cast<int>((n + width - 1) / width);
        shift = 0;
        while ((32 * n >> shift) + bins >= 1 << 14) ++shift;
    }
    SPROMPT_INLINE int64_t end(int bin) const { return (bin + 1) * width < n ? (bin + 1) * width : n; }
};

// |a and b| over bins [first, last), first < last.
SPROMPT_INLINE int64_t count_bins(const uint32_t* a, const uint32_t* b, const Binning& cut, int first, int last) {
    const int64_t start = first * cut.width;
    return count_and(a + start, b + start, cut.end(last - 1) - start);
}

// ---- Scratch and inputs of one image.
struct Image {
    const uint32_t* words;
    int64_t stride;               // words between masks
    int64_t N;                    // real masks
    int64_t* order;               // (N) indices by decreasing score
    int64_t* spare;               // (N)
    int64_t* area;                // (N), by place in the order, as all that follows
    int16_t* profile;             // (N, bins)
    int16_t* interleaved;         // (groups, bins, group)
    int16_t* need;                // (groups * group)
    int32_t* span;                // (N, 2) bins between which all set pixels lie: first, end
    double *c, *decay;            // (N)
    float *area_f, *limit;        // (groups * group)
    uint32_t *keys, *spare_keys;  // (N); `state` of the greedy kernel

    // 130 bytes a mask and some for alignment: within nms_scratch_per_mask * (masks + 32).
    SPROMPT_INLINE Image(const View& all, const View& counts, const View& scratch, int64_t image) {
        const int64_t masks = all.size[1], padded = (masks + group - 1) / group * group;
        words = all.as<const uint32_t>() + image * all.stride[0];
        stride = all.stride[1];
        N = counts.given() ? counts.as<const int64_t>()[image * counts.stride[0]] : masks;
        uint8_t* next = scratch.as<uint8_t>() + image * (masks + group) * nms_scratch_per_mask;
        next += -reinterpret_cast<uintptr_t>(next) & 63;
        const auto take = [&](int64_t bytes) {
            uint8_t* p = next;
            next += bytes * padded;
            return static_cast<void*>(p);
        };
        interleaved = static_cast<int16_t*>(take(2 * bins));
        profile = static_cast<int16_t*>(take(2 * bins));
        need = static_cast<int16_t*>(take(2));
        span = static_cast<int32_t*>(take(8));
        area_f = static_cast<float*>(take(4));
        limit = static_cast<float*>(take(4));
        keys = static_cast<uint32_t*>(take(4));
        spare_keys = static_cast<uint32_t*>(take(4));
        order = static_cast<int64_t*>(take(8));
        spare = static_cast<int64_t*>(take(8));
        area = static_cast<int64_t*>(take(8));
        c = static_cast<double*>(take(8));
        decay = static_cast<double*>(take(8));
    }
    SPROMPT_INLINE const uint32_t* mask(int64_t place) const { return words + order[place] * stride; }
};

// Larger keys for smaller scores; NaN as -inf, -0 as 0.
SPROMPT_INLINE uint32_t key_of(float score) {
    if (score != score) score = -__builtin_inff();
    score += 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &score, 4);
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

// order <- indices by decreasing score, equal ones by lower index: a stable radix sort, a byte at a time.
template <class T>
static void sort_scores(const T* scores, int64_t stride, const Image& im) {
    uint32_t *keys = im.keys, *other_keys = im.spare_keys;
    int64_t *order = im.order, *other = im.spare;
    int64_t start[4][256] = {};
    for (int64_t i = 0; i < im.N; ++i) {
        keys[i] = key_of(to_float(scores[i * stride]));
        order[i] = i;
        for (int byte = 0; byte < 4; ++byte) ++start[byte][keys[i] >> 8 * byte & 255];
    }
    for (int byte = 0; byte < 4; ++byte) {
        int64_t before = 0;
        for (int64_t& s : start[byte]) {
            const int64_t here = s;
            s = before;
            before += here;
        }
        for (int64_t i = 0; i < im.N; ++i) {
            const int64_t to = start[byte][keys[i] >> 8 * byte & 255]++;
            other_keys[to] = keys[i];
            other[to] = order[i];
        }
        uint32_t* k = keys;
        keys = other_keys, other_keys = k;
        int64_t* o = order;
        order = other, other = o;
    }
}
static void sort_by_score(const View& scores, int64_t image, const Image& im){
    SPROMPT_FLOAT_TYPES(scores.dtype, T, sort_scores<T>(scores.as<const T>() + image * scores.stride[0], scores.stride[1], im))}

// Threads for work of about so many nanoseconds: waking the others costs some microseconds.
SPROMPT_INLINE int threads_for(int64_t nanoseconds, int threads) {
    return nanoseconds > 40000 ? threads : 1;
}

// Profile and area of every mask, by place.
static void describe(const Image& im, const Binning& cut, int threads) {
    const int64_t unit = (int64_t{1} << cut.shift) - 1;
    const int64_t cost = 80 + cut.n / 8;  // about nanoseconds a mask
    parallel_for(im.N, 1 + 50000 / cost, threads_for(im.N * cost, threads), [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
            const uint32_t* mask = im.mask(i);
            int16_t* profile = im.profile + i * bins;
            int64_t area = 0;
            int32_t first_bin = bins, end_bin = 0;
            for (int bin = 0; bin < bins; ++bin) {
                const int64_t set = bin < cut.count ? count_bins(mask, mask, cut, bin, bin + 1) : 0;
                profile[bin] = static_cast<int16_t>((set + unit) >> cut.shift);
                area += set;
                if (set == 0) continue;
                if (end_bin == 0) first_bin = bin;
                end_bin = bin + 1;
            }
            im.area[i] = area;
            im.span[2 * i] = first_bin;
            im.span[2 * i + 1] = end_bin;
        }
    });
}

// |a and b| of the masks at places i and j.
SPROMPT_INLINE int64_t count_common(const Image& im, const Binning& cut, int64_t i, int64_t j) {
    const int32_t *a = im.span + 2 * i, *b = im.span + 2 * j;
    const int32_t first = a[0] > b[0] ? a[0] : b[0], end = a[1] < b[1] ? a[1] : b[1];
    return first < end ? count_bins(im.mask(i), im.mask(j), cut, first, end) : 0;
}

// A mask that is to be compared with many: its profile in every lane, and the bins that are not empty.
struct Probe {
    vs profile[bins];
    int first, last;

    SPROMPT_INLINE explicit Probe(const int16_t* p) : first(bins), last(0) {
        for (int bin = 0; bin < bins; ++bin) {
            profile[bin] = p[bin] - vs{};
            if (p[bin] == 0) continue;
            if (first == bins) first = bin;
            last = bin + 1;
        }
    }
    // Units that `lanes` masks have in common with this one at most.
    SPROMPT_INLINE vs common(const int16_t* interleaved) const {
        vs sum{};
        for (int bin = first; bin < last; ++bin) sum = add(sum, minimum(load(interleaved + bin * group), profile[bin]));
        return sum;
    }
};

// Runs f(image, threads for that image): images in parallel where there are enough of them.
template <class F>
static void for_each_image(int64_t images, int threads, const F& f) {
    if (images >= threads) return parallel_for(images, 1, threads, [&](int64_t begin, int64_t, int) { f(begin, 1); });
    for (int64_t image = 0; image < images; ++image) f(image, threads);
}

namespace {
// ---- Greedy. IoU > t is |a and b| > T (|a| + |b|) with T = t / (1 + t).
struct Greedy {
    const Image& im;
    const Binning& cut;
    const double threshold, share;
    int64_t kept = 0;
    int64_t* places;  // (kept) by place in the order

    // Units that a mask of this area must have in common with another, less what the other one must add. Rounded down, as
    // are the products' errors: units of the bound are never less than the pair's pixels.
    SPROMPT_INLINE int16_t need_of(int64_t area) const {
        return static_cast<int16_t>(share * (1 - 1e-9) * static_cast<double>(area) /
                                    static_cast<double>(int64_t{1} << cut.shift));
    }

    // Whether IoU > threshold. Long masks are counted bin by bin until the answer is certain.
    SPROMPT_INLINE bool exceeds(int64_t i, int64_t j) const {
        const double areas = static_cast<double>(im.area[i] + im.area[j]), wanted = share * areas;
        int64_t common = 0;
        if (cut.width < 64) {
            common = count_common(im, cut, i, j);
        } else {
            const uint32_t *a = im.mask(i), *b = im.mask(j);
            const int16_t *pa = im.profile + i * bins, *pb = im.profile + j * bins;
            int64_t rest = 0;  // units that the bins to come can add
            for (int bin = 0; bin < cut.count; ++bin) rest += pa[bin] < pb[bin] ? pa[bin] : pb[bin];
            for (int bin = 0; bin < cut.count; ++bin) {
                const int64_t most = pa[bin] < pb[bin] ? pa[bin] : pb[bin];
                if (most == 0) continue;
                common += count_bins(a, b, cut, bin, bin + 1);
                rest -= most;
                if (static_cast<double>(common) > wanted * (1 + 1e-9)) return true;
                if (static_cast<double>(common + (rest << cut.shift)) < wanted * (1 - 1e-9)) return false;
            }
        }
        const double both = static_cast<double>(common);
        if (both > wanted * (1 + 1e-9)) return true;
        if (both < wanted * (1 - 1e-9)) return false;
        return both / (areas - both) > threshold;
    }

    // Whether one of the kept masks from `first` on removes the mask at place j; adds the pairs that were counted to `pairs`.
    static_assert(group % lanes == 0, "groups are whole vectors");
    bool removed(int64_t j, int64_t first, uint32_t& pairs) const {
        const Probe probe(im.profile + j * bins);
        const vs need = need_of(im.area[j]) - vs{};
        for (int64_t start = first / lanes * lanes; start < kept; start += lanes) {
            const vs wanted = maximum(add(load(im.need + start), need), vs{} + 1);
            uint32_t open = bits_at_least(probe.common(im.interleaved + start / group * group * bins + start % group), wanted);
            if (start + lanes > kept) open &= (uint32_t{1} << (kept - start)) - 1;  // lanes that are not in use
            for (; open != 0; open &= open - 1) {
                ++pairs;
                if (exceeds(places[start + __builtin_ctz(open)], j)) return true;
            }
        }
        return false;
    }

    void keep(int64_t place) {
        im.need[kept] = need_of(im.area[place]);
        for (int bin = 0; bin < bins; ++bin)
            im.interleaved[kept / group * group * bins + bin * group + kept % group] = im.profile[place * bins + bin];
        places[kept++] = place;
    }

    // A block of masks is compared in parallel with those kept before it, then one after the other with those of the block.
    // How much work a block is, the pairs that the block before it counted tell.
    void run(int64_t most, int threads) {
        constexpr int64_t block = 128;
        constexpr uint32_t gone = ~uint32_t{0};
        uint32_t* pairs = im.keys;  // (N) counted in the parallel part; `gone`: removed
        int64_t counted = 0;
        for (int64_t begin = 0; begin < im.N && kept < most; begin += block) {
            const int64_t end = begin + block < im.N ? begin + block : im.N, before = kept;
            const int64_t work = counted * (16 + cut.n / 16) + (end - begin) * kept;
            parallel_for(end - begin, 8, threads_for(work, threads), [&](int64_t first, int64_t last, int) {
                for (int64_t j = begin + first; j < begin + last; ++j) {
                    uint32_t found = 0;
                    pairs[j] = im.area[j] == 0 || removed(j, 0, found) ? gone : found;
                }
            });
            counted = 0;
            for (int64_t j = begin; j < end && kept < most; ++j) {
                if (pairs[j] == gone) {
                    ++counted;
                    continue;
                }
                counted += pairs[j];
                uint32_t found = 0;
                if (!removed(j, before, found)) keep(j);
                counted += found;
            }
        }
    }
};
}  // namespace

void mask_nms(const View& words, const View& scores, const View& counts, double threshold, const View& keep, const View& kept,
              const View& scratch, int threads) {
    const Binning cut(words.size[2]);
    for_each_image(words.size[0], threads, [&](int64_t image, int workers) {
        const Image im(words, counts, scratch, image);
        sort_by_score(scores, image, im);
        describe(im, cut, workers);
        Greedy greedy{im, cut, threshold, threshold / (1 + threshold), 0, im.spare};
        greedy.run(keep.size[1], workers);
        int64_t* out = keep.as<int64_t>() + image * keep.size[1];
        for (int64_t k = 0; k < keep.size[1]; ++k) out[k] = k < greedy.kept ? im.order[im.spare[k]] : -1;
        kept.as<int64_t>()[image] = greedy.kept;
    });
}

namespace {
// ---- Matrix. c and decay are maxima and minima, so pairs may come in any order, and a pair whose IoU cannot change either
// of its column's two values need not be counted.
template <bool gaussian>
struct Matrix {
    const Image& im;
    const Binning& cut;
    const int64_t* labels;
    int64_t label_stride;

    // What pairs with mask i need once c[i] is known. gaussian: c^2; linear: 1 / max(1 - c, 1e-6).
    SPROMPT_INLINE void close(int64_t i) const {
        const double c = im.c[i], f = 1 - c > 1e-6 ? 1 - c : 1e-6;
        im.limit[i] = static_cast<float>(gaussian ? c * c : 1 / f);
    }

    // Pairs (i, j), i in [first, last), which are closed. decay holds max(iou^2 - c^2) if gaussian, else the decay.
    void column(int64_t j, int64_t first, int64_t last) const {
        if (im.area[j] == 0 || first >= last) return;
        const Probe probe(im.profile + j * bins);
        const float scale = static_cast<float>(int64_t{1} << cut.shift) * 1.00001f;  // a bound stays one after rounding
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
    }

    // A block of columns is compared in parallel with the masks before it, then column by column with those of the block.
    void run(int threads) const {
        const int64_t block = im.N < 8 * 64 ? 64 : (im.N + 7) / 8;
        for (int64_t begin = 0; begin < im.N; begin += block) {
            const int64_t end = begin + block < im.N ? begin + block : im.N;
            parallel_for(end - begin, 4, threads_for((end - begin) * begin * (3 + cut.n / 64), threads),
                         [&](int64_t first, int64_t last, int) {
                             for (int64_t j = begin + first; j < begin + last; ++j) column(j, 0, begin);
                         });
            for (int64_t j = begin; j < end; ++j) {
                column(j, begin, j);
                close(j);
            }
        }
    }
};
}  // namespace

// e^x for x <= 0: the float32 exponential of x rounded to float32, times 1 + what the rounding took.
SPROMPT_INLINE float exp_of(double x) {
    const float high = static_cast<float>(x);
    float lane[W];
    store(lane, exp(broadcast(high)));
    return lane[0] * (1.0f + static_cast<float>(x - static_cast<double>(high)));
}

template <bool gaussian>
static void decay_image(const View& words, const View& scores, const View& labels, const View& counts, double sigma,
                        const View& out, const View& scratch, const Binning& cut, int64_t image, int threads) {
    const Image im(words, counts, scratch, image);
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
                const View& out, const View& scratch, int threads) {
    const Binning cut(words.size[2]);
    for_each_image(words.size[0], threads, [&](int64_t image, int workers) {
        if (gaussian)
            decay_image<true>(words, scores, labels, counts, sigma, out, scratch, cut, image, workers);
        else
            decay_image<false>(words, scores, labels, counts, sigma, out, scratch, cut, image, workers);
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
