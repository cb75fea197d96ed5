// The scheduler of tests/emulation/cuda.h: fibers, barriers, warp collectives, shared memory.
#include "emulation/cuda.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulation {

Place place;

namespace {

constexpr int warp_size = 32;
constexpr int most_warps = 32;
constexpr int64_t stack_bytes = 128 << 10;
constexpr int64_t shared_bytes = 227 << 10;  // per block on sm_90; sm_80 has 163 KB
constexpr int64_t guard_bytes = 64;
constexpr unsigned char guard = 0xa5;

#if defined(__x86_64__)
// Pushes the callee-saved registers on this stack, stores the stack pointer at `save`, and continues on the stack `load`.
extern "C" void sprompt_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl sprompt_switch
.hidden sprompt_switch
.type sprompt_switch,@function
sprompt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size sprompt_switch,.-sprompt_switch
)");

struct Context {
    void* top = nullptr;
    void start(unsigned char* stack, void (*entry)()) {
        // The switch "returns" to entry. The stack pointer is then 8 below a multiple of 16, as after a call.
        auto* at = reinterpret_cast<void**>(stack + stack_bytes - 16);
        *at = reinterpret_cast<void*>(entry);
        for (int i = 1; i <= 6; ++i) at[-i] = nullptr;
        top = at - 6;
    }
    void to(Context& other) { sprompt_switch(&top, other.top); }
};
#else
struct Context {
    ucontext_t registers;
    void start(unsigned char* stack, void (*entry)()) {
        getcontext(&registers);
        registers.uc_stack.ss_sp = stack;
        registers.uc_stack.ss_size = stack_bytes;
        registers.uc_link = nullptr;
        makecontext(&registers, entry, 0);
    }
    void to(Context& other) { swapcontext(&registers, &other.registers); }
};
#endif

struct Fiber {
    Context context;
    Wait wait = Wait::none;
    const char* kind = nullptr;
    unsigned mask = 0;
    uint64_t brought = 0;
    uint64_t seen[warp_size] = {};
};

struct Random {
    uint64_t state;
    uint64_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        return state ^= state << 17;
    }
    int below(int64_t n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
};

uint64_t seed() {
    const char* asked = std::getenv("SPROMPT_EMULATION_SEED");
    return 0x9e3779b97f4a7c15u * (1 + (asked ? std::strtoull(asked, nullptr, 10) : 0));
}

struct Block {
    std::vector<Fiber> fibers;
    std::vector<int> ready[most_warps];  // threads that can go on, by warp
    int warps = 0;
    int order[most_warps];  // of the warps, anew after every barrier
    bool eager = false;     // the first warp of the order runs until it waits; otherwise any thread may be next
    Context scheduler;
    int running = -1;
    int64_t sum = 0;
    std::string fault;
    Random random{seed()};
    unsigned char* stacks = nullptr;
    int64_t stack_count = 0;
    std::vector<unsigned char> memory = std::vector<unsigned char>(shared_bytes + 64 * guard_bytes);
    int64_t used = 0, dynamic = 0;
    std::unordered_map<const void*, std::pair<int64_t, int64_t>> sites;  // offset, bytes
    const std::function<void()>* kernel = nullptr;

