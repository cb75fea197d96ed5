// One block per image. The shorter side's n items ("persons") are matched to the longer side's m items ("jobs"), n <= m.
// Potentials v[m] <= 0 are zero for free jobs. Every matched person has a job of least c[i][j] - v[j], which proves optimality.
// For one person after another, Dijkstra's algorithm over jobs finds the cheapest chain of changes that ends at a free job. The
// step from person i, who has job k, to job j costs (c[i][j] - v[j]) - (c[i][k] - v[k]) >= 0.
//
// Thread t owns jobs t, t + threads, ...: only this thread writes their potentials, distances and marks. Ties go to a free job,
// then to the lower index, so the result does not depend on the number of threads.
#include "linear_assignment/linear_assignment.h"

#include "common/device.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int most_threads = 512;
constexpr int64_t most_shared = 96 * 1024;  // bytes, on every architecture from sm_80 on

__device__ inline float stored(float x) { return x; }
__device__ inline float stored(bf16 x) { return to_float(x); }
__device__ inline float stored(f16 x) { return to_float(x); }
__device__ inline double stored(double x) { return x; }

// The type that holds T's values exactly.
template <class T>
struct Stored {
    using type = float;
};
template <>
struct Stored<double> {
    using type = double;
};

// A job that a path can reach. `length` is the length of the path, as ordered bits. `key` orders equal lengths: free jobs come
// before occupied jobs.
struct Reached {
    uint64_t length;
    uint32_t key;
};
constexpr uint32_t occupied = 0x80000000u;
constexpr uint64_t sign = uint64_t{1} << 63;

// ordered() maps finite numbers to integers in the same order, with -0 as 0. number() maps back.
__device__ inline uint64_t ordered(double x) {
    const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x + 0.0));
    return bits & sign ? ~bits : bits | sign;
}
__device__ inline double number(uint64_t x) { return __longlong_as_double(static_cast<long long>(x & sign ? x ^ sign : ~x)); }

__device__ inline bool nearer(const Reached& a, const Reached& b) {
    return a.length < b.length || (a.length == b.length && a.key < b.key);
}
__device__ inline Reached nearest_of_warp(const Reached& x) {
    const uint32_t mine = static_cast<uint32_t>(x.length >> 32), high = __reduce_min_sync(whole_warp, mine);
    const uint32_t rest = mine == high ? static_cast<uint32_t>(x.length) : 0xffffffffu;
    const uint32_t low = __reduce_min_sync(whole_warp, rest);
    const uint64_t length = static_cast<uint64_t>(high) << 32 | low;
    return {length, __reduce_min_sync(whole_warp, x.length == length ? x.key : 0xffffffffu)};
}

__host__ __device__ inline int64_t state_bytes(int64_t longer, int64_t shorter) {
    return (28 * longer + 4 * shorter + 15) / 16 * 16;
}

// The state of one image, n <= m.
struct State {
    double *v, *distance;  // (m) distance: for settled jobs the distance at which they were settled
    int32_t *before,       // (m) the person from which the path reaches a job
        *person_of,        // (m) or -1
        *mark,             // (m) the person whose search was the last to settle the job, or -1
        *job_of;           // (n) or -1
    __device__ State(unsigned char* at, int64_t longer) {
        v = reinterpret_cast<double*>(at);
        distance = v + longer;
        before = reinterpret_cast<int32_t*>(distance + longer);
        person_of = before + longer;
        mark = person_of + longer;
        job_of = mark + longer;
    }
};

// Copies the real entries to costs (n, m). Returns whether all are finite. Sets `huge` if one is beyond 2^1000.
template <class T, class S>
__device__ inline bool read_costs(const T* cost, int64_t row_stride, int64_t column_stride, int64_t N, int64_t count,
                                  bool columns, S* costs, bool* huge) {
    const int64_t step_row = blockDim.x / count, step_column = blockDim.x % count;
    int64_t row = threadIdx.x / count, column = threadIdx.x % count;
    bool bad = false, large = false;
    while (row < N) {
        constexpr int ahead = 4;  // reads in flight
        S x[ahead];
        int64_t to[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            const bool inside = row < N;
            x[i] = inside ? stored(cost[row * row_stride + column * column_stride]) : S{0};
            to[i] = !inside ? -1 : columns ? column * N + row : row * count + column;
            row += step_row;
            column += step_column;
            if (column >= count) {
                column -= count;
                ++row;
            }
        }
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            bad |= !(x[i] - x[i] == 0);
            if (sizeof(S) == 8) large |= x[i] > 0x1p1000 || x[i] < -0x1p1000;
            if (to[i] >= 0) costs[to[i]] = x[i];
        }
    }
    *huge = __syncthreads_or(large) != 0;
    return __syncthreads_or(bad) == 0;
}

