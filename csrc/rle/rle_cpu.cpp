// Both directions work on differences down the columns: d[y, x] = m[y, x] ^ m[y - 1, x], and d[0, x] = m[0, x] ^ m[height - 1,
// x - 1]. d is set exactly where a run begins. In row-major bits d is an exclusive-or of two shifted reads, so no single pixel
// is read. Where d is 0, which is nearly everywhere, there is nothing more to do.
#include "rle/rle.h"

#include "common/bits.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {

typedef uint32_t vu __attribute__((vector_size(4 * W)));

constexpr int64_t strip = 16;  // 64-bit words of a row handled at a time: 1024 columns

// Row-major words of one mask.
struct Pixels {
    const uint32_t* words;
    int64_t n, height, width;
};

// The number of set bits of d. It is one less than the number of runs; an empty first run counts as a run.
static int64_t count_changes(const Pixels& m) {
    const int64_t P = m.height * m.width;
    if (P == 0) return 0;
    int64_t total = 0;
    // Compares row 0 with the last row, shifted one column to the right.
    for (int64_t x = 0; x < m.width; x += 64) {
        const uint64_t above = x > 0 ? bits_at(m.words, m.n, P - m.width + x - 1) : bits_at(m.words, m.n, P - m.width) << 1;
        total += popcount((bits_at(m.words, m.n, x) ^ above) & low_bits(m.width - x));
    }
    // The other rows: compares bit p with bit p - width. The differences go through a small buffer, since count_bits is fastest
    // on long rows.
    constexpr int64_t block = 1024;
    uint32_t d[block];
    const int64_t back = m.width / 32;
    const int shift = static_cast<int>(m.width % 32);
    for (int64_t i = back; i < m.n; i += block) {
        const int64_t k = m.n - i < block ? m.n - i : block;
        const uint32_t *here = m.words + i, *there = here - back;
        d[0] = here[0] ^ (i == back ? there[0] << shift : there[0] << shift | (there[-1] >> 1) >> (31 - shift));
        for (int64_t j = 1; j < k; ++j) d[j] = here[j] ^ (there[j] << shift | (there[j - 1] >> 1) >> (31 - shift));
        if (i == back) d[0] &= ~static_cast<uint32_t>(low_bits(shift));  // row 0
        if (i + k == m.n && P % 32 != 0) d[k - 1] &= static_cast<uint32_t>(low_bits(P % 32));
        total += count_bits(d, k);
    }
    return total;
}

// Sets offsets[0] = 0 and replaces the lengths behind it by their running sums. Returns the last sum, or -1 if a length is
// negative.
static int64_t sum_lengths(int64_t* offsets, int64_t count) {
    offsets[0] = 0;
    for (int64_t l = 0; l < count; ++l) {
        if (offsets[l + 1] < 0) return -1;
        offsets[l + 1] += offsets[l];
    }
    return offsets[count];
}

int64_t rle_bounds(const View& words, int64_t height, int64_t width, const View& starts, int threads) {
    const int64_t P = height * width, n = words.size[1];
    parallel_for(words.size[0], 1 + (1 << 12) / (n + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t l = begin; l < end; ++l) {
            const int64_t runs = 1 + count_changes({words.as<const uint32_t>() + l * words.stride[0], n, height, width});
            // A number v takes at most 1 + |v| / 16 characters, and the sum of all |v| is at most 2 P.
            const int64_t few = rle_most_written * runs, many = runs + P / 8 + 1;
            starts.as<int64_t>()[l + 1] = (few < many ? few : many) + rle_slack;
        }
    });
    return sum_lengths(starts.as<int64_t>(), words.size[0]);
}

// out[0..count), 64-bit words <- the bits from `first` on. Bits behind the mask's last word are 0. Only whole vectors are
// written, so `out` has space for a multiple of W / 2 words.
SPROMPT_INLINE void read_row(const Pixels& m, int64_t first, int64_t count, uint64_t* out) {
    const int64_t i = first / 32;
    const int shift = static_cast<int>(first % 32);
    if (i + (2 * count + W - 1) / W * W < m.n) {
        for (int64_t j = 0; j < count; j += W / 2) {
            vu low, high;
            __builtin_memcpy(&low, m.words + i + 2 * j, sizeof low);
            __builtin_memcpy(&high, m.words + i + 2 * j + 1, sizeof high);
            low = low >> shift | (high << 1) << (31 - shift);
            __builtin_memcpy(out + j, &low, sizeof low);
        }
    } else {
        for (int64_t j = 0; j < count; ++j) out[j] = bits_at(m.words, m.n, first + 64 * j);
    }
}

