#include "common/bit_product.h"
#include "common/overlap.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "masks/masks.h"

namespace sprompt {
namespace SPROMPT_ISA {

namespace {
// counted_words: words that and + popcount counts in the time in which the product counts 100. start_words: the fixed cost of a
// pair, in words.
#if defined(__AVX512F__)
constexpr int64_t counted_words = 90, start_words = 60;
#elif defined(__AVX2__)
constexpr int64_t counted_words = 57, start_words = 60;
#else
constexpr int64_t counted_words = 33, start_words = 4;
#endif

// The pairs of one image, with IoUs of type T. Rows are masks of a, columns are masks of b. a and b may be the same masks.
template <class T>
struct Pairs {
    const uint32_t *a, *b;
    int64_t stride_a, stride_b;
    const Extent *ea, *eb;
    int64_t n, width;
    T* out;  // (N, M)
    int64_t M;
    bool self;  // a is b: pairs below the diagonal equal those above it

    SPROMPT_INLINE const uint32_t* row(int64_t i) const { return a + i * stride_a; }
    SPROMPT_INLINE const uint32_t* column(int64_t j) const { return b + j * stride_b; }
    SPROMPT_INLINE void put(int64_t i, int64_t j, int64_t both) const {
        const int64_t either = ea[i].area + eb[j].area - both;
        const T value = either == 0 ? T(0) : static_cast<T>(static_cast<double>(both) / static_cast<double>(either));
        out[i * M + j] = value;
        if (self) out[j * M + i] = value;
    }
};

// Rows [i0, i1) and columns [j0, j1) have pixels in common only in words [first, last). If first >= last, they have none.
struct Range {
    int64_t first, last;

    template <class T>
    SPROMPT_INLINE Range(const Pairs<T>& pairs, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
        const Extent rows = around(pairs.ea, i0, i1), columns = around(pairs.eb, j0, j1);
        const int64_t top = rows.y1 > columns.y1 ? rows.y1 : columns.y1;
        const int64_t bottom = rows.y2 < columns.y2 ? rows.y2 : columns.y2;
        first = top * pairs.width / 32;
        last = (bottom * pairs.width + 31) / 32;
    }

  private:
    SPROMPT_INLINE static Extent around(const Extent* extent, int64_t begin, int64_t end) {
        Extent all{0, int64_t{1} << 62, 0, 0, 0};
        for (int64_t i = begin; i < end; ++i) {
            if (extent[i].area == 0) continue;
            if (extent[i].y1 < all.y1) all.y1 = extent[i].y1;
            if (extent[i].y2 > all.y2) all.y2 = extent[i].y2;
        }
        if (all.y2 == 0) all.y1 = 0;
        return all;
    }
};

// Whether the product of the tile costs less than its pairs one by one. Estimated from every fourth row.
template <class T>
bool product_pays(const Pairs<T>& pairs, const Range& range, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    constexpr int64_t step = 4;
    int64_t words = 0, tried = 0;
    for (int64_t i = i0; i < i1; i += step, ++tried)
        for (int64_t j = pairs.self && j0 < i ? i : j0; j < j1; ++j) {
            const Overlap box(pairs.ea[i], pairs.eb[j]);
            if (box.empty()) continue;
            const int64_t span = box.last_word(pairs.width) - box.first_word(pairs.width);
            words += start_words + (box.narrow(pairs.width) ? span / 4 : span);
        }
    const int64_t all = BitProduct::columns * (i1 - i0 + 16) * (range.last - range.first);
    return words * (i1 - i0) / tried * 100 > all * counted_words;
}

template <class T>
void multiply(const Pairs<T>& pairs, const Range& range, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const auto row = [&](int64_t i) { return pairs.row(i0 + i); };
    const auto column = [&](int64_t j) { return pairs.column(j0 + j); };
    BitProduct product;
    uint32_t total[BitProduct::rows][BitProduct::columns];
    const int64_t R = i1 - i0, C = j1 - j0, stretch = BitProduct::most_words / 8 * 8;
    __builtin_memset(total, 0, R * sizeof total[0]);
    for (int64_t start = range.first; start < range.last; start += stretch) {
        product.multiply(R, row, C, column, start, start + stretch < range.last ? start + stretch : range.last);
        for (int64_t i = 0; i < R; ++i)
            for (int64_t j = 0; j < BitProduct::columns; ++j) total[i][j] += product.counts[i][j];
    }
    for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = pairs.self && j0 < i ? i : j0; j < j1; ++j) pairs.put(i, j, total[i - i0][j - j0]);
}

// Counts tiles of 8 x 8 masks. Pairs whose boxes do not overlap are not read. Pairs that overlap in a narrow strip are read row
// by row. The other pairs are read in stretches of 2048 words (8 kB), so that the 64 kB of a tile of a, and of b, stay in the
// L2 cache.
constexpr int64_t tile = 8;
template <class T>
void count(const Pairs<T>& pairs, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    constexpr int64_t stretch = 2048;
    const int64_t width = pairs.width;
    int64_t common[tile][tile] = {};
    bool wide[tile][tile] = {};
    int64_t first = pairs.n, last = 0;
    for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) {
            const Overlap box(pairs.ea[i], pairs.eb[j]);
            if (box.empty()) continue;
            if (box.narrow(width)) {
                common[i - i0][j - j0] = count_rows(pairs.row(i), pairs.column(j), width, box);
                continue;
            }
            wide[i - i0][j - j0] = true;
            if (box.first_word(width) < first) first = box.first_word(width);
            if (box.last_word(width) > last) last = box.last_word(width);
        }
    for (int64_t start = first; start < last; start += stretch)
        for (int64_t i = i0; i < i1; ++i)
            for (int64_t j = j0; j < j1; ++j) {
                if (!wide[i - i0][j - j0]) continue;
                const Overlap box(pairs.ea[i], pairs.eb[j]);
                const int64_t from = box.first_word(width) > start ? box.first_word(width) : start;
                const int64_t to = box.last_word(width) < start + stretch ? box.last_word(width) : start + stretch;
                if (from < to) common[i - i0][j - j0] += count_and(pairs.row(i) + from, pairs.column(j) + from, to - from);
            }
    for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) pairs.put(i, j, common[i - i0][j - j0]);
}