template <class T>
__global__ void __launch_bounds__(most_threads)
    assignment_kernel(const T* cost, int64_t image_stride, int64_t row_stride, int64_t column_stride,  // (B, N, G)
                      const int64_t* counts, int64_t count_stride,                                     // (B) or null
                      int64_t N, int64_t G,
                      int64_t* rows,  // (B, G)
                      unsigned char* scratch, int64_t scratch_bytes, bool state_shared, bool costs_shared) {
    using S = typename Stored<T>::type;
    SPROMPT_SHARED_DYNAMIC(unsigned char, memory);
    SPROMPT_SHARED(uint64_t, lengths, 2 * most_threads / warp);
    SPROMPT_SHARED(uint32_t, keys, 2 * most_threads / warp);
    const int64_t image = blockIdx.x;
    int64_t* out = rows + image * G;
    const int64_t count = counts ? counts[image * count_stride] : G;
    if (count < 0 || count > G) {
        for (int64_t g = threadIdx.x; g < G; g += blockDim.x) out[g] = -2;
        return;
    }
    const bool columns = count < N;
    const int32_t n = static_cast<int32_t>(columns ? count : N), m = static_cast<int32_t>(columns ? N : count);
    const int64_t longer = N > G ? N : G, state_size = state_bytes(longer, N > G ? G : N);
    unsigned char* outside = scratch + image * scratch_bytes;
    const State s(state_shared ? memory : outside, longer);
    if (!state_shared) outside += state_size;
    S* const costs = reinterpret_cast<S*>(costs_shared ? memory + (state_shared ? state_size : 0) : outside);

    const int32_t thread = static_cast<int32_t>(threadIdx.x), threads = static_cast<int32_t>(blockDim.x);
    const int lane = thread % warp, own = thread / warp, warps = threads / warp;
    for (int32_t j = thread; j < m; j += threads) {
        s.v[j] = 0.0;
        s.person_of[j] = s.mark[j] = -1;
    }
    for (int32_t i = thread; i < n; i += threads) s.job_of[i] = -1;
    if (count > 0 && N > 0) {
        bool huge;
        if (!read_costs(cost + image * image_stride, row_stride, column_stride, N, count, columns, costs, &huge)) {
            for (int64_t g = threadIdx.x; g < G; g += blockDim.x) out[g] = -2;
            return;
        }
        if (huge) {  // sums would overflow; scaling by a power of two changes no comparison
            for (int64_t e = threadIdx.x; e < N * count; e += blockDim.x) costs[e] *= static_cast<S>(0x1p-40);
            __syncthreads();
        }
    }

    int turn = 0;  // which half of lengths and keys is in use: other threads may still read the other half
    for (int32_t start = 0; start < n; ++start) {
        int32_t person = start, job;
        double length = 0.0, here = 0.0;
        for (bool first = true;; first = false) {
            const S* c = costs + static_cast<int64_t>(person) * m;
            Reached best{~uint64_t{0}, 0xffffffffu};
            for (int32_t j = thread; j < m; j += threads) {
                if (s.mark[j] == start) continue;
                const double through = (static_cast<double>(c[j]) - s.v[j]) - here + length;
                double known = first ? through : s.distance[j];
                if (first || through < known) {
                    s.distance[j] = known = through;
                    s.before[j] = person;
                }
                const Reached x{ordered(known), static_cast<uint32_t>(j) | (s.person_of[j] < 0 ? 0 : occupied)};
                if (nearer(x, best)) best = x;
            }
            best = nearest_of_warp(best);
            if (warps > 1) {
                turn ^= 1;
                const int slot = turn * (most_threads / warp);
                if (lane == 0) {
                    lengths[slot + own] = best.length;
                    keys[slot + own] = best.key;
                }
                __syncthreads();
                best = nearest_of_warp({lengths[slot + lane % warps], keys[slot + lane % warps]});
            }
            job = static_cast<int32_t>(best.key & ~occupied);
            length = number(best.length);
            if (!(best.key & occupied)) break;
            if (job % threads == thread) s.mark[job] = start;
            person = s.person_of[job];
            here = static_cast<double>(costs[static_cast<int64_t>(person) * m + job]) - s.v[job];
        }
        __syncthreads();  // the code below reads values that other threads wrote
        for (int32_t j = thread; j < m; j += threads)
            if (s.mark[j] == start) s.v[j] += s.distance[j] - length;
        if (thread == 0) {
            do {
                person = s.before[job];
                s.person_of[job] = person;
                const int32_t left = s.job_of[person];
                s.job_of[person] = job;
                job = left;
            } while (person != start);
        }
        __syncthreads();
    }
    __syncthreads();
    for (int32_t g = thread; g < G; g += threads) out[g] = g >= count ? -1 : columns ? s.job_of[g] : s.person_of[g];
}

template <class T>
void match(const Stream& stream, const View& cost, const View& counts, const View& rows, const View& scratch) {
    const int64_t B = cost.size[0], N = cost.size[1], G = cost.size[2], longer = N > G ? N : G, shorter = N > G ? G : N;
    const int64_t state = state_bytes(longer, shorter), costs = static_cast<int64_t>(sizeof(typename Stored<T>::type)) * N * G;
    const int64_t given = scratch.size[1];
    const bool costs_shared = given < costs, state_shared = given < costs + state;
    int64_t shared = (state_shared ? state : 0) + (costs_shared ? costs : 0);
    // launch() asks for more than 48 KB only if the dynamic part is larger. The kernel also has static shared memory.
    if (shared > 47 * 1024 && shared <= 48 * 1024) shared = 48 * 1024 + 16;
    if (longer >= occupied || shared > most_shared) throw Failure("linear_assignment: too little scratch");
    const int64_t wanted = tiles(longer, warp) * warp;
    const int block = static_cast<int>(wanted < warp ? warp : wanted > most_threads ? most_threads : wanted);
    launch(stream, assignment_kernel<T>, G > 0 ? B : 0, block, shared, cost.as<const T>(), cost.stride[0], cost.stride[1],
           cost.stride[2], counts.as<const int64_t>(), counts.stride[0], N, G, rows.as<int64_t>(), scratch.as<unsigned char>(),
           given, state_shared, costs_shared);
}

}  // namespace

void linear_assignment(const Stream& stream, const View& cost, const View& counts, const View& rows, const View& scratch) {
    if (cost.dtype == DType::f64) return match<double>(stream, cost, counts, rows, scratch);
    SPROMPT_DEVICE_FLOATS(cost.dtype, T, match<T>(stream, cost, counts, rows, scratch));
}

}  // namespace cuda
}  // namespace sprompt
