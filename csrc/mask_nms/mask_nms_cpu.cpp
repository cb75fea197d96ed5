#include "mask_nms/masks_by_score.h"

namespace sprompt {
namespace SPROMPT_ISA {

namespace {
// Upper bound of the number of pixels that two masks have in common, from their sketches.
SPROMPT_INLINE int64_t sum_of_minima(const uint8_t* a, const uint8_t* b, int64_t n) {
#if defined(__AVX2__)
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 32) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i));
        const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i));
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(_mm256_min_epu8(x, y), _mm256_setzero_si256()));
    }
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    return _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
#elif SPROMPT_X86
    __m128i sum = _mm_setzero_si128();
    for (int64_t i = 0; i < n; i += 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i));
        const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i));
        sum = _mm_add_epi64(sum, _mm_sad_epu8(_mm_min_epu8(x, y), _mm_setzero_si128()));
    }
    return _mm_cvtsi128_si64(sum) + _mm_cvtsi128_si64(_mm_unpackhi_epi64(sum, sum));
#else
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += a[i] < b[i] ? a[i] : b[i];
    return sum;
#endif
}

// ---- Greedy. IoU > t is |a and b| > T (|a| + |b|) with T = t / (1 + t).
struct Greedy {
    const Image& im;
    const Binning& cut;
    const double threshold, share;
    int64_t kept = 0;
    int64_t* places;  // (kept) by place in the order
    bool sketched = false;

    // A pair needs share * (area_i + area_j) common pixels. This is the mask's part of that sum, in units of the profile,
    // rounded down. So a pair whose bound falls below the sum of both parts cannot reach the threshold. The factor 1 - 1e-9
    // covers the rounding errors of the products.
    SPROMPT_INLINE int16_t need_of(int64_t area) const {
        return static_cast<int16_t>(share * (1 - 1e-9) * static_cast<double>(area) /
                                    static_cast<double>(int64_t{1} << cut.shift));
    }

