#include "common/scratch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace sprompt {
namespace {

constexpr int64_t alignment = 64;
#ifdef SPROMPT_SANITIZE
constexpr int64_t kept_bytes = 0;
std::atomic<bool> poison{true};
#else
constexpr int64_t kept_bytes = 1 << 20;
std::atomic<bool> poison{false};
#endif

void* allocate(int64_t bytes) {
    void* block = nullptr;
    return posix_memalign(&block, alignment, static_cast<size_t>(bytes > 0 ? bytes : 1)) == 0 ? block : nullptr;
}

// The memory of one thread.
struct Held {
    char* kept = nullptr;  // kept_bytes of memory; the call has taken the first `used` bytes
    int64_t used = 0;
    std::vector<void*> blocks;  // the call's parts that did not fit into `kept`

    ~Held() {
        give_back();
        std::free(kept);
    }
    void give_back() {
        used = 0;
        for (void* block : blocks) std::free(block);
        blocks.clear();
    }
    void* take(int64_t bytes) {
        if (bytes <= kept_bytes - used && (kept != nullptr || (kept = static_cast<char*>(allocate(kept_bytes))) != nullptr)) {
            void* part = kept + used;
            used += (bytes + alignment - 1) / alignment * alignment;
            return part;
        }
        blocks.reserve(blocks.size() + 1);
        void* block = allocate(bytes);
        if (block == nullptr) throw std::bad_alloc();
        blocks.push_back(block);
        return block;
    }
};
thread_local Held held;

}  // namespace

// Kernels are compiled without exceptions. An exception that passes through a kernel does not run its destructors, so this
// function gives the memory back itself.
void* scratch_take(int64_t bytes) {
    try {
        if (bytes < 0) throw std::bad_alloc();
        void* part = held.take(bytes);
        if (poison.load(std::memory_order_relaxed)) std::memset(part, 0xff, static_cast<size_t>(bytes));
        return part;
    } catch (...) {
        held.give_back();
        throw;
    }
}

void scratch_give_back() { held.give_back(); }

void poison_scratch(bool on) { poison.store(on, std::memory_order_relaxed); }

}  // namespace sprompt