    void wake(int thread) {
        fibers[thread].wait = Wait::none;
        ready[thread / warp_size].push_back(thread);
    }
    // In half of the draws the threads advance evenly. In the other half one warp runs ahead of all others as far as it can.
    // The first order finds threads that overtake others wrongly; the second finds missing barriers.
    void draw_order() {
        eager = random.below(2) == 0;
        for (int i = 0; i < warps; ++i) order[i] = i;
        for (int i = warps - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    }
    // Takes a thread that can run from its list and returns it; -1 if no thread can run.
    int next() {
        const int first = eager ? 0 : random.below(warps);
        for (int i = 0; i < warps; ++i) {
            std::vector<int>& list = ready[order[(first + i) % warps]];
            if (list.empty()) continue;
            const int pick = random.below(static_cast<int64_t>(list.size()));
            const int thread = list[pick];
            list[pick] = list.back();
            list.pop_back();
            return thread;
        }
        return -1;
    }

    void fail(const std::string& what) {
        if (fault.empty())
            fault = "block " + std::to_string(place.block.x) + ", thread " + std::to_string(running) + ": " + what;
    }
};

Block block;
std::mutex one_launch;

[[noreturn]] void leave_for_good() {
    block.fibers[block.running].context.to(block.scheduler);
    std::abort();
}

void enter() {
    try {
        (*block.kernel)();
    } catch (const std::exception& error) {
        block.fail(error.what());
    }
    block.fibers[block.running].wait = Wait::done;
    leave_for_good();
}

void wait_here(Wait wait, const char* kind) {
    Fiber& me = block.fibers[block.running];
    me.wait = wait;
    me.kind = kind;
    me.context.to(block.scheduler);
    if (!block.fault.empty()) leave_for_good();
}

void reset_shared(int64_t dynamic) {
    block.sites.clear();
    block.used = block.dynamic = 0;
    if (dynamic > 0) shared(&block.dynamic, dynamic);
}

void check_shared() {
    for (const auto& [site, extent] : block.sites)
        for (int64_t i = 0; i < guard_bytes; ++i)
            if (block.memory[extent.first + extent.second + i] != guard) {
                block.fail("the kernel wrote behind the end of a shared array of " + std::to_string(extent.second) + " bytes");
                return;
            }
}

// Lanes that wait at a collective continue once every lane of its mask waits there.
void settle_warp(int first) {
    const int lanes = std::min<int>(warp_size, static_cast<int>(block.fibers.size()) - first);
    Fiber* warp = &block.fibers[first];
    for (int leader = 0; leader < lanes; ++leader) {
        Fiber& it = warp[leader];
        if (it.wait != Wait::warp) continue;
        bool complete = true;
        for (int i = 0; i < warp_size; ++i) {
            if (!(it.mask >> i & 1)) continue;
            if (i >= lanes || warp[i].wait == Wait::done) {
                block.running = first + leader;
                return block.fail(std::string(it.kind) + " names lane " + std::to_string(i) +
                                  ", which does not exist or has ended");
            }
            complete &= warp[i].wait == Wait::warp && warp[i].mask == it.mask && std::strcmp(warp[i].kind, it.kind) == 0;
        }
        if (!complete) continue;
        uint64_t values[warp_size];
        for (int i = 0; i < warp_size; ++i) values[i] = it.mask >> i & 1 ? warp[i].brought : block.random.next();
        const unsigned mask = it.mask;
        for (int i = 0; i < warp_size; ++i) {
            if (!(mask >> i & 1)) continue;
            std::memcpy(warp[i].seen, values, sizeof values);
            block.wake(first + i);
        }
    }
}

// Called when no fiber can run. Then all fibers that have not ended must wait at the same block barrier; otherwise the kernel
// would hang.
void settle_block() {
    int64_t sum = 0;
    const char* kind = nullptr;
    for (size_t i = 0; i < block.fibers.size(); ++i) {
        const Fiber& it = block.fibers[i];
        if (it.wait == Wait::done) continue;
        block.running = static_cast<int>(i);
        if (it.wait == Wait::warp) return block.fail(std::string("waits at ") + it.kind + " for lanes that never reach it");
        if (kind && std::strcmp(kind, it.kind) != 0)
            return block.fail(std::string("waits at ") + it.kind + ", others at " + kind);
        kind = it.kind;
        sum += static_cast<int64_t>(it.brought);
    }
    block.sum = sum;
    for (size_t i = 0; i < block.fibers.size(); ++i)
        if (block.fibers[i].wait == Wait::block) block.wake(static_cast<int>(i));
    block.draw_order();
}

void run_block(int threads) {
    block.warps = (threads + warp_size - 1) / warp_size;
    block.draw_order();
    for (auto& list : block.ready) list.clear();
    for (int i = 0; i < threads; ++i) {
        block.fibers[i].context.start(block.stacks + i * stack_bytes, &enter);
        block.wake(i);
    }
    int left = threads;
    while (left > 0 && block.fault.empty()) {
        const int thread = block.next();
        if (thread < 0) {
            settle_block();
            continue;
        }
        block.running = thread;
        place.thread.x = static_cast<unsigned>(block.running);
        block.scheduler.to(block.fibers[block.running].context);
        const Wait wait = block.fibers[block.running].wait;
        left -= wait == Wait::done;
        if (wait == Wait::warp) settle_warp(block.running / warp_size * warp_size);
    }
    check_shared();
}

}  // namespace

