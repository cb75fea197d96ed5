#include "common/huge_pages.h"
#include "mask_attention/blocks.h"
#include "mask_attention/mask_attention.h"

namespace sprompt {
namespace SPROMPT_ISA {

// One query in the backward: its scaled row, the gradient of its result, logsum, and the product of result and gradient.
struct Row {
    const float *query, *grad;  // (padded)
    float logsum, mean;
    float* to_query;  // (padded), the sum so far
};

// One block of keys of one head, and the gradients of its keys and values.
struct Side {
    const float *keys, *values;  // (block, padded)
    float *to_keys, *to_values;  // the sums so far
};

// The weight p of a key, and the gradient of its score p (<grad, value> - mean), from its score and <grad, value>.
SPROMPT_INLINE void differentiate(float* score, float* product, const Row& row) {
    const vf p = weight(load(score), broadcast(row.logsum));
    store(score, p);
    store(product, p * (load(product) - broadcast(row.mean)));
}

// Adds the listed keys of a block to the gradients of a sparse query and of the keys. scores and products are scratch.
static void differentiate_list(const Row& row, const Side& side, int64_t padded, const uint16_t* list, int64_t count,
                               float* scores, float* products) {
    products_of_list(row.query, side.keys, padded, list, count, scores);
    products_of_list(row.grad, side.values, padded, list, count, products);
    for (int64_t k = 0; k < count; k += W) differentiate(scores + k, products + k, row);
    for (int64_t d = 0; d < padded; d += NR) {
        const vf q0 = load(row.query + d), q1 = load(row.query + d + W);
        const vf g0 = load(row.grad + d), g1 = load(row.grad + d + W);
        vf to0 = load(row.to_query + d), to1 = load(row.to_query + d + W);
        for (int64_t k = 0; k < count; ++k) {
            const int64_t at = list[k] * padded + d;
            const vf p = broadcast(scores[k]), s = broadcast(products[k]);
            to0 = fma(s, load(side.keys + at), to0);
            to1 = fma(s, load(side.keys + at + W), to1);
            store(side.to_keys + at, fma(s, q0, load(side.to_keys + at)));
            store(side.to_keys + at + W, fma(s, q1, load(side.to_keys + at + W)));
            store(side.to_values + at, fma(p, g0, load(side.to_values + at)));
            store(side.to_values + at + W, fma(p, g1, load(side.to_values + at + W)));
        }
        store(row.to_query + d, to0);
        store(row.to_query + d + W, to1);
    }
}

// c (keys, NR) += a^T b: a is `depth` rows of `block` numbers, of which the first `keys` <= MR are used; b (depth, NR).
template <int R = MR>
SPROMPT_INLINE void product_over_rows(int64_t keys, const float* a, const float* b, int64_t b_stride, int64_t depth, float* c,
                                      int64_t c_stride) {
    if (keys == R) return product_tile<R, 1, block, true>(a, b, b_stride, depth, c, c_stride);
    if constexpr (R > 1) product_over_rows<R - 1>(keys, a, b, b_stride, depth, c, c_stride);
}

// Scratch of the dense way, which takes up to panel_rows queries at a time.
constexpr int64_t panel_rows = 4 * MR;
struct Panel {
    float *scores, *products;  // (panel_rows, block)
    float *queries, *grads;    // (panel_rows, padded), copies
    float* columns;            // [D][MR]
    float *turned_keys, *turned_values;
};

// Adds a block of keys to the gradients of `count` <= panel_rows dense queries and of the keys.
template <class RowOf, class Lanes>
static void differentiate_block(const Panel& panel, const Side& side, int64_t count, int64_t length, int64_t D, int64_t padded,
                                const int32_t* of, const float* queries, const float* grads, const RowOf& row_at,
                                const Lanes& lanes) {
    const Groups groups(count);
    for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t begin = groups.begin(g), rows = groups.begin(g + 1) - begin;
        pack_columns(queries, padded, of + begin, rows, D, panel.columns);
        products_of_block(panel.columns, rows, panel.turned_keys, length, D, padded, panel.scores + begin * block);
        pack_columns(grads, padded, of + begin, rows, D, panel.columns);
        products_of_block(panel.columns, rows, panel.turned_values, length, D, padded, panel.products + begin * block);
    }
    for (int64_t r = 0; r < count; ++r) {
        const Row row = row_at(of[r]);
        float *scores = panel.scores + r * block, *products = panel.products + r * block;
        for (int64_t k = 0; k < length; k += W) {
            const uint32_t held = lanes(of[r], k);
            differentiate(scores + k, products + k, row);
            store(scores + k, choose(held, load(scores + k), vf{}));
            store(products + k, choose(held, load(products + k), vf{}));
        }
        __builtin_memcpy(panel.queries + r * padded, row.query, padded * 4);
        __builtin_memcpy(panel.grads + r * padded, row.grad, padded * 4);
    }
    const Groups of_keys(length);
    for (int64_t d = 0; d < padded; d += NR) {
        for (int64_t g = 0; g < groups.count; ++g) {
            const int64_t begin = groups.begin(g), rows = groups.begin(g + 1) - begin;
            float tile[MR * NR];
            product_over_keys(rows, panel.products + begin * block, side.keys + d, padded, length, tile);
            for (int64_t r = 0; r < rows; ++r) {
                float* out = row_at(of[begin + r]).to_query + d;
                for (int i = 0; i < NR; i += W) store(out + i, load(out + i) + load(tile + r * NR + i));
            }
        }
        for (int64_t g = 0; g < of_keys.count; ++g) {
            const int64_t begin = of_keys.begin(g), keys = of_keys.begin(g + 1) - begin, at = begin * padded + d;
            product_over_rows(keys, panel.products + begin, panel.queries + d, padded, count, side.to_keys + at, padded);
            product_over_rows(keys, panel.scores + begin, panel.grads + d, padded, count, side.to_values + at, padded);
        }
    }
}

// rows (count, padded) -> count rows of out (B, H, S, D), contiguous.
template <class T>
static void write_rows(const float* rows, int64_t padded, const View& out, int64_t b, int64_t h, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i) row_from_float(rows + i * padded, out.size[3], row_of<T>(out, b, h, first + i));
}

