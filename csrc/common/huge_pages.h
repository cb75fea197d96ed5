// Huge pages for large outputs.
#pragma once

#include <cstdint>

#include "common/isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sprompt {
namespace SPROMPT_ISA {

constexpr int64_t huge_page = 1 << 21;

// A buffer of this size is new memory from the system, which clears it one page at a time. 2 MB pages instead of 4 kB pages
// save most of that time. The call only advises the kernel, for the whole 2 MB pages inside the buffer. On another system than
// Linux, or if the kernel refuses, nothing changes.
static SPROMPT_INLINE bool ask_for_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = (at + huge_page - 1) / huge_page * huge_page, last = (at + bytes) / huge_page * huge_page;
    return bytes >= 2 * huge_page && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0;
#else
    return false;
#endif
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
