// Runs work on several threads. Work is cut into chunks of `grain` items. The cut depends only on n and grain, never on the
// number of threads. So a kernel that writes or sums per chunk gives the same bits with any number of threads.
//
// If torch has loaded an OpenMP runtime into the process, the threads are those of this runtime. Two pools would compete for
// the same cores, because the workers of each pool spin for a while after its last job. Without such a runtime the threads come
// from a pool of our own.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace sprompt {

// Calls task(context, chunk, worker) once for every chunk in [0, chunks), from at most `threads` threads. `worker` is in [0,
// threads), and no two running calls have the same worker. Tasks must not throw.
void run_chunks(int64_t chunks, int threads, void (*task)(void* context, int64_t chunk, int worker), void* context);

// Where run_chunks gets its threads: "openmp" or "pool".
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
