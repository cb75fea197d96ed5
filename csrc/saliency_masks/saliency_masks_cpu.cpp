#include "saliency_masks/saliency_masks.h"

#include "common/bits.h"
#include "saliency_masks/panels.h"

namespace sprompt {
namespace SPROMPT_ISA {

typedef double vd __attribute__((vector_size(4 * W)));  // W / 2 lanes

static const float flat_range = 1e-6f;

// The inputs of one image's maps: features in panels, norms (1 for the plain product), and which cells are inside.
struct Image {
    Panels features;
    float* norms;     // (line)
    int32_t* inside;  // (line): -1 for valid cells, 0 for other cells and behind P
    int64_t height, width, P;
};

// A map before Norm, in a worker's line.
struct Map {
    float* y;
    float low, range;
    bool usable;  // not flat, without NaN and infinity
};

// y = (sum of N rows of products) / norms. low and range are over all columns, since every column is a valid cell or the copy
// of one. y is not divided by the cosine's norm of the seed, and not multiplied by `unit`, which is the seed divided by the sum
// of its N cells. Only the test for flatness needs these two factors, as Norm cancels them.
template <int N>
SPROMPT_INLINE Map make_map(const Image& image, const float* const* rows, float seed_norm, float unit, float* y) {
    vf low = broadcast(__builtin_inff()), high = -low, poison = {};
    for (int64_t i = 0; i < image.features.columns(); i += W) {
        vf v = load(rows[0] + i);
        if (N == 4) v = (v + load(rows[1] + i)) + (load(rows[2] + i) + load(rows[3] + i));
        v = v / load(image.norms + i);
        store(y + i, v);
        low = minimum(v, low);
        high = maximum(v, high);
        poison += v * 0.0f;  // NaN if any v is NaN or infinite; minimum and maximum ignore NaN
    }
    float least = low[0], most = high[0];
    for (int i = 1; i < W; ++i) {
        least = low[i] < least ? low[i] : least;
        most = high[i] > most ? high[i] : most;
    }
    const float range = most - least, bad = sum(poison);
    return {y, least, range, bad == 0.0f && range * unit / seed_norm >= flat_range && range < __builtin_inff()};
}

// Norm(map) of W cells, -1 for cells that are not inside.
SPROMPT_INLINE vf normalised(const Image& image, const Map& map, int64_t i) {
    const vf t = (load(map.y + i) - broadcast(map.low)) / broadcast(map.range);
    return select(load(image.inside + i), t, broadcast(-1.0f));
}

SPROMPT_INLINE void add_lanes(vf v, vd& low, vd& high) {
    typedef float half __attribute__((vector_size(2 * W)));
    half part[2];
    __builtin_memcpy(part, &v, sizeof v);
    low += __builtin_convertvector(part[0], vd);
    high += __builtin_convertvector(part[1], vd);
}

// Computes bits, area and score of a map. The sum is in float64, where it is exact, so the score does not depend on the order
// of summation.
static void cut_map(const Image& image, const Map& map, float threshold, int64_t min_area, uint32_t* words, int64_t* area,
                    float* score) {
    const int64_t n = words_for(image.P);
    const auto drop = [&] {
        for (int64_t i = 0; i < n; ++i) words[i] = 0;
        *area = 0;
        *score = 0.0f;
    };
    if (!map.usable) return drop();
    const vf level = broadcast(threshold);
    vd low = {}, high = {};
    for (int64_t i = 0; i < n; ++i) {
        uint32_t word = 0;
        for (int j = 0; j < 32; j += W) {
            const vf t = normalised(image, map, 32 * i + j);
            word |= bits_at_least(t, level) << j;
            add_lanes(select(t >= level, t, vf{}), low, high);
        }
        words[i] = word;
    }
    const vd both = low + high;
    double total = 0.0;
    for (int i = 0; i < W / 2; ++i) total += both[i];
    *area = count_bits(words, n);
    if (*area < min_area) return drop();
    *score = static_cast<float>(total / static_cast<double>(*area));
}

template <class T>
static void write_map(const Image& image, const Map& map, T* out) {
    if (map.usable)
        for (int64_t i = 0; i < image.features.columns(); i += W) store(map.y + i, maximum(normalised(image, map, i), vf{}));
    else
        for (int64_t i = 0; i < image.P; ++i) map.y[i] = 0.0f;
    row_from_float(map.y, image.P, out);
}

// Packs an image's features. Returns false if the image has no valid cell; then all its maps are empty.
static bool open_image(const View& features, const View& valid, int64_t b, int64_t height, int64_t width,
                       const Buffers& buffers, Image& image, int threads) {
    const int64_t P = height * width;
    image = {buffers.features, buffers.norms, buffers.inside, height, width, P};
    const uint8_t* cells = valid.given() ? valid.as<const uint8_t>() + b * valid.stride[0] : nullptr;
    int64_t first = -1;
    bool all = true;
    for (int64_t p = 0; p < buffers.line; ++p) {
        const bool in = p < P && (cells == nullptr || cells[p] != 0);
        image.inside[p] = in ? -1 : 0;
        if (in && first < 0) first = p;
        if (!in && p < P) all = false;
    }
    if (first < 0) return false;
    SPROMPT_FLOAT_TYPES(features.dtype, T,
                        pack_columns(features.as<const T>() + b * features.stride[0], features.stride[1], P, image.inside, all,
                                     first, image.features, threads))
    return true;
}

// The divisors: the columns' norms for the cosine, 1 for the plain product.
static void set_norms(const Panels& columns, bool cosine, float* norms, int threads) {
    if (cosine) return column_norms(columns, norms, threads);
    for (int64_t i = 0; i < columns.columns(); ++i) norms[i] = 1.0f;
}

// ---- seeds of the pyramid
// The cells whose features a seed is the mean of, and the block of side cells that must be valid.
struct Cells {
    int64_t top, left, side;
    int64_t count, cell[4];
};
static Cells cells_of(int64_t scale, int64_t row, int64_t column, int64_t width) {
    const int64_t side = int64_t{1} << scale, inner = scale == 2 ? 1 : 0;
    Cells seed{row * side, column * side, side, scale == 0 ? 1 : 4, {}};
    const int64_t p = (seed.top + inner) * width + seed.left + inner;
    seed.cell[0] = p;
    seed.cell[1] = p + 1;
    seed.cell[2] = p + width;
    seed.cell[3] = p + width + 1;
    return seed;
}
static bool all_inside(const Image& image, const Cells& seed) {
    for (int64_t y = seed.top; y < seed.top + seed.side; ++y)
        for (int64_t x = seed.left; x < seed.left + seed.side; ++x)
            if (image.inside[y * image.width + x] == 0) return false;
    return true;
}

// The map of a seed of the pyramid. rows[i] is the row of products of the seed's cell i.
static Map pooled_map(const Image& image, const Cells& seed, const float* const* rows, bool cosine, float* y) {
    if (seed.count == 1) return make_map<1>(image, rows, cosine ? image.norms[seed.cell[0]] : 1.0f, 1.0f, y);
    float norm = 1.0f;
    if (cosine) {  // |mean of four|^2 is the mean of their 16 products
        float square = 0.0f;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) square += rows[i][seed.cell[j]];
        norm = square > 0.0f ? __builtin_sqrtf(square * (1.0f / 16.0f)) : 0.0f;
        if (norm < 1e-12f) norm = 1e-12f;
    }
    return make_map<4>(image, rows, norm, 0.25f, y);
}

struct Outputs {
    float threshold;
    int64_t min_area;
    uint32_t* words;  // (M, n)
    int64_t* areas;   // (M)
    float* scores;    // (M)
    int64_t n;

