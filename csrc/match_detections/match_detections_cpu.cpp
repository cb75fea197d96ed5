// Few targets reach the lowest threshold, so they are collected once for each detection; the thresholds look at these only.
#include "match_detections/match_detections.h"

#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {

// A target that reaches the lowest threshold.
struct Candidate {
    double iou;
    int64_t target;
};

// The least IoU of a match at threshold t. It is NaN where t is NaN.
SPROMPT_INLINE double least(double t) {
    const double most = 1.0 - 1e-10;
    return t > most ? most : t;
}

SPROMPT_INLINE bool marked(const View& flags, int64_t b, int64_t g) {
    return flags.given() && flags.as<const bool>()[b * flags.stride[0] + g * flags.stride[1]];
}

}  // namespace

void match_detections(const View& iou, const View& thresholds, const View& ignored, const View& crowd, const View& match,
                      int threads) {
    const int64_t B = iou.size[0], D = iou.size[1], G = iou.size[2], T = thresholds.size[0];
    const double* levels = thresholds.as<const double>();
    double lowest = __builtin_inf();
    for (int64_t t = 0; t < T; ++t)
        if (least(levels[t * thresholds.stride[0]]) < lowest) lowest = least(levels[t * thresholds.stride[0]]);

    enum : uint8_t { ignores = 1, crowded = 2 };
    Scratch memory;
    Candidate* const all_candidates = memory.take<Candidate>(threads, G + 1);  // one more: its last store is behind the last
    uint8_t* const all_kinds = memory.take<uint8_t>(threads, G);
    bool* const all_taken = memory.take<bool>(threads, T, G);
    const int64_t grain = 1 + (1 << 16) / (D * (G + 8 * T) + 1);
    parallel_for(B, grain, threads, [&](int64_t begin, int64_t end, int worker) {
        Candidate* const candidates = all_candidates + worker * (G + 1);
        uint8_t* const kinds = all_kinds + worker * G;
        bool* const taken = all_taken + worker * T * G;
        for (int64_t b = begin; b < end; ++b) {
            for (int64_t g = 0; g < G; ++g) {
                const bool stays = marked(crowd, b, g);
                kinds[g] = static_cast<uint8_t>((stays || marked(ignored, b, g) ? ignores : 0) | (stays ? crowded : 0));
            }
            __builtin_memset(taken, 0, static_cast<size_t>(T * G));
            for (int64_t d = 0; d < D; ++d) {
                const double* row = iou.as<const double>() + b * iou.stride[0] + d * iou.stride[1];
                int64_t count = 0;
                for (int64_t g = 0; g < G; ++g) {
                    const double value = row[g * iou.stride[2]];
                    candidates[count] = {value, g};
                    count += value >= lowest;
                }
                for (int64_t t = 0; t < T; ++t) {
                    bool* const own = taken + t * G;
                    const double limit = least(levels[t * thresholds.stride[0]]);
                    double best[2] = {limit, limit};  // of real and of ignored targets
                    int64_t chosen[2] = {-1, -1};
                    for (int64_t k = 0; k < count; ++k) {
                        const auto [value, g] = candidates[k];
                        const int kind = kinds[g] & ignores;
                        if ((own[g] && !(kinds[g] & crowded)) || !(value >= best[kind])) continue;
                        best[kind] = value;
                        chosen[kind] = g;
                    }
                    const int64_t found = chosen[0] >= 0 ? chosen[0] : chosen[1];
                    if (found >= 0) own[found] = true;
                    match.as<int64_t>()[(b * T + t) * D + d] = found;
                }
            }
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
