// Matrix suppression takes panels of columns. Most often a single panel holds all columns. count_kernel writes the counts of
// the pairs within the panel. It also finishes pairs with rows before the panel, because c of these rows is known. decay_kernel
// finishes the pairs within the panel.
#include "mask_nms/tiles.cuh"

namespace sprompt {
namespace cuda {
namespace {

__device__ inline double iou_of(uint32_t common, uint32_t a, uint32_t b) {
    return static_cast<double>(common) / static_cast<double>(static_cast<int64_t>(a) + b - common);
}

// The value of a pair for the decay of its second mask. gaussian: iou^2 - c^2, and the largest value decides; otherwise (1 -
// iou) / (1 - c), and the least value decides. c belongs to the pair's first mask.
template <bool gaussian>
__device__ inline double ratio_of(double iou, double c) {
    if (gaussian) return iou * iou - c * c;
    const double rest = 1.0 - c;
    return (1.0 - iou) / (rest > 1e-6 ? rest : 1e-6);
}
template <bool gaussian>
__device__ inline double stronger(double a, double b) {
    return gaussian == (a > b) ? a : b;
}
template <bool gaussian>
constexpr double no_decay = gaussian ? 0.0 : 1.0;

// Numbers >= 0 have the same order as their bits, so the atomics below can compare integers and give the same result in any
// order.
__device__ inline void raise(uint64_t* at, double x) {
    atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(__double_as_longlong(x)));
}
__device__ inline void lower(uint64_t* at, double x) {
    atomicMin(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(__double_as_longlong(x)));
}
template <bool gaussian>
__device__ inline void apply(uint64_t* decay, double ratio) {
    if (gaussian) {
        if (ratio > 0.0) raise(decay, ratio);
    } else if (ratio < 1.0) {
        lower(decay, ratio);
    }
}

// Merges the strongest ratio of 8 rows, for each of 32 columns, into decay[0..columns). shared (8 * 32).
template <bool gaussian>
__device__ inline void merge(double ratio, double* shared, uint64_t* decay, int64_t columns) {
    shared[threadIdx.x] = ratio;
    __syncthreads();
    if (threadIdx.x < side && static_cast<int64_t>(threadIdx.x) < columns) {
        for (int i = 1; i < warps; ++i) ratio = stronger<gaussian>(ratio, shared[i * side + threadIdx.x]);
        apply<gaussian>(decay + threadIdx.x, ratio);
    }
}

// Compares rows [0, end) with columns [begin, end); both are places in the order. Every pair updates c. For rows before `begin`
// c is complete, so their pairs update the decay at once. The counts of the other pairs go to pairs (B, S, S), as 0 for pairs
// that do not count.
template <class Count, bool gaussian>
__global__ void __launch_bounds__(threads)
    count_kernel(Masks m, const int64_t* labels, int64_t label_row, int64_t label_step, int64_t begin, int64_t tile_rows,
                 int64_t tile_columns, uint64_t* c, uint64_t* decay, Count* pairs, int64_t S) {
    SPROMPT_SHARED(const uint32_t*, source, 2 * side);
    SPROMPT_SHARED(uint32_t, area, 2 * side);
    SPROMPT_SHARED(int64_t, label, 2 * side);
    SPROMPT_SHARED(uint32_t, tile, 2 * side * pitch);
    SPROMPT_SHARED(double, best, threads);
    const int64_t image = blockIdx.x / (tile_rows * tile_columns);
    const int64_t first_row = blockIdx.x / tile_columns % tile_rows * side;
    const int64_t first_column = begin + blockIdx.x % tile_columns * side;
    if (first_column < first_row) return;
    find_masks(m, image, first_row, first_column, source, area);
    if (threadIdx.x < 2 * side) {
        const int64_t place = threadIdx.x < side ? first_row + threadIdx.x : first_column + threadIdx.x - side;
        label[threadIdx.x] = labels && place < m.N ? labels[image * label_row + m.order[image * m.N + place] * label_step] : 0;
    }
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x) % side, own = static_cast<int>(threadIdx.x) / side;
    uint32_t common[each] = {};
    for_parts(source, tile, m.n, [&](int last) {
        const uint32_t *a = tile + own * pitch, *b = tile + (side + column) * pitch;
        for (int k = 0; k < last; k += 8) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint32_t word = b[k + i];
#pragma unroll
                for (int q = 0; q < each; ++q) common[q] += __popc(a[q * warps * pitch + k + i] & word);
            }
        }
    });
    const bool before = first_row < begin;  // both are multiples of 32
    double most = 0.0, ratio = no_decay<gaussian>;
#pragma unroll
    for (int q = 0; q < each; ++q) {
        const int row = own + q * warps;
        const bool counts = first_row + row < first_column + column && label[row] == label[side + column];
        if (!counts) common[q] = 0;
        const double iou = common[q] > 0 ? iou_of(common[q], area[row], area[side + column]) : 0.0;
        most = iou > most ? iou : most;
        if (!before) {
            pairs[(image * S + first_row - begin + row) * S + first_column - begin + column] = static_cast<Count>(common[q]);
        } else if (common[q] > 0) {
            const double known = __longlong_as_double(static_cast<long long>(c[image * m.N + first_row + row]));
            ratio = stronger<gaussian>(ratio, ratio_of<gaussian>(iou, known));
        }
    }
    best[threadIdx.x] = most;
    __syncthreads();
    if (threadIdx.x < side && first_column + threadIdx.x < m.N) {
        for (int i = 1; i < warps; ++i) most = best[i * side + threadIdx.x] > most ? best[i * side + threadIdx.x] : most;
        if (most > 0.0) raise(c + image * m.N + first_column + threadIdx.x, most);
    }
    __syncthreads();
    if (before) merge<gaussian>(ratio, best, decay + image * m.N + first_column, m.N - first_column);
}