    // Computes the sketch of every mask.
    void draw(int threads) {
        parallel_for(im.N, 1 + 400000 / cut.n, threads_for(im.N * cut.n / 4, threads), [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) {
                const uint32_t* const mask = im.mask(i);
                uint8_t* const sketch = im.sketch + i * im.sketch_bytes;
                int64_t q = 0;
                for (; 4 * q + 4 <= cut.n; ++q)
                    sketch[q] = static_cast<uint8_t>(popcount(load64(mask + 4 * q)) + popcount(load64(mask + 4 * q + 2)));
                for (; q < im.sketch_bytes; ++q) {
                    sketch[q] = 0;
                    for (int64_t w = 4 * q; w < cut.n; ++w) sketch[q] += static_cast<uint8_t>(popcount(mask[w]));
                }
            }
        });
        sketched = true;
    }

    // Whether IoU > threshold. Long masks are counted bin by bin, until the answer is certain.
    SPROMPT_INLINE bool exceeds(int64_t i, int64_t j) const {
        const double areas = static_cast<double>(im.area[i] + im.area[j]), wanted = share * areas;
        int64_t common = 0;
        if (cut.width < 64) {
            common = count_common(im, cut, i, j);
        } else {
            if (sketched) {
                const uint8_t *sa = im.sketch + i * im.sketch_bytes, *sb = im.sketch + j * im.sketch_bytes;
                if (static_cast<double>(sum_of_minima(sa, sb, im.sketch_bytes)) < wanted * (1 - 1e-9)) return false;
            }
            const uint32_t *a = im.mask(i), *b = im.mask(j);
            const int16_t *pa = im.profile + i * bins, *pb = im.profile + j * bins;
            int64_t rest = 0;  // upper bound, in units, for the bins that are not counted yet
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

    // Whether one of the kept masks from `first` on removes the mask at place j. Adds the number of counted pairs to `pairs`.
    static_assert(group % lanes == 0, "groups are whole vectors");
    bool removed(int64_t j, int64_t first, uint32_t& pairs) const {
        const Probe probe(im.profile + j * bins);
        const vs need = need_of(im.area[j]) - vs{};
        for (int64_t start = first / lanes * lanes; start < kept; start += lanes) {
            const vs wanted = maximum(add(load(im.need + start), need), vs{} + 1);
            uint32_t open = bits_at_least(probe.common(im.interleaved + start / group * group * bins + start % group), wanted);
            if (start + lanes > kept) open &= (uint32_t{1} << (kept - start)) - 1;  // drops the unused lanes
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

    // A block of masks is compared in parallel with the masks kept before it. Then its masks are compared one after the other
    // with the masks kept within the block. The number of pairs that a block counted estimates the work of the next block, and
    // decides whether run_by_product takes over.
    void run(int64_t most, int threads) {
        constexpr uint32_t gone = ~uint32_t{0};
        uint32_t* pairs = im.keys;  // (N) counted in the parallel part; `gone`: removed
        int64_t counted = 0;
        for (int64_t begin = 0, end; begin < im.N && kept < most; begin = end) {
            const int64_t block = begin == 0 && im.sketch_bytes != 0 ? 32 : BitProduct::columns;
            end = begin + block < im.N ? begin + block : im.N;
            const int64_t before = kept, work = counted * (16 + cut.n / 16) + (end - begin) * kept;
            parallel_for(end - begin, 8, threads_for(work, threads), [&](int64_t first, int64_t last, int) {
                for (int64_t j = begin + first; j < begin + last; ++j) {
                    uint32_t found = 0;
                    pairs[j] = im.area[j] == 0 || removed(j, 0, found) ? gone : found;
                }
            });
            counted = 0;
            int64_t compared = 0;
            for (int64_t j = begin; j < end && kept < most; ++j) {
                compared += kept;
                if (pairs[j] == gone) {
                    ++counted;
                    continue;
                }
                counted += pairs[j];
                uint32_t found = 0;
                if (!removed(j, before, found)) keep(j);
                counted += found;
            }
            // Sketches cost about as much as counting 4 pairs per mask. They pay if the remaining masks count pairs at the rate
            // of this block.
            if (im.sketch_bytes != 0 && !sketched && counted * (im.N - end) > 4 * im.N * (end - begin)) draw(threads);
            if (im.sketch_bytes == 0 && product_pays(counted, compared, cut.n)) return run_by_product(end, most, threads);
        }
    }

    // The removed columns of a tile. The columns are a block of masks, at places [begin, begin + C).
    struct Removed {
        uint64_t bits[BitProduct::columns / 64];
    };
    // Adds to `gone` the masks of the block that the mask at place i removes.
    SPROMPT_INLINE void remove(int64_t i, const uint16_t* counts, int64_t begin, int64_t C, const float* areas,
                               Removed& gone) const {
        const vf area = broadcast(im.area_f[i]), least = broadcast(static_cast<float>(share * (1 - 1e-5)));
        for (int64_t half = 0; half * 64 < C; ++half) {
            uint64_t open = 0;
            for (int64_t lane = 0; lane < 64; lane += W) {
                const int64_t j = 64 * half + lane;
                open |= static_cast<uint64_t>(bits_greater(load_counts(counts + j), (load(areas + j) + area) * least)) << lane;
            }
            for (open &= ~gone.bits[half]; open != 0; open &= open - 1) {
                const int64_t j = 64 * half + __builtin_ctzll(open);
                const double both = counts[j], either = static_cast<double>(im.area[i] + im.area[begin + j]) - both;
                if (both / either > threshold) gone.bits[half] |= open & -open;
            }
        }
    }

    // Like run, from `start` on, for inputs where run would have to count most pairs. Tiles of the product count all pairs. In
    // parallel, a block is multiplied with the masks kept before it, in parts, and with itself. Then its masks are kept or
    // removed one after the other, by bits.
    __attribute__((noinline)) void run_by_product(int64_t start, int64_t most, int threads) {
        Removed within[BitProduct::columns];                            // masks that each mask of the block removes
        Removed* const by = reinterpret_cast<Removed*>(im.spare_keys);  // (parts) masks that the kept masks of a part remove
        for (int64_t i = 0; i < im.N; ++i) im.area_f[i] = static_cast<float>(im.area[i]);
        for (int64_t begin = start; begin < im.N && kept < most; begin += BitProduct::columns) {
            const int64_t C = begin + BitProduct::columns < im.N ? BitProduct::columns : im.N - begin;
            const Parts parts(kept, threads);
            const auto column = [&](int64_t j) { return im.mask(begin + j); };
            float areas[BitProduct::columns] = {};
            __builtin_memcpy(areas, im.area_f + begin, C * sizeof areas[0]);
            parallel_for(parts.count + 1, 1, threads_for((kept + C) * C * (1 + cut.n / 16), threads),
                         [&](int64_t job, int64_t, int) {
                             BitProduct product;
                             if (job == parts.count) {
                                 product.multiply(C, column, C, column, 0, cut.n);
                                 for (int64_t i = 0; i < C; ++i) {
                                     within[i] = Removed{};
                                     remove(begin + i, product.counts[i], begin, C, areas, within[i]);
                                 }
                                 return;
                             }
                             const int64_t* const rows = places + job * parts.size;
                             const int64_t R = kept - job * parts.size < parts.size ? kept - job * parts.size : parts.size;
                             product.multiply(R, [&](int64_t i) { return im.mask(rows[i]); }, C, column, 0, cut.n);
                             Removed gone{};
                             for (int64_t i = 0; i < R; ++i) remove(rows[i], product.counts[i], begin, C, areas, gone);
                             by[job] = gone;
                         });
            Removed gone{};
            for (int64_t part = 0; part < parts.count; ++part)
                for (int half = 0; half < 2; ++half) gone.bits[half] |= by[part].bits[half];
            for (int64_t j = 0; j < C && kept < most; ++j) {
                if (im.area[begin + j] == 0 || (gone.bits[j / 64] >> j % 64 & 1)) continue;
                places[kept++] = begin + j;
                for (int half = 0; half < 2; ++half) gone.bits[half] |= within[j].bits[half];
            }
        }
    }
};
}  // namespace

void mask_nms(const View& words, const View& scores, const View& counts, double threshold, const View& keep, const View& kept,
              int threads) {
    const Binning cut(words.size[2]);
    const int64_t sketch = cut.n > 512 ? (cut.n + 255) / 256 * 64 : 0;  // a sixteenth of the bytes of a long mask
    Scratch memory;
    uint8_t* const scratch = image_scratch(memory, words, sketch);
    for_each_image(words.size[0], threads, [&](int64_t image, int workers) {
        const Image im(words, counts, scratch, image, sketch);
        sort_by_score(scores, image, im);
        describe(im, cut, workers);
        Greedy greedy{im, cut, threshold, threshold / (1 + threshold), 0, im.spare};
        greedy.run(keep.size[1], workers);
        int64_t* out = keep.as<int64_t>() + image * keep.size[1];
        for (int64_t k = 0; k < keep.size[1]; ++k) out[k] = k < greedy.kept ? im.order[im.spare[k]] : -1;
        kept.as<int64_t>()[image] = greedy.kept;
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