int lane() { return static_cast<int>(place.thread.x % warp_size); }

void block_barrier(const char* kind, int64_t value) {
    block.fibers[block.running].brought = static_cast<uint64_t>(value);
    wait_here(Wait::block, kind);
}

int64_t block_sum() { return block.sum; }

const uint64_t* warp_collective(const char* kind, unsigned mask, uint64_t value) {
    Fiber& me = block.fibers[block.running];
    if (!(mask >> lane() & 1)) {
        block.fail(std::string(kind) + ": the calling lane is not in its mask");
        leave_for_good();
    }
    me.brought = value;
    me.mask = mask;
    wait_here(Wait::warp, kind);
    return me.seen;
}

void* shared(const void* site, int64_t bytes) {
    auto found = block.sites.find(site);
    if (found == block.sites.end()) {
        const int64_t offset = (block.used + 15) / 16 * 16;
        if (offset + bytes + guard_bytes > static_cast<int64_t>(block.memory.size())) {
            block.fail("the kernel uses more shared memory than a block has");
            leave_for_good();
        }
        for (int64_t i = 0; i < bytes; ++i) block.memory[offset + i] = static_cast<unsigned char>(block.random.next() >> 11);
        std::memset(&block.memory[offset + bytes], guard, guard_bytes);
        block.used = offset + bytes + guard_bytes;
        found = block.sites.emplace(site, std::make_pair(offset, bytes)).first;
    }
    return &block.memory[found->second.first];
}

void* dynamic_shared() { return shared(&block.dynamic, 0); }

void launch(int64_t blocks, int threads, int64_t shared_size, const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> hold(one_launch);
    if (blocks <= 0) return;
    if (threads < 1 || threads > 1024) throw std::runtime_error("emulated CUDA: a block must have 1 to 1024 threads");
    if (block.stack_count < threads) {
        if (block.stacks) munmap(block.stacks, static_cast<size_t>(block.stack_count * stack_bytes));
        void* memory = mmap(nullptr, static_cast<size_t>(threads * stack_bytes), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
        block.stacks = static_cast<unsigned char*>(memory);
        block.stack_count = threads;
    }
    block.fibers.resize(static_cast<size_t>(threads));
    block.kernel = &kernel;
    block.fault.clear();
    place.threads = {static_cast<unsigned>(threads), 1, 1};
    place.blocks = {static_cast<unsigned>(blocks), 1, 1};
    // Blocks run in a random order: first + k * step, where step and the number of blocks have no common divisor.
    int64_t step = 1 + block.random.below(blocks);
    while (std::__gcd(step, blocks) != 1) step = step % blocks + 1;
    const int64_t first = block.random.below(blocks);
    for (int64_t k = 0; k < blocks && block.fault.empty(); ++k) {
        place.block.x = static_cast<unsigned>((first + k * step) % blocks);
        reset_shared(shared_size);
        run_block(threads);
    }
    if (!block.fault.empty()) throw std::runtime_error("emulated CUDA: " + block.fault);
}

}  // namespace emulation
