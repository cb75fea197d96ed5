// Common parts of greedy and matrix suppression: the masks of an image by decreasing score, their areas, and upper bounds of
// the intersection of two masks.
#pragma once

#include "common/bit_product.h"
#include "common/half.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "mask_nms/mask_nms.h"

namespace sprompt {
namespace SPROMPT_ISA {

// ---- The bounds use a profile of each mask. The words of a mask are cut into at most 16 bins. The profile holds the number of
// set pixels of each bin in units of 2^shift pixels, rounded up. So sum(min(profile_a, profile_b)) units is at least |a and b|.
// The shift keeps a whole mask within 2^14 units, so sums and comparisons fit 16-bit lanes.
constexpr int bins = 16;
constexpr int group = 32;  // masks whose profiles are interleaved, [bin][mask]
constexpr int lanes = 2 * W;
typedef int16_t vs __attribute__((vector_size(2 * lanes)));

SPROMPT_INLINE vs load(const int16_t* p) {
    vs v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
SPROMPT_INLINE void store(int16_t* p, vs v) { __builtin_memcpy(p, &v, sizeof v); }
// The sum wraps, because unused lanes may hold any value.
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
    int64_t n, width;  // words of a mask; words of a bin
    int count, shift;

    SPROMPT_INLINE explicit Binning(int64_t words) : n(words) {
        width = (n + bins - 1) / bins;
        width += width & 1;                              // pairs of words
        if (width > 32) width = (width + 63) / 64 * 64;  // count_and takes 64 words at a time
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

// Bytes of scratch that an image needs for each of its masks and for one more group of masks. The sketch is not included.
constexpr int64_t bytes_per_mask = 144;

// Takes the scratch memory of all images, before the call starts its threads.
SPROMPT_INLINE uint8_t* image_scratch(Scratch& memory, const View& words, int64_t sketch) {
    return memory.take<uint8_t>(words.size[0], words.size[1] + group, bytes_per_mask + sketch);
}

// ---- Scratch and inputs of one image.
struct Image {
    const uint32_t* words;
    int64_t stride;               // words between masks
    int64_t N;                    // real masks
    int64_t* order;               // (N) indices by decreasing score
    int64_t* spare;               // (N); in memory it follows the keys
    int64_t* area;                // (N), by place in the order, like all arrays below
    int16_t* profile;             // (N, bins)
    int16_t* interleaved;         // (groups, bins, group)
    int16_t* need;                // (groups * group)
    int32_t* span;                // (N, 2) range of bins that holds all set pixels: first, end
    double *c, *decay;            // (N)
    float *area_f, *limit;        // (groups * group)
    uint32_t *keys, *spare_keys;  // (N)
    uint8_t* sketch;              // (N, sketch_bytes) number of set pixels of every 4 words, zeros behind the last
    int64_t sketch_bytes;         // 0: there is no sketch

    // Uses 130 bytes per mask, the sketch, and some bytes for alignment. image_scratch takes more than that.
    SPROMPT_INLINE Image(const View& all, const View& counts, uint8_t* scratch, int64_t image, int64_t sketch)
        : sketch_bytes(sketch) {
        const int64_t masks = all.size[1], padded = (masks + group - 1) / group * group;
        words = all.as<const uint32_t>() + image * all.stride[0];
        stride = all.stride[1];
        N = counts.given() ? counts.as<const int64_t>()[image * counts.stride[0]] : masks;
        uint8_t* next = scratch + image * (masks + group) * (bytes_per_mask + sketch_bytes);
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
        spare = static_cast<int64_t*>(take(8));
        order = static_cast<int64_t*>(take(8));
        area = static_cast<int64_t*>(take(8));
        c = static_cast<double*>(take(8));
        decay = static_cast<double*>(take(8));
        this->sketch = static_cast<uint8_t*>(take(sketch_bytes));
    }
    SPROMPT_INLINE const uint32_t* mask(int64_t place) const { return words + order[place] * stride; }
};

// Smaller scores have larger keys. NaN counts as -inf, -0 as 0.
SPROMPT_INLINE uint32_t key_of(float score) {
    if (score != score) score = -__builtin_inff();
    score += 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &score, 4);
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

// order <- indices by decreasing score, equal scores by lower index. A stable radix sort, one byte at a time.
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
static inline void sort_by_score(const View& scores, int64_t image, const Image& im){
    SPROMPT_FLOAT_TYPES(scores.dtype, T, sort_scores<T>(scores.as<const T>() + image * scores.stride[0], scores.stride[1], im))}

// The number of threads for work of about `nanoseconds`. Waking other threads costs some microseconds.
SPROMPT_INLINE int threads_for(int64_t nanoseconds, int threads) {
    return nanoseconds > 40000 ? threads : 1;
}

// Profile and area of every mask, by place.
static inline void describe(const Image& im, const Binning& cut, int threads) {
    const int64_t unit = (int64_t{1} << cut.shift) - 1;
    const int64_t cost = 80 + cut.n / 8;  // about, in nanoseconds per mask
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

// A mask that is compared with many others: its profile, broadcast to every lane, and the range of its bins that are not empty.
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
    // Upper bound, in units, of the intersections of `lanes` masks with this mask.
    SPROMPT_INLINE vs common(const int16_t* interleaved) const {
        vs sum{};
        for (int bin = first; bin < last; ++bin) sum = add(sum, minimum(load(interleaved + bin * group), profile[bin]));
        return sum;
    }
};

// Runs f(image, threads for that image). The images run in parallel if there are enough of them.
template <class F>
static void for_each_image(int64_t images, int threads, const F& f) {
    if (images >= threads) return parallel_for(images, 1, threads, [&](int64_t begin, int64_t, int) { f(begin, 1); });
    for (int64_t image = 0; image < images; ++image) f(image, threads);
}

// Whether tiles of the product are cheaper for the remaining masks of n words, after `counted` of `pairs` pairs had to be
// counted. The constants are nanoseconds, about: the fixed cost of a pair, and the cost per word.
SPROMPT_INLINE bool product_pays(int64_t counted, int64_t pairs, int64_t n) {
#if defined(__AVX512F__)
    constexpr double start = 8, word = 0.06, tile_start = 0.3, tile_word = 0.05;
#elif defined(__AVX2__)
    constexpr double start = 6, word = 0.15, tile_start = 0.3, tile_word = 0.06;
#else
    constexpr double start = 6, word = 0.5, tile_start = 0.6, tile_word = 0.17;
#endif
    return n <= BitProduct::most_words && static_cast<double>(counted) * (start + word * static_cast<double>(n)) >
                                              static_cast<double>(pairs) * (tile_start + tile_word * static_cast<double>(n));
}

// Cuts `rows` rows into equal parts. A part is at most one tile and, except for the last part, at least 128 rows.
struct Parts {
    int64_t count, size;

    SPROMPT_INLINE Parts(int64_t rows, int threads) {
        count = (rows + BitProduct::rows - 1) / BitProduct::rows;
        if (count < threads) count = rows / 128 < threads ? rows / 128 : threads;
        if (count == 0 && rows > 0) count = 1;
        size = count == 0 ? 0 : (rows + count - 1) / count;
    }
};
// The counts of W pairs as floats.
SPROMPT_INLINE vf load_counts(const uint16_t* counts) {
    uint16_t v __attribute__((vector_size(2 * W)));
    __builtin_memcpy(&v, counts, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, vi), vf);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