// Transposes 64 x 64 bits: bit x of a[y] goes to bit y of a[x]. Off-diagonal halves of the matrix are exchanged, then halves of
// the halves, and so on.
template <int half>
SPROMPT_INLINE void swap_halves(uint64_t* a, uint64_t low) {
    for (int base = 0; base < 64; base += 2 * half)
        for (int k = base; k < base + half; ++k) {
            const uint64_t t = ((a[k] >> half) ^ a[k + half]) & low;
            a[k] ^= t << half;
            a[k + half] ^= t;
        }
}
static void transpose(uint64_t* a) {
    swap_halves<32>(a, 0x00000000ffffffffu);
    swap_halves<16>(a, 0x0000ffff0000ffffu);
    swap_halves<8>(a, 0x00ff00ff00ff00ffu);
    swap_halves<4>(a, 0x0f0f0f0f0f0f0f0fu);
    swap_halves<2>(a, 0x3333333333333333u);
    swap_halves<1>(a, 0x5555555555555555u);
}

// The differences of up to 1024 columns, as transposed blocks of 64 rows. Blocks without a change are left out.
struct Strip {
    uint64_t* blocks;      // (across, bands, 1 + columns): the number of the band, then one word per column
    int64_t count[strip];  // number of blocks for each 64 columns
    int64_t bands, columns;

    SPROMPT_INLINE uint64_t* block(int64_t j, int64_t k) const { return blocks + (j * bands + k) * (1 + columns); }

    // Fills the blocks of columns [x, x + taken).
    SPROMPT_INLINE void fill(const Pixels& m, int64_t x, int64_t taken) {
        const int64_t across = (taken + 63) / 64;
        uint64_t rows[64][strip], above[strip], any[strip];
        for (int64_t j = 0; j < across; ++j) {  // above row 0 is the last row, one column to the right
            const int64_t p = (m.height - 1) * m.width + x + 64 * j;
            above[j] = x + 64 * j > 0 ? bits_at(m.words, m.n, p - 1) : bits_at(m.words, m.n, p) << 1;
            count[j] = 0;
        }
        for (int64_t band = 0; band < bands; ++band) {
            const int64_t y0 = 64 * band, ny = m.height - y0 < 64 ? m.height - y0 : 64;
            for (int64_t y = 0; y < ny; ++y) read_row(m, (y0 + y) * m.width + x, across, rows[y]);
            for (int64_t j = 0; j < across; ++j) any[j] = rows[0][j] ^ above[j];
            for (int64_t y = 1; y < ny; ++y)
                for (int64_t j = 0; j < across; ++j) any[j] |= rows[y][j] ^ rows[y - 1][j];
            for (int64_t j = 0; j < across; ++j) {
                const int64_t some = taken - 64 * j < 64 ? taken - 64 * j : 64;
                if ((any[j] & low_bits(some)) == 0) continue;
                uint64_t square[64];
                square[0] = rows[0][j] ^ above[j];
                for (int64_t y = 1; y < ny; ++y) square[y] = rows[y][j] ^ rows[y - 1][j];
                for (int64_t y = ny; y < 64; ++y) square[y] = 0;
                transpose(square);
                uint64_t* out = block(j, count[j]++);
                out[0] = static_cast<uint64_t>(band);
                __builtin_memcpy(out + 1, square, 8 * some);
            }
            for (int64_t j = 0; j < across; ++j) above[j] = rows[ny - 1][j];
        }
    }
};

// Writes runs as characters.
struct RunWriter {
    uint8_t* out;
    int64_t last = 0;                     // place of the last change
    int64_t before = 0, before_that = 0;  // runs i - 1 and i - 2; zeros for i <= 2

    SPROMPT_INLINE void put(int64_t run) {
        int64_t v = run - before_that;
        before_that = before;
        before = run;
        while (v < -16 || v > 15) {
            *out++ = static_cast<uint8_t>(48 + 32 + (v & 31));
            v >>= 5;
        }
        *out++ = static_cast<uint8_t>(48 + (v & 31));
    }
    SPROMPT_INLINE void change_at(int64_t place) {
        put(place - last);
        last = place;
    }
};

