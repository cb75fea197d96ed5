// COCO run lengths. A mask's pixels, column by column (q = x * height + y), are runs of 0, 1, 0, ...; only the first may have
// to be empty. Runs 0, 1 and 2 are written as they are, run i > 2 as its difference to run i - 2. A number is written in
// groups of 5 bits, the lowest first, in two's complement: a group is the character 48 + its bits, + 32 if another follows.
//
// L masks of height x width = P <= 2^31 - 1 pixels, n = ceil(P / 32) words each.
#pragma once

#include "common/cuda.h"

namespace sprompt {

// One run takes at most 7 characters (|run i - run i-2| < 2^31); 12 (60 bits) are read, so that nothing can overflow.
constexpr int64_t rle_most_pixels = 0x7fffffff, rle_most_written = 7, rle_most_read = 12;
// Bytes that rle_encode keeps free behind every string, so that it can ask for room once a word (64 runs, and the last).
constexpr int64_t rle_slack = 65 * rle_most_written;

// What is wrong with a string; behind it in `faults` stand a place and a value.
enum RleFault : int64_t {
    rle_fine = 0,
    rle_bad_character,  // place: of the character; value: the character
    rle_truncated,      // place: of the number that has no end
    rle_too_long,       // place: of the number that has more than rle_most_read characters
    rle_negative,       // place: index of the run; value: the run
    rle_too_many,       // place: index of the run that passes the last pixel
    rle_too_few,        // place: number of runs; value: their sum
    rle_bad_offsets,    // the string does not lie inside `bytes`
    rle_bad_size,       // height x width is out of range, or `words` has another size
};

// height * width, or -1 if a side is negative or more than rle_most_pixels, or the product is.
SPROMPT_INLINE int64_t rle_pixels(int64_t height, int64_t width) {
    if (height < 0 || width < 0 || height > rle_most_pixels || width > rle_most_pixels) return -1;
    return height * width <= rle_most_pixels ? height * width : -1;
}

// 64-bit words of memory that rle_encode takes for each of its threads: at most about twice the mask and 0.1 MB.
SPROMPT_INLINE int64_t rle_scratch(int64_t height, int64_t width) {
    const int64_t columns = width < 64 ? width : 64, across = width < 1024 ? (width + 63) / 64 : 16;
    return across * ((height + 63) / 64) * (1 + columns);
}

// starts (L + 1) i64 <- words (L, n): where each string surely has room, one behind the other, with rle_slack. Returns the
// last, the bytes of all.
SPROMPT_KERNEL_OF(int64_t, rle_bounds, const View& words, int64_t height, int64_t width, const View& starts, int threads)

// buffer (S) u8, offsets (L + 1) i64 <- words (L, n), starts (L + 1) i64: string l is written at starts[l] and must end, slack
// included, before starts[l + 1]; offsets are the sums of the lengths. Returns the last, or -1 where a string does not end
// there (the words changed after rle_bounds); then offsets mean nothing.
SPROMPT_KERNEL_OF(int64_t, rle_encode, const View& words, int64_t height, int64_t width, const View& starts, const View& buffer,
                  const View& offsets, int threads)

// bytes (offsets[L]) u8 <- buffer (S) u8, starts (L + 1) i64, offsets (L + 1) i64: the strings without the gaps.
SPROMPT_KERNEL(rle_join, const View& buffer, const View& starts, const View& offsets, const View& bytes, int threads)

// words (L, n), faults (L, 3) i64 <- bytes (S) u8, offsets (L + 1) i64. Any bytes and offsets are safe; words of a mask that
// has a fault mean nothing.
SPROMPT_KERNEL(rle_decode, const View& bytes, const View& offsets, int64_t height, int64_t width, const View& words,
               const View& faults, int threads)

// -- CUDA: measuring, then writing. Between the two the caller sums lengths and allocates the characters, of which only the
// device knows the number. All tensors are contiguous. strips = ceil(width / 32) and groups = ceil(height / 1024), or 1 and 0
// if there are no pixels. There is no rle_decode: its strings come from Python objects, and its masks stay on the CPU.

// lengths (L) i64 <- words (L, n). used (L, strips, groups) i32: zeros. contexts (L, strips + 1, 4) i32 and starts (L, strips)
// i64: scratch. The three are what rle_write needs.
SPROMPT_CUDA_KERNEL(rle_measure, const View& words, int64_t height, int64_t width, const View& used, const View& contexts,
                    const View& starts, const View& lengths)

// characters (S) u8 <- words (L, n), offsets (L + 1) i64: the sums of lengths, S = offsets[L]. Nothing is written outside of
// characters, even if words are not those that were measured.
SPROMPT_CUDA_KERNEL(rle_write, const View& words, int64_t height, int64_t width, const View& used, const View& contexts,
                    const View& starts, const View& offsets, const View& characters)

}  // namespace sprompt
