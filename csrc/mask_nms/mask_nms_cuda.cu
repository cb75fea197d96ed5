// Greedy suppression takes the masks in order, one panel at a time. pairs_kernel writes, for each mask of the panel, which
// later masks it would remove. It counts only pairs of masks that are not removed yet and whose areas allow an IoU above the
// threshold. Then scan_kernel, with one block per image, keeps or removes the panel's masks one after the other.
#include "mask_nms/tiles.cuh"

namespace sprompt {
namespace cuda {
namespace {

constexpr int panel_words = 64;  // a panel has at most 32 * panel_words masks

// bits (B, R, W): bit j % 32 of word j / 32 of row i - begin is set where the mask at place i, begin <= i < end, would remove
// the mask at place j > i. Words before word i / 32 of a row are not written.
__global__ void __launch_bounds__(threads)
    pairs_kernel(Masks m, double threshold, int64_t begin, int64_t end, int64_t tile_rows, int64_t tile_columns,
                 const uint32_t* removed,             // (B, W) by the panels before
                 const int64_t* kept, int64_t limit,  // (B) so far
                 uint32_t* bits, int64_t R, int64_t W) {
    SPROMPT_SHARED(const uint32_t*, source, 2 * side);
    SPROMPT_SHARED(uint32_t, area, 2 * side);
    SPROMPT_SHARED(uint32_t, tile, 2 * side * pitch);
    SPROMPT_SHARED(uint16_t, open, side* side);  // row * 32 + column of the pairs to be counted
    SPROMPT_SHARED(int, found, 1);
    SPROMPT_SHARED(uint32_t, removes, side);
    const int64_t image = blockIdx.x / (tile_rows * tile_columns);
    const int64_t tile_row = blockIdx.x / tile_columns % tile_rows, tile_column = blockIdx.x % tile_columns;
    if (tile_column < tile_row) return;
    if (begin > 0 && kept[image] >= limit) return;
    const int64_t first_row = begin + tile_row * side, first_column = begin + tile_column * side;
    const int lane = static_cast<int>(threadIdx.x) % warp, own = static_cast<int>(threadIdx.x) / warp;
    const uint32_t gone_rows = begin > 0 ? removed[image * W + first_row / 32] : 0;
    const uint32_t gone_columns = begin > 0 ? removed[image * W + first_column / 32] : 0;
    uint32_t* const own_bits = bits + (image * R + first_row - begin + threadIdx.x) * W + first_column / 32;
    const bool has_bits = threadIdx.x < side && first_row + threadIdx.x < end;
    if (gone_rows == whole_warp || gone_columns == whole_warp) {  // no pair is left
        if (has_bits) *own_bits = 0;
        return;
    }
    find_masks(m, image, first_row, first_column, source, area);
    if (threadIdx.x < side) removes[threadIdx.x] = 0;
    if (threadIdx.x == 0) *found = 0;
    __syncthreads();
#pragma unroll
    for (int q = 0; q < each; ++q) {
        const int row = own + q * warps;
        const uint32_t a = area[row], b = area[side + lane], low = a < b ? a : b, high = a < b ? b : a;
        // The IoU is at most the quotient of the areas, and rounding keeps the order of quotients.
        const bool wanted = low > 0 && first_row + row < first_column + lane && !(gone_rows >> row & 1) &&
                            !(gone_columns >> lane & 1) && static_cast<double>(low) / static_cast<double>(high) > threshold;
        const unsigned votes = __ballot_sync(whole_warp, wanted);
        int place = 0;
        if (lane == 0 && votes != 0) place = atomicAdd(found, __popc(votes));
        place = __shfl_sync(whole_warp, place, 0) + __popc(votes & ((1u << lane) - 1));
        if (wanted) open[place] = static_cast<uint16_t>(row * side + lane);
    }
    __syncthreads();
    const int wanted = *found;
    if (wanted > 0) {
        int at_row[each], at_column[each];
        uint32_t common[each] = {};
#pragma unroll
        for (int q = 0; q < each; ++q) {
            const int at = static_cast<int>(threadIdx.x) + q * threads, pair = at < wanted ? open[at] : 0;
            at_row[q] = pair / side * pitch;
            at_column[q] = (side + pair % side) * pitch;
        }
        for_parts(source, tile, m.n, [&](int last) {
#pragma unroll
            for (int q = 0; q < each; ++q) {
                if (q * threads >= wanted) break;
                const uint32_t *a = tile + at_row[q], *b = tile + at_column[q];
                for (int k = 0; k < last; k += 8) {
#pragma unroll
                    for (int i = 0; i < 8; ++i) common[q] += __popc(a[k + i] & b[k + i]);
                }
            }
        });
#pragma unroll
        for (int q = 0; q < each; ++q) {
            const int at = static_cast<int>(threadIdx.x) + q * threads;
            if (at >= wanted) continue;
            const int row = open[at] / side, column = open[at] % side;
            const int64_t either = static_cast<int64_t>(area[row]) + area[side + column] - common[q];
            if (static_cast<double>(common[q]) / static_cast<double>(either) > threshold) atomicOr(&removes[row], 1u << column);
        }
        __syncthreads();
    }
    if (has_bits) *own_bits = removes[threadIdx.x];
}

// Visits places [begin, end) of an image, 32 at a time, with one warp per mask. Keeps the masks that are not removed, up to
// `limit` in all.
__global__ void __launch_bounds__(1024)
    scan_kernel(const int64_t* order, const uint32_t* area, int64_t N,           // (B, N)
                const uint32_t* bits, int64_t R, int64_t W,                      // (B, R, W)
                uint32_t* removed,                                               // (B, W): read and written
                int64_t begin, int64_t end,                                      // at most 32 * panel_words places
                int64_t* keep, int64_t limit, int64_t* kept_masks, bool last) {  // (B, limit), (B)
    SPROMPT_SHARED(uint32_t, gone, panel_words);
    SPROMPT_SHARED(uint32_t, diagonal, side);
    SPROMPT_SHARED(int, chosen, side* panel_words);  // rows of the panel that are kept
    const int64_t image = blockIdx.x;
    const int lane = static_cast<int>(threadIdx.x) % warp, own = static_cast<int>(threadIdx.x) / warp;
    const int groups = static_cast<int>((end - begin + 31) / 32), first_word = static_cast<int>(begin / 32);
    const uint32_t* rows = bits + image * R * W;
    uint32_t* out = removed + image * W;
    int64_t total = begin > 0 ? kept_masks[image] : 0;
    if (begin == 0 || total < limit) {
        for (int g = own; g < groups; g += warp) {  // empty masks are gone from the start
            const int64_t place = begin + g * 32 + lane;
            const unsigned dead = __ballot_sync(whole_warp, place >= end || area[image * N + place] == 0);
            if (lane == 0) gone[g] = dead | (begin > 0 ? out[first_word + g] : 0);
        }
        // Word w of the panel's row g * 32 + own, and 0 before word g.
        const auto word = [&](int g, int w) -> uint32_t {
            const int row = g * 32 + own;
            return w >= g && w < groups && begin + row < end ? rows[row * W + first_word + w] : 0;
        };
        uint32_t low = groups > 0 ? word(0, lane) : 0, high = groups > 0 ? word(0, lane + 32) : 0;
        int here = 0;  // kept masks of this panel
        for (int g = 0; g < groups && total < limit; ++g) {
            const uint32_t next_low = word(g + 1, lane), next_high = word(g + 1, lane + 32);
            if (lane == g % 32) diagonal[own] = g < 32 ? low : high;
            __syncthreads();
            uint32_t kept = 0;
            for (uint32_t left = ~gone[g]; left != 0;) {
                const int row = __ffs(static_cast<int>(left)) - 1;
                kept |= 1u << row;
                left &= ~(diagonal[row] | 1u << row);
            }
            if (kept >> own & 1) {
                if (lane > g && low != 0) atomicOr(&gone[lane], low);
                if (lane + 32 > g && high != 0) atomicOr(&gone[lane + 32], high);
                const int before = __popc(kept & ((1u << own) - 1));
                if (lane == 0) {
                    chosen[here + before] = g * 32 + own;
                    if (total + before < limit) keep[image * limit + total + before] = order[image * N + begin + g * 32 + own];
                }
            }
            total += __popc(kept);
            here += __popc(kept);
            low = next_low;
            high = next_high;
            __syncthreads();
        }
        if (total > limit) total = limit;
        // Marks the masks behind the panel that it removes, panel_words words at a time.
        for (int64_t start = end / 32; end < N && total < limit && start < W; start += panel_words) {
            if (threadIdx.x < panel_words) gone[threadIdx.x] = 0;
            __syncthreads();
            low = high = 0;
            for (int k = own; k < here; k += warp) {
                const uint32_t* row = rows + chosen[k] * W + start;
                if (start + lane < W) low |= row[lane];
                if (start + lane + 32 < W) high |= row[lane + 32];
            }
            if (low != 0) atomicOr(&gone[lane], low);
            if (high != 0) atomicOr(&gone[lane + 32], high);
            __syncthreads();
            if (threadIdx.x < panel_words && start + threadIdx.x < W) {
                const int64_t at = start + threadIdx.x;
                out[at] = gone[threadIdx.x] | (begin > 0 ? out[at] : 0);
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) kept_masks[image] = total;
    }
    if (last)
        for (int64_t k = total + threadIdx.x; k < limit; k += blockDim.x) keep[image * limit + k] = -1;
}

}  // namespace

void mask_nms(const Stream& stream, const View& words, const View& scores, const View& counts, double threshold,
              const View& keep, const View& kept, const View& order, const View& area, const View& removed, const View& bits) {
    const int64_t B = words.size[0], N = words.size[1], limit = keep.size[1], R = bits.size[1], W = bits.size[2];
    check_size(words.size[2]);
    SPROMPT_DEVICE_FLOATS(scores.dtype, T, find_order<T>(stream, words, scores, counts, order, area, nullptr, nullptr, 0.0));
    const Masks m = masks_of(words, order, area);
    int64_t begin = 0, rows = 128;  // few rows first: masks that they remove are not counted later
    do {
        const int64_t most = rows < R ? rows : R, end = begin + most < N ? begin + most : N;
        const int64_t tile_rows = tiles(end - begin, side), tile_columns = tiles(N - begin, side);
        launch(stream, pairs_kernel, B * tile_rows * tile_columns, threads, 0, m, threshold, begin, end, tile_rows,
               tile_columns, removed.as<const uint32_t>(), kept.as<const int64_t>(), limit, bits.as<uint32_t>(), R, W);
        launch(stream, scan_kernel, B, 1024, 0, order.as<const int64_t>(), area.as<const uint32_t>(), N,
               bits.as<const uint32_t>(), R, W, removed.as<uint32_t>(), begin, end, keep.as<int64_t>(), limit,
               kept.as<int64_t>(), end == N);
        begin = end;
        rows *= 2;
    } while (begin < N);
}

}  // namespace cuda
}  // namespace sprompt