// Pairs within the panel: 128 rows of 32 columns per block.
constexpr int stretch = 128;
template <class Count, bool gaussian>
__global__ void __launch_bounds__(threads)
    decay_kernel(const uint32_t* area, const uint64_t* c, uint64_t* decay, int64_t N, int64_t begin, int64_t end,
                 int64_t stretches, int64_t tile_columns, const Count* pairs, int64_t S) {
    SPROMPT_SHARED(double, shared, threads);
    const int64_t image = blockIdx.x / (stretches * tile_columns);
    const int64_t first_row = begin + blockIdx.x / tile_columns % stretches * stretch;
    const int64_t first_column = begin + blockIdx.x % tile_columns * side;
    if (first_column + side <= first_row) return;
    const int64_t j = first_column + threadIdx.x % side, at = image * N;
    const int64_t last = first_row + stretch < j ? first_row + stretch : j;  // rows are before their column
    double ratio = no_decay<gaussian>;
    if (j < end) {
        const uint32_t mine = area[at + j];
        for (int64_t i = first_row + threadIdx.x / side; i < last; i += warps) {
            const uint32_t common = pairs[(image * S + i - begin) * S + j - begin];
            if (common == 0) continue;
            const double known = __longlong_as_double(static_cast<long long>(c[at + i]));
            ratio = stronger<gaussian>(ratio, ratio_of<gaussian>(iou_of(common, area[at + i], mine), known));
        }
    }
    merge<gaussian>(ratio, shared, decay + at + first_column, end - first_column);
}

template <class T, bool gaussian>
__global__ void __launch_bounds__(threads)
    finish_kernel(const T* scores, int64_t score_row, int64_t score_step, const int64_t* counts, int64_t count_step,
                  const int64_t* order, const uint64_t* decay, int64_t N, int64_t total, double sigma,
                  T* out) {  // (B, N)
    const int64_t job = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
    if (job >= total) return;
    const int64_t image = job / N, i = order[job];
    float value = 0.0f;
    if (i < count_of(counts, count_step, image, N)) {
        const double strongest = __longlong_as_double(static_cast<long long>(decay[job]));
        const double factor = gaussian ? exp(-sigma * strongest) : strongest;
        value = static_cast<float>(static_cast<double>(to_float(scores[image * score_row + i * score_step])) * factor);
    }
    from_float(value, out + image * N + i);
}

template <class Count, bool gaussian>
void find_decay(const Stream& stream, const Masks& m, int64_t B, const View& labels, const View& area, uint64_t* c,
                uint64_t* decay, const View& pairs) {
    const int64_t S = pairs.size[1];
    for (int64_t begin = 0; begin < m.N; begin += S) {
        const int64_t end = begin + S < m.N ? begin + S : m.N;
        const int64_t rows = tiles(end, side), columns = tiles(end - begin, side), stretches = tiles(end - begin, stretch);
        launch(stream, count_kernel<Count, gaussian>, B * rows * columns, threads, 0, m, labels.as<const int64_t>(),
               labels.stride[0], labels.stride[1], begin, rows, columns, c, decay, pairs.as<Count>(), S);
        launch(stream, decay_kernel<Count, gaussian>, B * stretches * columns, threads, 0, area.as<const uint32_t>(), c, decay,
               m.N, begin, end, stretches, columns, pairs.as<const Count>(), S);
    }
}

template <class T, bool gaussian>
void decay_scores(const Stream& stream, const View& words, const View& scores, const View& labels, const View& counts,
                  double sigma, const View& out, const View& order, const View& area, const View& extremes, const View& pairs) {
    const int64_t B = words.size[0], N = words.size[1];
    uint64_t *c = extremes.as<uint64_t>(), *decay = c + B * N;
    find_order<T>(stream, words, scores, counts, order, area, c, decay, no_decay<gaussian>);
    const Masks m = masks_of(words, order, area);
    if (pairs.dtype == DType::i16)
        find_decay<uint16_t, gaussian>(stream, m, B, labels, area, c, decay, pairs);
    else
        find_decay<uint32_t, gaussian>(stream, m, B, labels, area, c, decay, pairs);
    launch(stream, finish_kernel<T, gaussian>, tiles(B * N, threads), threads, 0, scores.as<const T>(), scores.stride[0],
           scores.stride[1], counts.as<const int64_t>(), counts.stride[0], order.as<const int64_t>(), decay, N, B * N, sigma,
           out.as<T>());
}

}  // namespace

void matrix_nms(const Stream& stream, const View& words, const View& scores, const View& labels, const View& counts,
                bool gaussian, double sigma, const View& out, const View& order, const View& area, const View& extremes,
                const View& pairs) {
    check_size(words.size[2]);
    SPROMPT_DEVICE_FLOATS(scores.dtype, T, {
        if (gaussian)
            decay_scores<T, true>(stream, words, scores, labels, counts, sigma, out, order, area, extremes, pairs);
        else
            decay_scores<T, false>(stream, words, scores, labels, counts, sigma, out, order, area, extremes, pairs);
    });
}

}  // namespace cuda
}  // namespace sprompt
