// Scratch memory for one call of a CPU kernel. A kernel takes all of it before it starts its threads:
//
//     Scratch memory;
//     float* sums = memory.take<float>(chunks, N, C);
//
// Parts are aligned to 64 bytes and their content is undefined. After poison_scratch(true), and in a build with
// SPROMPT_SANITIZE, they are filled with 0xff bytes (NaN). With SPROMPT_SANITIZE each part is also a separate allocation, so
// that AddressSanitizer sees its ends. The thread keeps the first megabyte of a call for its next call. The rest comes from
// malloc and is freed with the Scratch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace sprompt {

// Returns a part that belongs to the calling thread until scratch_give_back. If there is not enough memory, or if `bytes` is
// negative, gives all parts back and throws std::bad_alloc (MemoryError in Python).
void* scratch_take(int64_t bytes);
void scratch_give_back();
// Whether new parts are filled with 0xff bytes. For tests.
void poison_scratch(bool on);

// A thread has at most one Scratch at a time.
class Scratch {
  public:
    SPROMPT_INLINE Scratch() {}
    SPROMPT_INLINE ~Scratch() { scratch_give_back(); }
    Scratch(const Scratch&) = delete;

    // Takes memory for as many elements as the product of `sizes`. A product beyond int64 throws std::bad_alloc as well.
    template <class T, class... Sizes>
    SPROMPT_INLINE T* take(Sizes... sizes) {
        int64_t bytes = sizeof(T);
        const bool fits = (... && !__builtin_mul_overflow(bytes, static_cast<int64_t>(sizes), &bytes));
        return static_cast<T*>(scratch_take(fits ? bytes : -1));
    }
};

}  // namespace sprompt