// Returns the length, or -1 if it might not fit into `capacity` bytes.
static int64_t encode(const Pixels& m, uint64_t* scratch, uint8_t* out, int64_t capacity) {
    const uint8_t* const limit = out + capacity - rle_slack;
    if (capacity < rle_slack) return -1;
    RunWriter writer{out};
    bool first = true;
    Strip part;
    part.blocks = scratch;
    part.bands = (m.height + 63) / 64;
    part.columns = m.width < 64 ? m.width : 64;
    for (int64_t x = 0; x < m.width && m.height > 0; x += 64 * strip) {
        const int64_t taken = m.width - x < 64 * strip ? m.width - x : 64 * strip;
        part.fill(m, x, taken);
        for (int64_t j = 0; 64 * j < taken; ++j) {
            const int64_t some = taken - 64 * j < 64 ? taken - 64 * j : 64;
            for (int64_t column = 0; column < some; ++column)
                for (int64_t k = 0; k < part.count[j]; ++k) {
                    const uint64_t* block = part.block(j, k);
                    uint64_t w = block[1 + column];
                    if (w == 0) continue;
                    if (writer.out > limit) return -1;
                    const int64_t base = (x + 64 * j + column) * m.height + 64 * static_cast<int64_t>(block[0]);
                    if (first) {
                        writer.change_at(base + __builtin_ctzll(w));
                        writer.before = 0;  // run 2 is written as it is
                        first = false;
                        w &= w - 1;
                    }
                    for (; w != 0; w &= w - 1) writer.change_at(base + __builtin_ctzll(w));
                }
        }
    }
    writer.put(m.height * m.width - writer.last);  // inside the slack
    return writer.out - out;
}

int64_t rle_encode(const View& words, int64_t height, int64_t width, const View& starts, const View& buffer,
                   const View& offsets, int threads) {
    const int64_t *start = starts.as<const int64_t>(), n = words.size[1], scratch_words = rle_scratch(height, width);
    if (threads > words.size[0]) threads = static_cast<int>(words.size[0]);
    Scratch memory;
    uint64_t* scratch = memory.take<uint64_t>(threads, scratch_words);
    parallel_for(words.size[0], 1 + (1 << 10) / (n + 1), threads, [&](int64_t begin, int64_t end, int worker) {
        uint64_t* own = scratch + worker * scratch_words;
        for (int64_t l = begin; l < end; ++l) {
            const Pixels m{words.as<const uint32_t>() + l * words.stride[0], n, height, width};
            offsets.as<int64_t>()[l + 1] = encode(m, own, buffer.as<uint8_t>() + start[l], start[l + 1] - start[l]);
        }
    });
    return sum_lengths(offsets.as<int64_t>(), words.size[0]);
}

void rle_join(const View& buffer, const View& starts, const View& offsets, const View& bytes, int threads) {
    const int64_t *start = starts.as<const int64_t>(), *offset = offsets.as<const int64_t>();
    parallel_for(starts.size[0] - 1, 16, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t l = begin; l < end; ++l)
            __builtin_memcpy(bytes.as<uint8_t>() + offset[l], buffer.as<const uint8_t>() + start[l],
                             static_cast<size_t>(offset[l + 1] - offset[l]));
    });
}

// ---- decoding

// Reads one number and moves `place` behind it. Returns its fault. The sign is extended by shifts, because branches on it are
// not predictable.
SPROMPT_INLINE RleFault read_number(const uint8_t* text, int64_t length, int64_t& place, int64_t& number) {
    uint64_t v = 0;
    for (int k = 0; k < rle_most_read; ++k) {
        if (place == length) return rle_truncated;
        const uint32_t c = static_cast<uint32_t>(text[place]) - 48;
        if (c > 63) return rle_bad_character;
        ++place;
        v |= static_cast<uint64_t>(c & 31) << (5 * k);
        if ((c & 32) != 0) continue;
        const int unused = 64 - 5 * (k + 1);
        number = static_cast<int64_t>(v << unused) >> unused;
        return rle_fine;
    }
    return rle_too_long;
}

SPROMPT_INLINE void flip_bit(uint32_t* words, int64_t p) { words[p / 32] ^= uint32_t{1} << (p % 32); }
static void set_bits(uint32_t* words, int64_t first, int64_t count) {
    for (int64_t p = first; p < first + count;) {
        const int64_t k = 32 - p % 32 < first + count - p ? 32 - p % 32 : first + count - p;
        words[p / 32] |= static_cast<uint32_t>(low_bits(k)) << (p % 32);
        p += k;
    }
}

