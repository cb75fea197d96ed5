// The shorter side's n items ("persons") are matched to the longer side's m items ("jobs"), n <= m. Potentials v[m] <= 0 are
// zero for free jobs. Every matched person has a job of least c[i][j] - v[j], which proves optimality.
//
// 1. Each person takes the job of least c - v. The job's v falls by the distance to the second best job, so that the job stays
//    the person's best. The job's previous owner takes the next turn (Jonker and Volgenant's augmenting row reduction, with a
//    bounded number of turns).
// 2. For each person who is left without a job, Dijkstra's algorithm over jobs finds the cheapest chain of changes that ends at
//    a free job.
#include "linear_assignment/linear_assignment.h"

#include "common/half.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {  // without it, member functions would be shared code (common/isa.h)

constexpr int D = W / 2;  // lanes of 64 bits
typedef double vd __attribute__((vector_size(8 * D)));
typedef int64_t vl __attribute__((vector_size(8 * D)));
constexpr double infinity = __builtin_inf();
// Up to this number of entries one thread is faster: it solves an image of 100 x 20 in a few microseconds.
constexpr int64_t small = 1 << 16;

SPROMPT_INLINE vd load(const double* p) {
    vd v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
SPROMPT_INLINE void store(double* p, vd v) { __builtin_memcpy(p, &v, sizeof v); }
SPROMPT_INLINE vd broadcast(double x) { return x - vd{}; }
SPROMPT_INLINE vd select(vl condition, vd yes, vd no) { return (vd)((condition & (vl)yes) | (~condition & (vl)no)); }
SPROMPT_INLINE vd lesser(vd a, vd b) { return a < b ? a : b; }  // one instruction
SPROMPT_INLINE vd greater(vd a, vd b) { return a > b ? a : b; }
// Bit k is set where lane k of a equals x.
SPROMPT_INLINE uint32_t bits_equal(vd a, vd x) {
#if defined(__AVX512F__)
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)x, _CMP_EQ_OQ);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)a, (__m256d)x, _CMP_EQ_OQ)));
#else
    uint32_t bits = 0;
    for (int k = 0; k < D; ++k) bits |= static_cast<uint32_t>(a[k] == x[k]) << k;
    return bits;
#endif
}
// The same for eight values.
SPROMPT_INLINE uint32_t eight_equal(const double* p, vd x) {
    uint32_t bits = 0;
    for (int k = 0; k < 8; k += D) bits |= bits_equal(load(p + k), x) << k;
    return bits;
}
SPROMPT_INLINE double least(vd v) {
    double low = v[0];
    for (int k = 1; k < D; ++k) low = v[k] < low ? v[k] : low;
    return low;
}
SPROMPT_INLINE double total(vd v) {
    double sum = v[0];
    for (int k = 1; k < D; ++k) sum += v[k];
    return sum;
}

SPROMPT_INLINE double to_double(double x) { return x; }
template <class T>
SPROMPT_INLINE double to_double(T x) {
    return static_cast<double>(to_float(x));
}

// The state of one image. Rows are `padded` >= m entries long, which is a whole number of vectors at every level.
struct Matcher {
    int64_t n, m, padded;
    double* cost;        // (n, padded), +inf behind column m
    double* v;           // (padded) potentials of the jobs
    double* open_v;      // (padded) v, but -inf for settled jobs: no path through a settled job is shorter
    double* distance;    // (padded) of unsettled jobs, +inf for the others
    double* settled_at;  // (padded) distance of the k-th settled job
    int64_t* before;     // (padded) the person from which the path reaches a job
    int32_t* person_of;  // (m) or -1
    int32_t* job_of;     // (n) or -1
    int32_t* settled;    // (m) jobs in the order in which they were settled
    int32_t* waiting;    // (n) persons left over by step 1

    SPROMPT_INLINE const double* row(int64_t i) const { return cost + i * padded; }

    // The first free job with values[job] == x. If no such job is free, the first job with that value.
    SPROMPT_INLINE int64_t pick(const double* values, double x) const {
        int64_t first = -1;
        const vd wanted = broadcast(x);
        for (int64_t j = 0; j < padded; j += 8)
            for (uint32_t bits = eight_equal(values + j, wanted); bits != 0; bits &= bits - 1) {
                const int64_t job = j + __builtin_ctz(bits);
                if (person_of[job] < 0) return job;
                if (first < 0) first = job;
            }
        return first;
    }

