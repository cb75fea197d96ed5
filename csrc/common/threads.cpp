#include "common/threads.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#endif

namespace sprompt {
namespace {

struct Job {
    std::atomic<int64_t> next_chunk{0};
    std::atomic<int> next_worker{0};
    int64_t chunks;
    int threads;
    void (*task)(void*, int64_t, int);
    void* context;

    void work() {
        const int worker = next_worker.fetch_add(1);
        if (worker >= threads) return;
        for (int64_t chunk = next_chunk.fetch_add(1); chunk < chunks; chunk = next_chunk.fetch_add(1))
            task(context, chunk, worker);
    }
    static void entry(void* job) { static_cast<Job*>(job)->work(); }
};

// ---- torch's OpenMP runtime. GOMP_parallel(function, data, number of threads, flags) is a stable symbol of libgomp and of
// LLVM's libomp.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
int is_openmp(dl_phdr_info* info, size_t, void* found) {
    const char* file = std::strrchr(info->dlpi_name, '/');
    if (file == nullptr) return 0;
    if (std::strncmp(file, "/libgomp", 8) != 0 && std::strncmp(file, "/libomp", 7) != 0 &&
        std::strncmp(file, "/libiomp5", 9) != 0)
        return 0;
    // RTLD_NOLOAD opens the library only if the process has already loaded it. The handle is never closed, so the library stays
    // loaded.
    void* handle = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = handle == nullptr ? nullptr : dlsym(handle, "GOMP_parallel");
    if (symbol == nullptr) return 0;
    *static_cast<void**>(found) = symbol;
    return 1;
}
#endif

GompParallel find_openmp() {
    void* found = nullptr;
#if defined(__linux__)
    dl_iterate_phdr(is_openmp, &found);
#endif
    return reinterpret_cast<GompParallel>(found);
}

GompParallel openmp() {
    static const GompParallel function = find_openmp();
    return function;
}

// ---- Our own pool, for processes without that runtime. Workers start on first use and wait on a condition.
class Pool {
  public:
    // Returns false if another job is running. The caller then works alone.
    bool run(Job& job) {
        std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
        if (!owner.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(workers_.size()) < job.threads - 1)
                workers_.emplace_back([this, seen = generation_] { loop(seen); });
            job_ = &job;
            running_ = static_cast<int>(workers_.size());
            ++generation_;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        return true;
    }

  private:
    void loop(uint64_t seen) {
        for (;;) {
            Job* job;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_ != seen; });
                seen = generation_;
                job = job_;
            }
            job->work();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--running_ == 0) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Job* job_ = nullptr;
    int running_ = 0;
    uint64_t generation_ = 0;
};

// The pool is never destroyed, because its threads run until the process ends. A forked child gets a new pool, because the
// threads do not exist there.
Pool* pool_instance = nullptr;
Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool_instance = new Pool;
#if defined(__linux__)
        pthread_atfork(nullptr, nullptr, [] { pool_instance = new Pool; });
#endif
    });
    return *pool_instance;
}

}  // namespace

const char* thread_source() { return openmp() != nullptr ? "openmp" : "pool"; }

void run_chunks(int64_t chunks, int threads, void (*task)(void*, int64_t, int), void* context) {
    if (chunks <= 0) return;
    if (threads > chunks) threads = static_cast<int>(chunks);
    Job job;
    job.chunks = chunks;
    job.threads = threads < 1 ? 1 : threads;
    job.task = task;
    job.context = context;
    if (job.threads == 1) return job.work();
    if (const GompParallel parallel = openmp()) return parallel(Job::entry, &job, static_cast<unsigned>(job.threads), 0);
    if (!pool().run(job)) {
        job.threads = 1;
        job.work();
    }
}

}  // namespace sprompt
