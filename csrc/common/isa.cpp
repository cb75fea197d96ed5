#include "common/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace sprompt {
namespace {
Level current = Level::portable;
}

const char* level_name(Level level) { return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "portable"; }

Level best_level() {
#if SPROMPT_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c") &&
                      __builtin_cpu_supports("lzcnt");
#if defined(SPROMPT_EMULATE_AVX512)
    return avx2 ? Level::avx512 : Level::portable;
#endif
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vpopcntdq") &&
                        __builtin_cpu_supports("avx512bf16");
    return avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::portable;
#else
    return Level::portable;
#endif
}

Level level() { return current; }

const char* choose_level() {
    static char message[256];
    const Level best = best_level();
    current = best;
    const char* asked = std::getenv("SPROMPT_CPU");
    if (asked == nullptr || *asked == '\0') return nullptr;
    for (const Level candidate : {Level::portable, Level::avx2, Level::avx512}) {
        if (std::strcmp(asked, level_name(candidate)) != 0) continue;
        if (candidate > best) {
            std::snprintf(message, sizeof message, "SPROMPT_CPU=%s: this CPU has at most %s; unset it or ask for that", asked,
                          level_name(best));
            return message;
        }
        current = candidate;
        return nullptr;
    }
    std::snprintf(message, sizeof message, "SPROMPT_CPU must be avx512, avx2 or portable, got %.40s", asked);
    return message;
}

}  // namespace sprompt