template <class T>
static void backward(const View& grad, const View& query, const View& key, const View& value, const View& words,
                     const View& out, const View& logsum, float scale, bool empty_all, const View& grad_query,
                     const View& grad_key, const View& grad_value, int threads) {
    const Cut cut(query, key, threads);
    const int64_t N = cut.N, padded = cut.padded;
    Masks masks(words, empty_all);
    Scratch memory;
    float* queries = memory.take<float>(cut.rows(), padded);  // scaled
    float* grads = memory.take<float>(cut.rows(), padded);
    float* means = memory.take<float>(cut.rows());
    float* partial = memory.take<float>(cut.rows(), cut.chunks, padded);  // of the gradient of queries
    const int64_t matrix = (block + NR) * padded;
    const int64_t scratch_floats =
        round_up(6 * matrix + 2 * panel_rows * (block + padded) + MR * padded + padded, 16) + Attended::ints(N);
    float* scratch = memory.take<float>(threads, scratch_floats);
    const int64_t bytes = cut.B * cut.H * cut.S * cut.D * static_cast<int64_t>(sizeof(T));
    ask_for_huge_pages(grad_key.data, bytes);
    ask_for_huge_pages(grad_value.data, bytes);
    masks.find_empty(cut.B, threads, memory);
    parallel_for(cut.B * cut.H, grain_of(N * padded), threads, [&](int64_t begin, int64_t end, int worker) {
        float* result = scratch + worker * scratch_floats;
        for (int64_t i = begin; i < end; ++i) {
            pack_rows<T>(query, i / cut.H, i % cut.H, 0, N, padded, scale, queries + i * N * padded);
            pack_rows<T>(grad, i / cut.H, i % cut.H, 0, N, padded, 1.0f, grads + i * N * padded);
            for (int64_t r = i * N; r < (i + 1) * N; ++r) {
                pack_rows<T>(out, i / cut.H, i % cut.H, r - i * N, 1, padded, 1.0f, result);
                vf mean = {};
                for (int64_t d = 0; d < padded; d += W) mean = fma(load(result + d), load(grads + r * padded + d), mean);
                means[r] = sum(mean);
            }
        }
    });
    parallel_for(cut.tasks(), 1, threads, [&](int64_t begin, int64_t end, int worker) {
        float* keys = scratch + worker * scratch_floats;
        float* values = keys + matrix;
        const Side side{keys, values, values + matrix, values + 2 * matrix};
        Panel panel;
        panel.turned_keys = values + 3 * matrix;
        panel.turned_values = panel.turned_keys + matrix;
        panel.scores = panel.turned_values + matrix;
        panel.products = panel.scores + panel_rows * block;
        panel.queries = panel.products + panel_rows * block;
        panel.grads = panel.queries + panel_rows * padded;
        panel.columns = panel.grads + panel_rows * padded;
        Attended attended(reinterpret_cast<int32_t*>(scratch + (worker + 1) * scratch_floats - Attended::ints(N)), N);
        for (int64_t i = begin; i < end; ++i) {
            const Task task(cut, i);
            for (int64_t h = task.head; h < task.heads; ++h)
                clear(partial + cut.partial(task.b, task.c, h) * padded, N * padded);
            for (int64_t j = task.first; j < task.last; ++j) {
                const int64_t first = j * block, length = smaller(cut.S - first, block);
                masks.list(task.b, N, first, length, attended);
                for (int64_t h = task.head; h < task.heads; ++h) {
                    const int64_t row = (task.b * cut.H + h) * N, at = cut.partial(task.b, task.c, h);
                    const float *of_queries = queries + row * padded, *of_grads = grads + row * padded;
                    const auto row_at = [&](int64_t q) {
                        return Row{of_queries + q * padded, of_grads + q * padded, logsum.as<const float>()[row + q],
                                   means[row + q], partial + (at + q) * padded};
                    };
                    clear(side.to_keys, length * padded);
                    clear(side.to_values, length * padded);
                    if (attended.queries() > 0) {
                        pack_rows<T>(key, task.b, h, first, length, padded, 1.0f, keys);
                        pack_rows<T>(value, task.b, h, first, length, padded, 1.0f, values);
                    }
                    Ahead<T> ahead(cut, task, j, h, attended.queries(), key, value);
                    for (int64_t r = 0; r < attended.sparse_count; ++r) {
                        ahead.some(1);
                        const int64_t q = attended.sparse[r];
                        differentiate_list(row_at(q), side, padded, attended.lists + q * block, attended.counts[q],
                                           panel.scores, panel.products);
                    }
                    if (attended.dense_count > 0) {
                        turn_rows(keys, length, padded, panel.turned_keys);
                        turn_rows(values, length, padded, panel.turned_values);
                    }
                    for (int64_t r = 0; r < attended.dense_count; r += panel_rows) {
                        const int64_t count = smaller(attended.dense_count - r, panel_rows);
                        ahead.some(count);
                        differentiate_block(panel, side, count, length, cut.D, padded, attended.dense + r, of_queries, of_grads,
                                            row_at, [&](int64_t q, int64_t k) {
                                                return masks.lanes(task.b, q, first, length, k, masks.whole(task.b, q));
                                            });
                    }
                    write_rows<T>(side.to_keys, padded, grad_key, task.b, h, first, length);
                    write_rows<T>(side.to_values, padded, grad_value, task.b, h, first, length);
                }
            }
        }
    });
    parallel_for(cut.rows(), grain_of(cut.chunks * padded), threads, [&](int64_t begin, int64_t end, int worker) {
        float* sums = scratch + worker * scratch_floats;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t inside = row % (cut.H * N);
            clear(sums, padded);
            for (int64_t c = 0; c < cut.chunks; ++c) {
                const float* part = partial + (cut.partial(row / (cut.H * N), c, 0) + inside) * padded;
                for (int64_t d = 0; d < padded; d += W) store(sums + d, load(sums + d) + load(part + d));
            }
            for (int64_t d = 0; d < padded; d += W) store(sums + d, load(sums + d) * scale);
            row_from_float(sums, cut.D, grad_query.as<T>() + row * cut.D);
        }
    });
}

void mask_attention_backward(const View& grad, const View& query, const View& key, const View& value, const View& words,
                             const View& out, const View& logsum, double scale, bool empty_all, const View& grad_query,
                             const View& grad_key, const View& grad_value, int threads) {
    SPROMPT_FLOAT_TYPES(query.dtype, T,
                        backward<T>(grad, query, key, value, words, out, logsum, static_cast<float>(scale), empty_all,
                                    grad_query, grad_key, grad_value, threads))
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