    SPROMPT_INLINE void cut(const Image& image, const Map& map, int64_t m) const {
        cut_map(image, map, threshold, min_area, words + m * n, areas + m, scores + m);
    }
};

// The number of rows of cells whose products are held at a time: all rows if the Gram matrix fits, else a multiple of 4.
static int64_t pyramid_stripe(int64_t height, int64_t width, int64_t held) {
    const int64_t line = round_up(height * width, whole);
    return line * line <= 4 * held ? height : 4 * larger(held / larger(4 * width * line, 1), 1);
}

static void pyramid_bits(const Image& image, bool cosine, const Buffers& buffers, int64_t stripe, const Outputs& out,
                         int threads) {
    const int64_t stride = buffers.line, P = image.P, width = image.width;
    float* c = buffers.products;
    const bool symmetric = stripe >= image.height;
    if (symmetric)
        multiply_gram(image.features, P, c, stride, threads);
    else
        set_norms(image.features, cosine, image.norms, threads);
    if (symmetric)
        for (int64_t i = 0; i < image.features.columns(); ++i) {
            const float norm = cosine ? __builtin_sqrtf(c[i * stride + i]) : 1.0f;
            image.norms[i] = norm < 1e-12f ? 1e-12f : norm;
        }
    for (int64_t y0 = 0; y0 < image.height; y0 += stripe) {
        const int64_t y1 = y0 + stripe < image.height ? y0 + stripe : image.height;
        int64_t row0 = 0;  // the cell that the first row of products belongs to
        if (!symmetric) {
            const int64_t first = y0 * width / panel, last = (y1 * width + panel - 1) / panel;
            row0 = first * panel;
            multiply(image.features, first, last, image.features, c, stride, threads);
        }
        int64_t count[3], start[3], skipped = 0;
        for (int scale = 0; scale < 3; ++scale) {
            const int64_t columns = width >> scale;
            count[scale] = ((y1 >> scale) - (y0 >> scale)) * columns;
            start[scale] = skipped + (y0 >> scale) * columns;
            skipped += (image.height >> scale) * columns;
        }
        parallel_for(count[0] + count[1] + count[2], 8, threads, [&](int64_t begin, int64_t end, int worker) {
            float* y = buffers.line_of(worker);
            for (int64_t i = begin; i < end; ++i) {
                int64_t scale = 0, at = i;
                while (at >= count[scale]) at -= count[scale++];
                const int64_t columns = width >> scale;
                const Cells seed = cells_of(scale, (y0 >> scale) + at / columns, at % columns, width);
                const float* rows[4];
                for (int64_t r = 0; r < seed.count; ++r) rows[r] = c + (seed.cell[r] - row0) * stride;
                Map map{y, 0.0f, 0.0f, false};
                if (all_inside(image, seed)) map = pooled_map(image, seed, rows, cosine, y);
                out.cut(image, map, start[scale] + at);
            }
        });
    }
}

// ---- seeds of a grid
// Packs the means of the features over the valid cells of the grid's windows. place(i) sets (row, column) of window i. A window
// with row < 0 gets zeros.
template <class T, class Place>
static void pack_windows(const T* x, int64_t stride, const Image& image, int64_t grid_height, int64_t grid_width, int64_t seeds,
                         const Place& place, const Panels& out, const Buffers& buffers, int threads) {
    parallel_for(out.blocks(), 1, threads, [&](int64_t block, int64_t, int worker) {
        float* line = buffers.line_of(worker);
        for (int64_t k = 0; k < out.rows_of(block); ++k) {
            row_to_float(x + (block * depth + k) * stride, image.P, line);
            for (int64_t i = 0; i < out.columns(); ++i) {
                float total = 0.0f;
                int64_t count = 0, row = -1, column = -1;
                if (i < seeds) place(i, row, column);
                if (row >= 0) {
                    const int64_t y0 = row * image.height / grid_height,
                                  y1 = ((row + 1) * image.height + grid_height - 1) / grid_height;
                    const int64_t x0 = column * image.width / grid_width,
                                  x1 = ((column + 1) * image.width + grid_width - 1) / grid_width;
                    for (int64_t p = y0; p < y1; ++p)
                        for (int64_t q = x0; q < x1; ++q) {
                            const int64_t cell = p * image.width + q;
                            total += image.inside[cell] ? line[cell] : 0.0f;
                            count -= image.inside[cell];
                        }
                }
                out.at(block, i / panel)[k * panel + i % panel] = count > 0 ? total / static_cast<float>(count) : 0.0f;
            }
        }
    });
}

// Calls f(seed, map) for every column of `seeds`, with as many rows of products at a time as the buffers hold.
template <class F>
static void each_map(const Image& image, int64_t count, bool cosine, const Buffers& buffers, int threads, const F& f) {
    const int64_t stride = buffers.line, panels = buffers.rows / panel;
    const Panels& seeds = buffers.seeds;
    float* norms = buffers.seed_norms;
    set_norms(image.features, cosine, image.norms, threads);
    set_norms(seeds, cosine, norms, threads);
    for (int64_t first = 0; first < seeds.count; first += panels) {
        const int64_t last = smaller(first + panels, seeds.count), begin_seed = first * panel;
        const int64_t here = (last * panel < count ? last * panel : count) - begin_seed;
        multiply(seeds, first, last, image.features, buffers.products, stride, threads);
        parallel_for(here, 4, threads, [&](int64_t begin, int64_t end, int worker) {
            for (int64_t i = begin; i < end; ++i) {
                const float* row = buffers.products + i * stride;
                f(begin_seed + i, make_map<1>(image, &row, norms[begin_seed + i], 1.0f, buffers.line_of(worker)));
            }
        });
    }
}

void saliency_bits(const View& features, const View& valid, int64_t height, int64_t width, int64_t grid_height,
                   int64_t grid_width, bool cosine, float threshold, int64_t min_area, int64_t held, const View& words,
                   const View& areas, const View& scores, int threads) {
    const int64_t M = words.size[1], n = words.size[2], P = height * width, stripe = pyramid_stripe(height, width, held);
    // A stripe begins and ends inside a panel.
    const int64_t rows = grid_height > 0 ? rows_of_seeds(M, P, held) : smaller(stripe, height) * width + 2 * panel;
    Scratch memory;
    const Buffers buffers = take_buffers(memory, features.size[1], P, grid_height > 0 ? M : 0, rows, threads);
    for (int64_t b = 0; b < features.size[0]; ++b) {
        const Outputs out{
            threshold, min_area, words.as<uint32_t>() + b * M * n, areas.as<int64_t>() + b * M, scores.as<float>() + b * M, n};
        Image image;
        if (!open_image(features, valid, b, height, width, buffers, image, threads)) {
            for (int64_t m = 0; m < M; ++m) out.cut(image, Map{nullptr, 0.0f, 0.0f, false}, m);
        } else if (grid_height == 0) {
            pyramid_bits(image, cosine, buffers, stripe, out, threads);
        } else {
            const auto place = [&](int64_t i, int64_t& row, int64_t& column) {
                row = i / grid_width;
                column = i % grid_width;
            };
            SPROMPT_FLOAT_TYPES(features.dtype, T,
                                pack_windows(features.as<const T>() + b * features.stride[0], features.stride[1], image,
                                             grid_height, grid_width, M, place, buffers.seeds, buffers, threads))
            each_map(image, M, cosine, buffers, threads, [&](int64_t m, const Map& map) { out.cut(image, map, m); });
        }
    }
}

// Norm(map) of map k of image b into maps (B, K, P).
static void write_to(const View& maps, int64_t b, int64_t k, const Image& image, const Map& map) {
    SPROMPT_FLOAT_TYPES(maps.dtype, T, write_map(image, map, maps.as<T>() + b * maps.stride[0] + k * maps.stride[1]))
}
static void clear_maps(const View& maps, int64_t b) {
    SPROMPT_FLOAT_TYPES(maps.dtype, T, {
        T* out = maps.as<T>() + b * maps.stride[0];
        for (int64_t i = 0; i < maps.size[1] * maps.size[2]; ++i) from_float(0.0f, out + i);
    })
}

void saliency_soft(const View& features, const View& valid, int64_t height, int64_t width, int64_t grid_height,
                   int64_t grid_width, bool cosine, const View& addresses, int64_t held, const View& maps, int threads) {
    const int64_t K = addresses.size[1], P = height * width, columns = grid_height > 0 ? K : 4 * K;
    const int64_t rows = grid_height > 0 ? rows_of_seeds(K, P, held) : round_up(columns, group);
    Scratch memory;
    const Buffers buffers = take_buffers(memory, features.size[1], P, columns, rows, threads);
    for (int64_t b = 0; b < features.size[0]; ++b) {
        const int64_t* address = addresses.as<const int64_t>() + b * K * 3;
        Image image;
        if (!open_image(features, valid, b, height, width, buffers, image, threads)) {
            clear_maps(maps, b);
        } else if (grid_height > 0) {
            const auto place = [&](int64_t i, int64_t& row, int64_t& column) {
                row = address[3 * i + 1];
                column = address[3 * i + 2];
            };
            SPROMPT_FLOAT_TYPES(features.dtype, T,
                                pack_windows(features.as<const T>() + b * features.stride[0], features.stride[1], image,
                                             grid_height, grid_width, K, place, buffers.seeds, buffers, threads))
            each_map(image, K, cosine, buffers, threads, [&](int64_t k, const Map& map) { write_to(maps, b, k, image, map); });
        } else {
            // Four columns per seed, copied from the packed features. So the products equal those of the Gram matrix, to the
            // bit.
            const Panels& seeds = buffers.seeds;
            const auto seed_of = [&](int64_t k) {
                return cells_of(address[3 * k], address[3 * k + 1], address[3 * k + 2], width);
            };
            parallel_for(seeds.blocks(), 1, threads, [&](int64_t block, int64_t, int) {
                for (int64_t i = 0; i < seeds.columns(); ++i) {
                    float* to = seeds.at(block, i / panel) + i % panel;
                    const bool real = i < 4 * K && address[i / 4 * 3] >= 0 && i % 4 < seed_of(i / 4).count;
                    const int64_t cell = real ? seed_of(i / 4).cell[i % 4] : 0;
                    const float* from = image.features.at(block, cell / panel) + cell % panel;
                    for (int64_t k = 0; k < seeds.rows_of(block); ++k) to[k * panel] = real ? from[k * panel] : 0.0f;
                }
            });
            set_norms(image.features, cosine, image.norms, threads);
            multiply(seeds, 0, seeds.count, image.features, buffers.products, buffers.line, threads);
            parallel_for(K, 1, threads, [&](int64_t k, int64_t, int worker) {
                float* y = buffers.line_of(worker);
                Map map{y, 0.0f, 0.0f, false};
                if (address[3 * k] >= 0) {
                    const Cells seed = seed_of(k);
                    const float* rows[4];
                    for (int64_t r = 0; r < 4; ++r) rows[r] = buffers.products + (4 * k + r) * buffers.line;
                    if (all_inside(image, seed)) map = pooled_map(image, seed, rows, cosine, y);
                }
                write_to(maps, b, k, image, map);
            });
        }
    }
}

template <class T>
static void pack_seeds(const T* seeds, int64_t stride, int64_t M, const Panels& out, int threads) {
    parallel_for(out.blocks() * out.count, 4, threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t block = job / out.count, index = job % out.count;
            for (int64_t i = 0; i < panel; ++i) {
                const int64_t m = index * panel + i;
                const T* from = seeds + m * stride + block * depth;
                float* to = out.at(block, index) + i;
                for (int64_t k = 0; k < out.rows_of(block); ++k) to[k * panel] = m < M ? to_float(from[k]) : 0.0f;
            }
        }
    });
}

void saliency_maps(const View& features, const View& valid, const View& seeds, bool cosine, int64_t held, const View& maps,
                   int threads) {
    const int64_t M = seeds.size[1], P = features.size[2];
    Scratch memory;
    const Buffers buffers = take_buffers(memory, features.size[1], P, M, rows_of_seeds(M, P, held), threads);
    for (int64_t b = 0; b < features.size[0]; ++b) {
        Image image;
        if (!open_image(features, valid, b, 1, P, buffers, image, threads)) {
            clear_maps(maps, b);
            continue;
        }
        SPROMPT_FLOAT_TYPES(features.dtype, T,
                            pack_seeds(seeds.as<const T>() + b * seeds.stride[0], seeds.stride[1], M, buffers.seeds, threads))
        each_map(image, M, cosine, buffers, threads, [&](int64_t m, const Map& map) { write_to(maps, b, m, image, map); });
    }
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
