// Memory that one call of a kernel needs on the CPU while it runs. A kernel takes all of it before it goes parallel:
//
//     Scratch memory;
//     float* sums = memory.take<float>(chunks, N, C);
//
// Parts are aligned to 64 bytes and hold anything: what another call left there, or NaN (0xff bytes) after poison_scratch(true)
// and in a build with SPROMPT_SANITIZE, where each is also a block of its own, so that AddressSanitizer sees its ends. The
// first megabyte of a call is kept by the thread for its next call, the rest comes from malloc and goes back with the Scratch.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace sprompt {

// A part for the calling thread, until scratch_give_back. Throws std::bad_alloc (MemoryError in Python), after giving all parts
// back, if there is not so much memory or if `bytes` is negative.
void* scratch_take(int64_t bytes);
void scratch_give_back();
// Whether new parts are filled with 0xff bytes. For tests.
void poison_scratch(bool on);

// At most one a thread at a time.
class Scratch {
  public:
    SPROMPT_INLINE Scratch() {}
    SPROMPT_INLINE ~Scratch() { scratch_give_back(); }
    Scratch(const Scratch&) = delete;

    // Room for the product of `sizes` elements. A product beyond int64 is as much memory as there never is.
    template <class T, class... Sizes>
    SPROMPT_INLINE T* take(Sizes... sizes) {
        int64_t bytes = sizeof(T);
        const bool fits = (... && !__builtin_mul_overflow(bytes, static_cast<int64_t>(sizes), &bytes));
        return static_cast<T*>(scratch_take(fits ? bytes : -1));
    }
};

}  // namespace sprompt
