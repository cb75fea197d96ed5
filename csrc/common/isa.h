// Instruction sets. Every csrc/<op>/<op>_cpu.cpp is compiled once per level, with that level's compiler flags and with
// SPROMPT_ISA set to the level's name. Everything in such a file is in namespace sprompt::SPROMPT_ISA. The level is chosen once
// per process, when the module is imported (isa.cpp). So a binary never runs an instruction that the CPU does not have,
// wherever it was built.
//
// One rule keeps this sound: a kernel file includes no header that emits shared inline code (no <vector>, <algorithm>,
// <string>, <thread>). The linker keeps one copy of such code for the whole module, and that might be the AVX-512 copy.
// tests/test_build.py checks the object files.
#pragma once

#define SPROMPT_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define SPROMPT_X86 1
#define SPROMPT_LEVELS(X) X(portable) X(avx2) X(avx512)
#else
#define SPROMPT_LEVELS(X) X(portable)
#endif

// SPROMPT_KERNEL(name, parameters...) declares `void name(parameters...)` at every level. SPROMPT_KERNEL_OF(type, name, ...)
// declares a kernel that returns `type`, which is int64_t. Python sees both under their name: bindings.cpp includes every
// csrc/<op>/<op>.h and defines SPROMPT_BIND so that it binds them. Elsewhere SPROMPT_BIND is empty.
#define SPROMPT_BIND(name)
#define SPROMPT_KERNEL(name, ...) SPROMPT_KERNEL_OF(void, name, __VA_ARGS__)
#if SPROMPT_X86
#define SPROMPT_KERNEL_OF(type, name, ...) \
    namespace portable {                   \
    type name(__VA_ARGS__);                \
    }                                      \
    namespace avx2 {                       \
    type name(__VA_ARGS__);                \
    }                                      \
    namespace avx512 {                     \
    type name(__VA_ARGS__);                \
    }                                      \
    SPROMPT_BIND(name)
// SPROMPT_PICK(name) is the pointer to the kernel of the level in force.
#define SPROMPT_PICK(name)                                                     \
    (::sprompt::level() == ::sprompt::Level::avx512 ? &::sprompt::avx512::name \
     : ::sprompt::level() == ::sprompt::Level::avx2 ? &::sprompt::avx2::name   \
                                                    : &::sprompt::portable::name)
#else
#define SPROMPT_KERNEL_OF(type, name, ...) \
    namespace portable {                   \
    type name(__VA_ARGS__);                \
    }                                      \
    SPROMPT_BIND(name)
#define SPROMPT_PICK(name) (&::sprompt::portable::name)
#endif

namespace sprompt {

enum class Level { portable = 0, avx2 = 1, avx512 = 2 };

// The best level that this CPU has.
Level best_level();
// The level in force: SPROMPT_CPU if set, else best_level().
Level level();
const char* level_name(Level level);
// Reads SPROMPT_CPU. Returns null, or a message that says why the requested level cannot run.
const char* choose_level();

}  // namespace sprompt
