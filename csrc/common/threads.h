// One way to run work on several threads. Work is cut into chunks of `grain` items; the cut depends on n and grain
// only, never on the number of threads, so a kernel that writes (or sums) per chunk gives the same bits on any number.
//
// The threads are those of the OpenMP runtime that torch has loaded, when it is found in the process: two pools would
// fight for the same cores, because the workers of each spin for a while after its last job. Otherwise a pool of our own.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace sprompt {

// Calls task(context, chunk, worker) once for every chunk in [0, chunks), from at most `threads` threads;
// worker is in [0, threads) and no two running calls share one. Tasks must not throw.
void run_chunks(int64_t chunks, int threads, void (*task)(void* context, int64_t chunk, int worker), void* context);

// "openmp" or "pool": whose threads run_chunks uses.
const char* thread_source();

}  // namespace sprompt

#if defined(SPROMPT_ISA)
namespace sprompt {
namespace SPROMPT_ISA {

// f(begin, end, worker) over [0, n) in chunks of at most `grain` items.
template <class F>
static SPROMPT_INLINE void parallel_for(int64_t n, int64_t grain, int threads, const F& f) {
    if (n <= 0) return;
    if (grain < 1) grain = 1;
    struct Job {
        const F* f;
        int64_t n, grain;
    } job{&f, n, grain};
    run_chunks((n + grain - 1) / grain, threads,
               [](void* context, int64_t chunk, int worker) {
                   const Job& job = *static_cast<const Job*>(context);
                   const int64_t begin = chunk * job.grain;
                   const int64_t end = begin + job.grain < job.n ? begin + job.grain : job.n;
                   (*job.f)(begin, end, worker);
               },
               &job);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
#endif
