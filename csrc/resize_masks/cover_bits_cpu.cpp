// A row of pixels is made from the union of the rows of cells that it covers. 32 pixels at a time, the cells under them are
// taken as one 64-bit word where they fit. If all of them are equal, so are the pixels; nearly all words are such.
#include "resize_masks/resize_masks.h"

#include "common/bits.h"
#include "common/product.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {  // without it, member functions would be shared code (common/isa.h)

struct Window {
    int64_t begin, end;
};
SPROMPT_INLINE Window window_of(int64_t x, int64_t cells, int64_t size, bool nearest) {
    if (!nearest) return {x * cells / size, ((x + 1) * cells + size - 1) / size};
    const float place = static_cast<float>(x) * (static_cast<float>(cells) / static_cast<float>(size));
    const int64_t k = static_cast<int64_t>(place), last = cells - 1;
    return {k < last ? k : last, (k < last ? k : last) + 1};
}

// Whether a bit of [begin, end) is set.
SPROMPT_INLINE bool any_set(const uint32_t* words, int64_t n, int64_t begin, int64_t end) {
    for (; begin < end; begin += 64)
        if ((bits_at(words, n, begin) & low_bits(end - begin)) != 0) return true;
    return false;
}

struct Cover {
    const Window* columns;  // (width)
    int64_t n, h, w, height, width, row_words;
    bool nearest;

    // row <- the union of rows [window.begin, window.end) of a mask.
    SPROMPT_INLINE void unite(const uint32_t* mask, Window window, uint32_t* row) const {
        for (int64_t i = 0; i < w; i += 64) {
            uint64_t bits = 0;
            for (int64_t y = window.begin; y < window.end; ++y) bits |= bits_at(mask, n, y * w + i);
            bits &= low_bits(w - i);
            __builtin_memcpy(row + i / 32, &bits, 8);
        }
    }

    // Pixels [x, x + count) of a row, count <= 32.
    SPROMPT_INLINE uint32_t pixels(const uint32_t* row, int64_t x, int64_t count) const {
        const int64_t begin = columns[x].begin, under = columns[x + count - 1].end - begin;
        uint32_t out = 0;
        if (under > 64) {
            for (int64_t k = 0; k < count; ++k)
                out |= static_cast<uint32_t>(any_set(row, row_words, columns[x + k].begin, columns[x + k].end)) << k;
            return out;
        }
        const uint64_t cells = bits_at(row, row_words, begin) & low_bits(under);
        if (cells == 0) return 0;
        if (cells == low_bits(under)) return static_cast<uint32_t>(low_bits(count));
        for (int64_t k = 0; k < count; ++k) {
            const Window column = columns[x + k];
            const uint64_t own = cells >> (column.begin - begin) & low_bits(column.end - column.begin);
            out |= static_cast<uint32_t>(own != 0) << k;
        }
        return out;
    }

    // Writes rows [top, bottom) of pixels. row (row_words) and line (words of a row of pixels) are buffers.
    void write(const uint32_t* mask, int64_t top, int64_t bottom, uint32_t* row, uint32_t* line, uint32_t* out) const {
        BitWriter writer(out);
        Window last{-1, -1};
        for (int64_t y = top; y < bottom; ++y) {
            const Window window = window_of(y, h, height, nearest);
            if (window.begin != last.begin || window.end != last.end) {
                unite(mask, window, row);
                for (int64_t x = 0; x < width; x += 32) line[x / 32] = pixels(row, x, width - x < 32 ? width - x : 32);
                last = window;
            }
            for (int64_t x = 0; x < width; x += 32) writer.put(line[x / 32], static_cast<int>(width - x < 32 ? width - x : 32));
        }
        writer.close();
    }
};

}  // namespace

void cover_bits(const View& in, int64_t h, int64_t w, int64_t height, int64_t width, bool nearest, const View& words,
                int threads) {
    const int64_t masks = in.size[0];
    if (masks == 0 || height == 0 || width == 0) return;
    Scratch memory;
    Window* columns = memory.take<Window>(width);
    for (int64_t x = 0; x < width; ++x) columns[x] = window_of(x, w, width, nearest);
    const int64_t row_words = round_up(words_for(w) + 1, 16), line_words = round_up(words_for(width), 16);
    uint32_t* row = memory.take<uint32_t>(threads, row_words);
    uint32_t* line = memory.take<uint32_t>(threads, line_words);
    const Cover cover{columns, in.size[1], h, w, height, width, words_for(w), nearest};

    // Bands of rows begin at whole words: 64 rows of any width are a multiple of 32 pixels.
    const int64_t band = masks >= 64 ? round_up(height, 64) : 64, bands = (height + band - 1) / band;
    const int64_t n = words_for(height * width), rows = band < height ? band : height;
    parallel_for(masks * bands, 1 + (1 << 18) / (rows * width), threads, [&](int64_t begin, int64_t end, int index) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t mask = job / bands, top = job % bands * band, bottom = top + band < height ? top + band : height;
            cover.write(in.as<const uint32_t>() + mask * in.stride[0], top, bottom, row + index * row_words,
                        line + index * line_words, words.as<uint32_t>() + mask * n + top * width / 32);
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
