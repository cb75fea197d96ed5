// COCO run lengths. A mask's pixels, column by column (q = x * height + y), are runs of 0, 1, 0, ... Only the first run ever
// needs to be empty. Runs 0, 1 and 2 are written as they are. Run i > 2 is written as its difference to run i - 2. A number is
// written in two's complement, in groups of 5 bits, lowest first. A group is the character 48 + its bits, + 32 if another group
// follows.
//
// L masks of height x width = P <= 2^31 - 1 pixels, n = ceil(P / 32) words each.
#pragma once

#include "common/cuda.h"

namespace sprompt {

// One run takes at most 7 characters (|run i - run i-2| < 2^31). At most 12 characters (60 bits) are read, so nothing can
// overflow.
constexpr int64_t rle_most_pixels = 0x7fffffff, rle_most_written = 7, rle_most_read = 12;
// Bytes that rle_encode keeps free behind every string, so that it needs to check the limit only once per word (64 runs, and
// the last run).
constexpr int64_t rle_slack = 65 * rle_most_written;

// The fault of a string. In `faults` a place and a value follow it.
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

// height * width, or -1 if a side is negative, or if a side or the product is more than rle_most_pixels.
SPROMPT_INLINE int64_t rle_pixels(int64_t height, int64_t width) {
    if (height < 0 || width < 0 || height > rle_most_pixels || width > rle_most_pixels) return -1;
    return height * width <= rle_most_pixels ? height * width : -1;
}

// 64-bit words of memory that rle_encode takes for each of its threads: at most about twice the mask and 0.1 MB.
SPROMPT_INLINE int64_t rle_scratch(int64_t height, int64_t width) {
    const int64_t columns = width < 64 ? width : 64, across = width < 1024 ? (width + 63) / 64 : 16;
    return across * ((height + 63) / 64) * (1 + columns);
}

// starts (L + 1) i64 <- words (L, n): places in a buffer, one behind the other. String l with its rle_slack surely fits between
// starts[l] and starts[l + 1]. Returns the last place, which is the size of the buffer in bytes.
SPROMPT_KERNEL_OF(int64_t, rle_bounds, const View& words, int64_t height, int64_t width, const View& starts, int threads)

// buffer (S) u8, offsets (L + 1) i64 <- words (L, n), starts (L + 1) i64: string l is written at starts[l] and must end, slack
// included, before starts[l + 1]. offsets are the sums of the lengths. Returns the last offset. If a string does not end in
// time (the words changed after rle_bounds), returns -1, and offsets are undefined.
SPROMPT_KERNEL_OF(int64_t, rle_encode, const View& words, int64_t height, int64_t width, const View& starts, const View& buffer,
                  const View& offsets, int threads)

// bytes (offsets[L]) u8 <- buffer (S) u8, starts (L + 1) i64, offsets (L + 1) i64: the strings without the gaps.
SPROMPT_KERNEL(rle_join, const View& buffer, const View& starts, const View& offsets, const View& bytes, int threads)

// words (L, n), faults (L, 3) i64 <- bytes (S) u8, offsets (L + 1) i64. Any bytes and offsets are safe. The words of a mask
// with a fault are undefined.
SPROMPT_KERNEL(rle_decode, const View& bytes, const View& offsets, int64_t height, int64_t width, const View& words,
               const View& faults, int threads)

// -- CUDA: rle_measure, then rle_write. In between the caller sums the lengths and allocates the characters, because only the
// device knows their number. All tensors are contiguous. strips = ceil(width / 32) and groups = ceil(height / 1024), or 1 and 0
// if there are no pixels. There is no rle_decode: its strings come from Python objects, and its masks stay on the CPU.

// lengths (L) i64 <- words (L, n). used (L, strips, groups) i32 must be zeros. contexts (L, strips + 1, 4) i32 and starts (L,
// strips) i64 are scratch. rle_write needs all three.
SPROMPT_CUDA_KERNEL(rle_measure, const View& words, int64_t height, int64_t width, const View& used, const View& contexts,
                    const View& starts, const View& lengths)

// characters (S) u8 <- words (L, n), offsets (L + 1) i64. offsets are the sums of lengths, S = offsets[L]. Nothing is written
// outside of characters, even if the words changed since rle_measure.
SPROMPT_CUDA_KERNEL(rle_write, const View& words, int64_t height, int64_t width, const View& used, const View& contexts,
                    const View& starts, const View& offsets, const View& characters)

}  // namespace sprompt
