// Weights of a box are products of row and column weights. So a row of pixels is summed over the columns of every part once,
// and these sums are added to the parts that have the row. The bits under a part are mostly equal, and then need no sum.
#include "box_masks/axes.h"
#include "box_masks/box_masks.h"
#include "common/bits.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {  // without it, member functions would be shared code (common/isa.h)

// weights[span.end - span.begin] of the pixels of a span in a part.
SPROMPT_INLINE void weigh(const Samples& samples, int32_t part, Span span, double* weights) {
    const int64_t pixels = span.end - span.begin;
    for (int64_t i = 0; i < pixels; ++i) weights[i] = 0.0;
    const int32_t near = samples.near(0), begin = part * samples.g, end = begin + samples.g;
    for (int32_t j = near > begin ? near : begin; j < end; ++j) {
        const double place = samples.place(j);
        if (place > static_cast<double>(samples.pixels)) break;
        if (!samples.has_weight(place)) continue;
        const Share share = samples.share(place);
        weights[share.pixel - span.begin] += share.lower;
        if (share.upper > 0.0) weights[share.pixel + 1 - span.begin] += share.upper;
    }
}

// The column weights of a box, and the sums of its last two rows of pixels.
struct Crop {
    // Each part has its pixels, the sum of its weights, and the place of its weights in `weights`.
    Span* spans;      // (size)
    double* totals;   // (size)
    int64_t* places;  // (size)
    double* weights;  // (width + 2 size): neighbours share at most two pixels
    double* sums[2];  // (size) each: of row y at y % 2
    int64_t rows[2];  // their rows, or -1
    bool set[2];      // whether they have a set pixel
    uint32_t* line;   // the bits of a row, from pixel `left` on; two words more than needed are readable
    double* down;     // (height) row weights
    double* output;   // (size)
    int32_t size;
    int64_t left, right;
    double whole;  // the weight of the samples of a part

    SPROMPT_INLINE void begin(const Samples& columns) {
        int64_t at = 0;
        left = columns.pixels, right = 0, whole = columns.whole();
        for (int32_t p = 0; p < size; ++p) {
            spans[p] = columns.span(p);
            places[p] = at;
            totals[p] = 0.0;
            if (spans[p].begin == spans[p].end) continue;
            weigh(columns, p, spans[p], weights + at);
            for (; at < places[p] + spans[p].end - spans[p].begin; ++at) totals[p] += weights[at];
            left = left < spans[p].begin ? left : spans[p].begin;
            right = spans[p].end;
        }
        rows[0] = rows[1] = -1;
    }

    // The sum of the weights of the set pixels of part p.
    SPROMPT_INLINE double sum(int64_t p) const {
        const int64_t pixels = spans[p].end - spans[p].begin;
        const double* const w = weights + places[p];
        double found = 0.0;
        for (int64_t i = 0; i < pixels; i += 56) {  // a 64-bit word from any byte holds at least 57 bits from its first
            const int64_t bit = spans[p].begin - left + i, count = pixels - i < 56 ? pixels - i : 56;
            uint64_t bits;
            __builtin_memcpy(&bits, reinterpret_cast<const char*>(line) + bit / 8, 8);
            bits = bits >> (bit % 8) & low_bits(count);
            if (bits == low_bits(count) && count == pixels) return totals[p];
            for (; bits != 0; bits &= bits - 1) found += w[i + __builtin_ctzll(bits)];
        }
        return found;
    }

    // The sums of row y of a mask, or null if no pixel of it is set.
    SPROMPT_INLINE const double* row(const uint32_t* mask, int64_t n, int64_t width, int64_t y) {
        const int64_t slot = y % 2;
        if (rows[slot] != y) {
            rows[slot] = y;
            uint64_t any = 0;
            for (int64_t x = left; x < right; x += 64) {
                const uint64_t bits = bits_at(mask, n, y * width + x) & low_bits(right - x);
                __builtin_memcpy(line + (x - left) / 32, &bits, 8);
                any |= bits;
            }
            set[slot] = any != 0;
            if (set[slot])
                for (int64_t p = 0; p < size; ++p) sums[slot][p] = sum(p);
        }
        return set[slot] ? sums[slot] : nullptr;
    }

    void write(const Samples& across, const uint32_t* mask, int64_t n, int64_t width, float* out) {
        const double area = whole * across.whole();
        for (int32_t part = 0; part < size; ++part, out += size) {
            for (int64_t p = 0; p < size; ++p) output[p] = 0.0;
            const Span span = across.span(part);
            weigh(across, part, span, down);
            for (int64_t y = span.begin; y < span.end && left < right; ++y) {
                const double weight = down[y - span.begin];
                const double* const found = weight > 0.0 ? row(mask, n, width, y) : nullptr;
                if (found == nullptr) continue;
                for (int64_t p = 0; p < size; ++p) output[p] += weight * found[p];
            }
            for (int64_t p = 0; p < size; ++p) out[p] = static_cast<float>(output[p] / area);
        }
    }
};

}  // namespace

void crop_masks(const View& words, const View& boxes, const View& index, int64_t masks_per_image, int64_t boxes_per_image,
                int64_t height, int64_t width, int64_t size, const View& out, int threads) {
    const int64_t n = words.size[1], count = index.size[0];
    if (count == 0) return;
    Scratch memory;
    Crop* const crops = memory.take<Crop>(threads);
    for (int i = 0; i < threads; ++i) {
        Crop& crop = crops[i];
        crop.size = static_cast<int32_t>(size);
        crop.spans = memory.take<Span>(size);
        crop.totals = memory.take<double>(size);
        crop.places = memory.take<int64_t>(size);
        crop.weights = memory.take<double>(width + 2 * size);
        for (double*& sums : crop.sums) sums = memory.take<double>(size);
        crop.line = memory.take<uint32_t>(words_for(width) + 4);
        crop.down = memory.take<double>(height);
        crop.output = memory.take<double>(size);
    }
    const Boxes box(boxes);
    parallel_for(count, 4, threads, [&](int64_t begin, int64_t end, int worker) {
        Crop& crop = crops[worker];
        for (int64_t i = begin; i < end; ++i) {
            float* const pixels = out.as<float>() + i * size * size;
            const int64_t mask = index.as<const int64_t>()[i];
            const double x1 = box(i, 0), y1 = box(i, 1), x2 = box(i, 2), y2 = box(i, 3);
            if (mask < 0 || mask >= masks_per_image || n == 0 || !is_cropped(x1, x2) || !is_cropped(y1, y2)) {
                __builtin_memset(pixels, 0, static_cast<size_t>(size * size) * sizeof(float));
                continue;
            }
            crop.begin(Samples(x1, x2, crop.size, width));
            const int64_t row = i / boxes_per_image * masks_per_image + mask;
            crop.write(Samples(y1, y2, crop.size, height), words.as<const uint32_t>() + row * n, n, width, pixels);
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