// Cuts the pairs into tiles of the size that the product takes. The first loop multiplies the tiles for which the product pays.
// The second loop counts the other tiles, in strips of 8 rows.
template <class T>
void all_pairs(const View& a, const View& b, int64_t width, const View& iou, int threads) {
    const bool self = !b.given();
    const View& other = self ? a : b;
    const int64_t B = a.size[0], N = a.size[1], M = other.size[1], n = a.size[2], all = self ? N : N + M;
    Scratch memory;
    Extent* const extent = memory.take<Extent>(B, all);
    const auto pairs_of = [&](int64_t image) {
        const Extent* const ea = extent + image * all;
        return Pairs<T>{a.as<const uint32_t>() + image * a.stride[0],
                        other.as<const uint32_t>() + image * other.stride[0],
                        a.stride[1],
                        other.stride[1],
                        ea,
                        self ? ea : ea + N,
                        n,
                        width,
                        iou.as<T>() + image * N * M,
                        M,
                        self};
    };

    parallel_for(B * all, 1 + (1 << 13) / (n + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t i = job % all;
            const Pairs<T> pairs = pairs_of(job / all);
            extent[job] = extent_of(i < N ? pairs.row(i) : pairs.column(i - N), n, width);
        }
    });
    if (N == 0 || M == 0) return;

    // Tiles have as many rows as possible while each thread gets three tiles, in equal parts. The choice of tiles changes no
    // result.
    const int64_t columns = (M + BitProduct::columns - 1) / BitProduct::columns;
    int64_t rows = BitProduct::rows;
    while (rows > 64 && (N + rows - 1) / rows * columns * B < 3 * threads) rows /= 2;
    const int64_t parts = (N + rows - 1) / rows;
    rows = ((N + parts - 1) / parts + tile - 1) / tile * tile;
    const int64_t cost = tile * M * (n / 8 + 4);  // about the cycles of 8 rows, if the boxes overlap by half
    // This value marks a row of a tile whose pairs are not counted yet. Only the row itself writes to that place.
    constexpr T open = -1;
    const auto sign = [&](const Pairs<T>& pairs, int64_t i, int64_t j0) -> T& {
        return pairs.out[i * M + (self && j0 < i ? i : j0)];
    };
    parallel_for(B * parts * columns, 1 + (1 << 20) / (rows * BitProduct::columns * (n + 4)), threads,
                 [&](int64_t begin, int64_t end, int) {
                     for (int64_t job = begin; job < end; ++job) {
                         const Pairs<T> pairs = pairs_of(job / (parts * columns));
                         const int64_t i0 = job / columns % parts * rows, i1 = N < i0 + rows ? N : i0 + rows;
                         const int64_t j0 = job % columns * BitProduct::columns;
                         const int64_t j1 = M < j0 + BitProduct::columns ? M : j0 + BitProduct::columns;
                         if (i0 >= i1 || (self && j1 <= i0)) continue;
                         const Range range(pairs, i0, i1, j0, j1);
                         if (n < int64_t{1} << 27 && product_pays(pairs, range, i0, i1, j0, j1))
                             multiply(pairs, range, i0, i1, j0, j1);
                         else
                             for (int64_t i = i0; i < i1; ++i)
                                 if (!self || i < j1) sign(pairs, i, j0) = open;
                     }
                 });
    const int64_t strips = (N + tile - 1) / tile;
    parallel_for(B * strips, 1 + (1 << 16) / (cost + 1), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const Pairs<T> pairs = pairs_of(job / strips);
            const int64_t i0 = job % strips * tile, i1 = N < i0 + tile ? N : i0 + tile;
            for (int64_t j0 = 0; j0 < M; j0 += BitProduct::columns) {
                const int64_t j1 = M < j0 + BitProduct::columns ? M : j0 + BitProduct::columns;
                if ((self && j1 <= i0) || sign(pairs, i0, j0) != open) continue;
                for (int64_t j = self && j0 < i0 ? i0 : j0; j < j1; j += tile)
                    count(pairs, i0, i1, j, j1 < j + tile ? j1 : j + tile);
            }
        }
    });
}
}  // namespace

void mask_iou(const View& a, const View& b, int64_t width, const View& iou, int threads) {
    if (iou.dtype == DType::f64) return all_pairs<double>(a, b, width, iou, threads);
    all_pairs<float>(a, b, width, iou, threads);
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
