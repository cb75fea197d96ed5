#include "masks/masks.h"

#include "common/bits.h"
#include "common/half.h"
#include "common/huge_pages.h"
#include "common/overlap.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {

// 32 pixels -> one word.
template <class T>
SPROMPT_INLINE uint32_t pack_word(const T* pixels, float threshold) {
    const vf level = broadcast(threshold);
    uint32_t word = 0;
    for (int i = 0; i < 32; i += W) word |= bits_greater(load_as_float(pixels + i), level) << i;
    return word;
}
SPROMPT_INLINE uint32_t pack_word(const uint8_t* pixels, float) {
#if defined(__AVX2__)
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels));
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
#elif SPROMPT_X86
    const __m128i zero = _mm_setzero_si128();
    const __m128i low = _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels)), zero);
    const __m128i high = _mm_cmpeq_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels + 16)), zero);
    return ~(static_cast<uint32_t>(_mm_movemask_epi8(low)) | static_cast<uint32_t>(_mm_movemask_epi8(high)) << 16);
#else
    uint32_t word = 0;
    for (int i = 0; i < 32; ++i) word |= static_cast<uint32_t>(pixels[i] != 0) << i;
    return word;
#endif
}
template <class T>
SPROMPT_INLINE bool is_set(T pixel, float threshold) {
    return to_float(pixel) > threshold;
}
SPROMPT_INLINE bool is_set(uint8_t pixel, float) { return pixel != 0; }

template <class T>
static void pack_rows(const View& pixels, float threshold, const View& words, int threads) {
    constexpr int64_t block = 2048;  // words per chunk: 64 k pixels
    const int64_t rows = pixels.size[0], P = pixels.size[1], n = words_for(P), blocks = (n + block - 1) / block;
    parallel_for(rows * blocks, 1, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t row = job / blocks, first = job % blocks * block, last = first + block < n ? first + block : n;
            const T* in = pixels.as<const T>() + row * pixels.stride[0];
            uint32_t* out = words.as<uint32_t>() + row * words.stride[0];
            const int64_t whole = last < P / 32 ? last : P / 32;
            int64_t i = first;
            for (; i < whole; ++i) out[i] = pack_word(in + 32 * i, threshold);
            for (; i < last; ++i) {  // the last word of a row
                uint32_t word = 0;
                for (int64_t p = 32 * i; p < P; ++p) word |= static_cast<uint32_t>(is_set(in[p], threshold)) << (p - 32 * i);
                out[i] = word;
            }
        }
    });
}

void pack_masks(const View& pixels, float threshold, const View& words, int threads) {
    if (pixels.dtype == DType::u8 || pixels.dtype == DType::i8 || pixels.dtype == DType::b8)
        return pack_rows<uint8_t>(pixels, threshold, words, threads);
    SPROMPT_FLOAT_TYPES(pixels.dtype, T, pack_rows<T>(pixels, threshold, words, threads))
}

// One word -> 32 pixels of 0 or 1.
SPROMPT_INLINE void unpack_word(uint32_t word, uint8_t* pixels) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pixels), _mm256_maskz_set1_epi8(word, 1));
#elif defined(__AVX2__)
    const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(word)), byte_of);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pixels), _mm256_and_si256(set, _mm256_set1_epi8(1)));
#else
    for (int i = 0; i < 4; ++i) {  // 8 bits -> 8 bytes: each byte keeps its own bit, then becomes 1 if it is not 0
        const uint64_t byte = (word >> (8 * i)) & 0xff;
        uint64_t spread = (byte * 0x0101010101010101u) & 0x8040201008040201u;
        spread = ((spread + 0x7f7f7f7f7f7f7f7fu) | spread) >> 7 & 0x0101010101010101u;
        __builtin_memcpy(pixels + 8 * i, &spread, 8);
    }
#endif
}

void unpack_masks(const View& words, const View& pixels, int threads) {
    const int64_t rows = pixels.size[0], P = pixels.size[1], n = words_for(P);
    // Chunks are not smaller than pages. If two threads touched the same new page, both would clear a page.
    const int64_t chunk = ask_for_huge_pages(pixels.as<uint8_t>(), rows * P) ? huge_page : 1 << 16;
    const int64_t block = chunk / 32, blocks = (n + block - 1) / block;  // in words; a long row is several jobs
    parallel_for(rows * blocks, 1 + chunk / (P + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t row = job / blocks, first = job % blocks * block, last = first + block < n ? first + block : n;
            const uint32_t* in = words.as<const uint32_t>() + row * words.stride[0];
            uint8_t* out = pixels.as<uint8_t>() + row * pixels.stride[0];
            const int64_t whole = last < P / 32 ? last : P / 32;
            for (int64_t i = first; i < whole; ++i) unpack_word(in[i], out + 32 * i);
            for (int64_t p = 32 * whole; p < P && whole < last; ++p) out[p] = (in[whole] >> (p % 32)) & 1;
        }
    });
}

void mask_area(const View& words, const View& area, int threads) {
    const int64_t n = words.size[1];
    parallel_for(words.size[0], 1 + (1 << 14) / (n + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row)
            area.as<int64_t>()[row] = count_bits(words.as<const uint32_t>() + row * words.stride[0], n);
    });
}

void mask_boxes(const View& words, int64_t width, const View& boxes, int threads) {
    const int64_t n = words.size[1];
    parallel_for(words.size[0], 1 + (1 << 13) / (n + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const Extent extent = extent_of(words.as<const uint32_t>() + row * words.stride[0], n, width);
            int64_t* box = boxes.as<int64_t>() + 4 * row;
            box[0] = extent.x1;
            box[1] = extent.y1;
            box[2] = extent.x2;
            box[3] = extent.y2;
        }
    });
}

SPROMPT_INLINE uint32_t reversed(uint32_t v) {
    v = (v >> 1 & 0x55555555u) | (v & 0x55555555u) << 1;
    v = (v >> 2 & 0x33333333u) | (v & 0x33333333u) << 2;
    v = (v >> 4 & 0x0f0f0f0fu) | (v & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(v);
}

void window_masks(const View& words, int64_t height, int64_t width, int64_t top, int64_t left, int64_t out_height,
                  int64_t out_width, bool flip, const View& out, int threads) {
    const int64_t n = words.size[1];
    parallel_for(words.size[0], 1 + (1 << 12) / (n + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            const uint32_t* in = words.as<const uint32_t>() + row * words.stride[0];
            BitWriter writer(out.as<uint32_t>() + row * out.stride[0]);
            for (int64_t y = top; y < top + out_height; ++y) {
                const bool inside = y >= 0 && y < height;
                // Columns [x, x + k) of the source. Columns outside [0, width) are 0.
                const auto take = [&](int64_t x, int k) -> uint32_t {
                    if (!inside || x >= width || x + k <= 0) return 0;
                    const int64_t from = x < 0 ? 0 : x, to = x + k < width ? x + k : width;
                    return static_cast<uint32_t>((bits_at(in, n, y * width + from) & low_bits(to - from)) << (from - x));
                };
                for (int64_t x = 0; x < out_width; x += 32) {
                    const int k = static_cast<int>(out_width - x < 32 ? out_width - x : 32);
                    writer.put(flip ? reversed(take(left + out_width - x - k, k)) >> (32 - k) : take(left + x, k), k);
                }
            }
            writer.close();
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