    // Step 1 for `person`. Returns the person who has no job afterwards: -1 (nobody), the job's previous owner, or `person`.
    // `again` says whether the returned person may take a turn at once, because the potential moved and the turn makes
    // progress.
    int64_t take_best(int64_t person, bool& again) {
        const double* c = row(person);
        vd low = broadcast(infinity), second = low;
        for (int64_t j = 0; j < padded; j += D) {
            const vd x = load(c + j) - load(v + j);
            store(distance + j, x);
            second = lesser(second, greater(low, x));
            low = lesser(low, x);
        }
        const double best = least(low);
        double next = least(second);
        bool one = false;  // the second best over all lanes is a lane's second best, or the best of another lane
        for (int k = 0; k < D; ++k) {
            if (low[k] == best && !one) {
                one = true;
            } else if (low[k] < next) {
                next = low[k];
            }
        }
        const int64_t job = pick(distance, best), other = person_of[job];
        again = false;
        if (other >= 0 && !(best < next)) return person;
        if (best < next && next < infinity) v[job] -= next - best;
        person_of[job] = static_cast<int32_t>(person);
        job_of[person] = static_cast<int32_t>(job);
        if (other >= 0) job_of[other] = -1;
        again = true;
        return other;
    }

    // Step 2 for `start`.
    void augment(int64_t start) {
        for (int64_t j = 0; j < padded; j += D) {
            store(open_v + j, load(v + j));
            store(distance + j, broadcast(infinity));
        }
        int64_t count = 0, person = start, job;
        double length = 0.0, shift = 0.0;  // shift: length of the path so far, less the reduced cost of its last pair
        for (;;) {
            const double* c = row(person);
            const vd offset = broadcast(shift);
            const vl from = person - vl{};
            vd low = broadcast(infinity);
            for (int64_t j = 0; j < padded; j += D) {
                const vd through = (load(c + j) - load(open_v + j)) + offset, old = load(distance + j);
                const vl shorter = through < old;
                const vd now = select(shorter, through, old);
                vl via;
                __builtin_memcpy(&via, before + j, sizeof via);
                via = (shorter & from) | (~shorter & via);
                __builtin_memcpy(before + j, &via, sizeof via);
                store(distance + j, now);
                low = lesser(low, now);
            }
            length = least(low);
            job = pick(distance, length);
            if (person_of[job] < 0) break;
            settled[count] = static_cast<int32_t>(job);
            settled_at[count++] = length;
            distance[job] = infinity;
            open_v[job] = -infinity;
            person = person_of[job];
            shift = length - (row(person)[job] - v[job]);
        }
        for (int64_t k = 0; k < count; ++k) v[settled[k]] += settled_at[k] - length;
        for (person = -1; person != start;) {
            person = before[job];
            person_of[job] = static_cast<int32_t>(person);
            const int64_t left = job_of[person];
            job_of[person] = static_cast<int32_t>(job);
            job = left;
        }
    }

    void solve() {
        for (int64_t j = 0; j < padded; ++j) {
            v[j] = 0.0;
            before[j] = -1;
            person_of[j] = -1;
        }
        for (int64_t i = 0; i < n; ++i) {
            job_of[i] = -1;
            waiting[i] = static_cast<int32_t>(i);
        }
        // Two passes. The number of turns is bounded, since a chain of turns among nearly equal costs can be long.
        int64_t left = n;
        for (int pass = 0; pass < 2 && left > 0; ++pass) {
            int64_t turns = 4 * left;
            const int64_t todo = left;
            left = 0;
            for (int64_t k = 0; k < todo; ++k) {
                int64_t person = waiting[k];
                bool again = true;
                while (person >= 0 && again && turns-- > 0) person = take_best(person, again);
                if (person >= 0) waiting[left++] = static_cast<int32_t>(person);
            }
        }
        for (int64_t k = 0; k < left; ++k) augment(waiting[k]);
    }
};