// Fills `words`, which must be 0. Row 0 is row 0 of the mask. The rows below it are the differences to the row above.
static void read_runs(const uint8_t* text, int64_t length, int64_t height, int64_t width, uint32_t* words, int64_t* fault) {
    const int64_t P = height * width;
    int64_t x = 0, y = 0, rest = P;
    int64_t before = 0, before_that = 0, place = 0, i = 0;
    const auto fail = [&](RleFault kind, int64_t where, int64_t value) {
        fault[0] = kind;
        fault[1] = where;
        fault[2] = value;
    };
    fail(rle_fine, 0, 0);
    for (; place < length; ++i) {
        const int64_t begin = place;
        int64_t number = 0;
        const RleFault kind = read_number(text, length, place, number);
        if (kind == rle_bad_character) return fail(kind, place, text[place]);
        if (kind != rle_fine) return fail(kind, begin, 0);
        const int64_t run = number + before_that;
        if (run < 0) return fail(rle_negative, i, run);
        if (run > rest) return fail(rle_too_many, i, run);
        before_that = before;
        before = i == 0 ? 0 : run;
        const bool on = i % 2 == 1;
        if (i > 0 && y > 0) flip_bit(words, y * width + x);  // at an empty run it flips twice, which changes nothing
        if (run == 0) continue;
        rest -= run;
        if (y == 0 && on) set_bits(words, x, 1);
        y += run;
        if (y < height) continue;
        y -= height;
        ++x;
        int64_t columns = 0;  // whole ones
        if (y >= height) {
            columns = y / height;
            y -= columns * height;
        }
        if (on) set_bits(words, x, columns + (y > 0 ? 1 : 0));
        x += columns;
    }
    if (rest > 0) fail(rle_too_few, i, P - rest);
}

// sum_rows for rows of less than 64 pixels. Takes 64 pixels at a time: a pixel is the sum of the pixels above it in the same
// word, and of the last pixel of its column before this word.
static void sum_narrow_rows(uint32_t* words, int64_t n, int64_t width) {
    uint64_t last = 0;  // the last row's worth of pixels before this word
    for (int64_t i = 0; i < n; i += 2) {
        uint64_t v = i + 1 < n ? load64(words + i) : words[i];
        for (int64_t s = width; s < 64; s *= 2) v ^= v << s;
        for (int64_t s = width; s < 64; s *= 2) last |= last << s;
        v ^= last;
        words[i] = static_cast<uint32_t>(v);
        if (i + 1 < n) words[i + 1] = static_cast<uint32_t>(v >> 32);
        last = v >> (64 - width);
    }
}

// words ^= words moved by `width` bits, in order, so that differences become pixels.
static void sum_rows(uint32_t* words, int64_t n, int64_t height, int64_t width) {
    if (height < 2) return;
    const int64_t back = width / 32, P = height * width;
    const int shift = static_cast<int>(width % 32);
    int64_t i = back + 1;
    if (width < 64) {
        sum_narrow_rows(words, n, width);
        i = n;
    } else {
        words[back] ^= words[0] << shift;
    }
    if (back >= W) {  // a vector reads only words before it
        for (; i + W <= n; i += W) {
            vu v, low, high;
            __builtin_memcpy(&v, words + i, sizeof v);
            __builtin_memcpy(&high, words + i - back, sizeof high);
            __builtin_memcpy(&low, words + i - back - 1, sizeof low);
            v ^= high << shift | (low >> 1) >> (31 - shift);
            __builtin_memcpy(words + i, &v, sizeof v);
        }
    }
    for (; i < n; ++i) words[i] ^= words[i - back] << shift | (words[i - back - 1] >> 1) >> (31 - shift);
    if (P % 32 != 0) words[n - 1] &= static_cast<uint32_t>(low_bits(P % 32));
}

void rle_decode(const View& bytes, const View& offsets, int64_t height, int64_t width, const View& words, const View& faults,
                int threads) {
    const int64_t* offset = offsets.as<const int64_t>();
    const int64_t size = bytes.size[0], n = words.size[1], P = rle_pixels(height, width);
    parallel_for(words.size[0], 1 + (1 << 10) / (n + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t l = begin; l < end; ++l) {
            int64_t* fault = faults.as<int64_t>() + 3 * l;
            const bool inside = offset[l] >= 0 && offset[l] <= offset[l + 1] && offset[l + 1] <= size;
            if (P < 0 || n != words_for(P) || !inside) {
                fault[0] = inside ? rle_bad_size : rle_bad_offsets;
                fault[1] = fault[2] = 0;
                continue;
            }
            uint32_t* out = words.as<uint32_t>() + l * words.stride[0];
            if (n > 0) __builtin_memset(out, 0, static_cast<size_t>(4 * n));
            read_runs(bytes.as<const uint8_t>() + offset[l], offset[l + 1] - offset[l], height, width, out, fault);
            if (fault[0] == rle_fine) sum_rows(out, n, height, width);
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