// Reads the costs of one image, columns [0, count), as double. The persons are its columns if `columns` is true, else its rows.
// Returns the largest absolute value, or NaN if an entry is not finite.
template <class T>
double read_costs(const T* cost, int64_t row_stride, int64_t column_stride, bool columns, const Matcher& match) {
    const int64_t of_person = columns ? column_stride : row_stride, of_job = columns ? row_stride : column_stride;
    constexpr int64_t tile = 16;  // jobs at a time, so that a transposed read uses whole cache lines
    for (int64_t j0 = 0; j0 < match.m; j0 += tile) {
        const int64_t last = j0 + tile < match.m ? j0 + tile : match.m;
        for (int64_t i = 0; i < match.n; ++i) {
            double* out = match.cost + i * match.padded;
            const T* in = cost + i * of_person;
            for (int64_t j = j0; j < last; ++j) out[j] = to_double(in[j * of_job]);
        }
    }
    vd largest{};
    vl poison{};  // x - x is 0 for a finite x, and NaN otherwise
    for (int64_t i = 0; i < match.n; ++i) {
        double* out = match.cost + i * match.padded;
        for (int64_t j = match.m; j < match.padded; ++j) out[j] = 0.0;
        for (int64_t j = 0; j < match.padded; j += D) {
            const vd x = load(out + j);
            poison |= (vl)(x - x);
            largest = greater((vd)((vl)x & INT64_MAX), largest);
        }
        for (int64_t j = match.m; j < match.padded; ++j) out[j] = infinity;
    }
    return -least(-largest) + total((vd)poison);
}

// Writes rows[0..count) of one image. If an entry is not finite, returns false and writes nothing.
template <class T>
bool match_image(const T* cost, int64_t N, int64_t count, int64_t row_stride, int64_t column_stride, double* scratch,
                 int64_t* rows) {
    const bool columns = count <= N;
    Matcher match;
    match.n = columns ? count : N;
    match.m = columns ? N : count;
    const int64_t padded = match.padded = (match.m + 7) / 8 * 8;
    match.cost = scratch;
    match.v = scratch + match.n * padded;
    match.open_v = match.v + padded;
    match.distance = match.open_v + padded;
    match.settled_at = match.distance + padded;
    match.before = reinterpret_cast<int64_t*>(match.settled_at + padded);
    match.person_of = reinterpret_cast<int32_t*>(match.before + padded);
    match.job_of = match.person_of + padded;
    match.settled = match.job_of + padded;
    match.waiting = match.settled + padded;

    const double largest = read_costs(cost, row_stride, column_stride, columns, match);
    if (largest != largest) return false;
    if (largest > 0x1p1000)  // only float64: sums would overflow; scaling by a power of two changes no comparison
        for (int64_t i = 0; i < match.n * padded; ++i) match.cost[i] *= 0x1p-40;
    match.solve();
    if (columns) {
        for (int64_t g = 0; g < count; ++g) rows[g] = match.job_of[g];
    } else {
        for (int64_t g = 0; g < count; ++g) rows[g] = match.person_of[g];
    }
    return true;
}

template <class T>
void match_images(const View& cost, const View& counts, const View& rows, int threads) {
    const int64_t N = cost.size[1], G = cost.size[2], n = N < G ? N : G, m = (N < G ? G : N) + 7;
    const int64_t scratch_doubles = (n + 7) * (m / 8 * 8);  // the costs, the longer side in whole vectors, and 7 rows
    if (cost.size[0] * N * G <= small) threads = 1;
    Scratch memory;
    double* scratch = memory.take<double>(threads, scratch_doubles);
    parallel_for(cost.size[0], 1, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t b = begin; b < end; ++b) {
            int64_t* out = rows.as<int64_t>() + b * G;
            const int64_t count = counts.given() ? counts.as<const int64_t>()[b * counts.stride[0]] : G;
            const bool good = count >= 0 && count <= G &&
                              match_image(cost.as<const T>() + b * cost.stride[0], N, count, cost.stride[1], cost.stride[2],
                                          scratch + worker * scratch_doubles, out);
            for (int64_t g = good ? count : 0; g < G; ++g) out[g] = good ? -1 : -2;
        }
    });
}

}  // namespace

// A view of cost (N, G) as (1, N, G).
static View with_batch(const View& cost) {
    View images = cost;
    images.rank = 3;
    images.size[0] = 1;
    images.stride[0] = 0;
    for (int i = 0; i < 2; ++i) {
        images.size[i + 1] = cost.size[i];
        images.stride[i + 1] = cost.stride[i];
    }
    return images;
}

int64_t linear_assignment(const View& given, const View& counts, const View& rows, int threads) {
    const View cost = given.rank == 2 ? with_batch(given) : given;
    if (cost.dtype == DType::f64) {
        match_images<double>(cost, counts, rows, threads);
    } else {
        SPROMPT_FLOAT_TYPES(cost.dtype, T, match_images<T>(cost, counts, rows, threads))
    }
    const int64_t G = cost.size[2];
    int64_t first = -1;
    for (int64_t b = cost.size[0] - 1; b >= 0; --b)
        if (G > 0 ? rows.as<const int64_t>()[b * G] == -2
                  : counts.given() && counts.as<const int64_t>()[b * counts.stride[0]] != 0)
            first = b;
    return first;
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
