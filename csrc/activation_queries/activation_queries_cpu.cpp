#include "activation_queries/activation_queries.h"

#include "common/least.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "common/unfused.h"

namespace sprompt {
namespace SPROMPT_ISA {
namespace {

// Cells whose scores are computed together: VECTORS independent sums.
constexpr int VECTORS = 4, TILE = VECTORS * W;

SPROMPT_INLINE int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// scores[TILE], labels[TILE] <- `real` cells, at most TILE, of C channels that lie `stride` apart. The rest of the tile has
// some values. `values` (C, TILE) is a buffer.
template <class T>
void score_tile(const T* logits, int64_t stride, int64_t C, int64_t real, float* values, float* scores, int32_t* labels) {
    vf best[VECTORS], most[VECTORS], total[VECTORS];
    vi label[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        best[v] = broadcast(-__builtin_inff());
        total[v] = vf{};
        label[v] = vi{};
    }
    for (int64_t c = 0; c < C; ++c) {
        float* row = values + c * TILE;
        row_to_float(logits + c * stride, real, row);
        for (int64_t i = real; i < TILE; ++i) row[i] = 0.0f;
        for (int v = 0; v < VECTORS; ++v) {
            const vf z = load(row + v * W);
            const vi more = z > best[v];  // false for NaN
            if (c + 1 == C) {
                most[v] = select(more, z, best[v]);
            } else {
                best[v] = select(more, z, best[v]);
                label[v] = select_int(more, broadcast(static_cast<int32_t>(c)), label[v]);
            }
        }
    }
    for (int64_t c = 0; c < C; ++c)
        for (int v = 0; v < VECTORS; ++v) total[v] += Exact::exp(load(values + c * TILE + v * W) - most[v]);
    for (int v = 0; v < VECTORS; ++v) {
        store(scores + v * W, Exact::exp(best[v] - most[v]) / total[v]);
        store(labels + v * W, label[v]);
    }
}

// The scores and labels of an image with a border of one cell, in rows of `line` cells, and W more cells behind the last row.
// The border has the label -1, which no cell has.
struct Bordered {
    float* scores;
    int32_t* labels;
    int64_t h, w, line;

    SPROMPT_INLINE static int64_t size(int64_t h, int64_t w) { return padded((h + 2) * (w + 2) + W); }

    SPROMPT_INLINE void fill(const float* from, const int32_t* classes) const {
        for (int64_t i = 0; i < size(h, w); ++i) {
            scores[i] = 0.0f;
            labels[i] = -1;
        }
        for (int64_t y = 0; y < h; ++y)
            for (int64_t x = 0; x < w; ++x) {
                scores[(y + 1) * line + x + 1] = from[y * w + x];
                labels[(y + 1) * line + x + 1] = classes[y * w + x];
            }
    }
};

// keys[h * w] <- what orders the cells, the first cell having the smallest key: local maxima from 0, others from 2^30, both by
// decreasing score; NaN is the largest key. Scores are in [0, 1], whose bits increase with them. Writes W numbers more.
void order_keys(const Bordered& map, int32_t* keys) {
    constexpr int32_t one = 0x3f800000;  // the bits of 1
    for (int64_t y = 0; y < map.h; ++y)
        for (int64_t x = 0; x < map.w; x += W) {
            const int64_t upper = y * map.line + x, here = upper + map.line + 1;
            const vf score = load(map.scores + here);
            const vi label = load(map.labels + here);
            vi outdone = score < 1e-6f;
            for (int64_t row = 0; row < 3; ++row)
                for (int64_t column = 0; column < 3; ++column) {
                    const int64_t beside = upper + row * map.line + column;
                    outdone |= (load(map.labels + beside) == label) & (load(map.scores + beside) > score);
                }
            const vi key = one - bits_to_int(score) + (outdone & (1 << 30));
            store(keys + y * map.w + x, select_int(score == score, key, broadcast(0x7fffffff)));
        }
}

// Sorts a list of cells by their keys, stably, one byte at a time. `other` has as many numbers.
void sort_by_key(const int32_t* keys, int64_t n, int32_t* list, int32_t* other) {
    for (int shift = 0; shift < 32; shift += 8) {
        int64_t start[257] = {};
        for (int64_t i = 0; i < n; ++i) ++start[(keys[list[i]] >> shift & 255) + 1];
        for (int byte = 0; byte < 255; ++byte) start[byte + 1] += start[byte];
        for (int64_t i = 0; i < n; ++i) other[start[keys[list[i]] >> shift & 255]++] = list[i];
        int32_t* sorted = other;
        other = list;
        list = sorted;
    }
}

}  // namespace

void activation_queries(const View& logits, int64_t w, const View& index, const View& scores, const View& labels, int threads) {
    const int64_t B = logits.size[0], C = logits.size[1], P = logits.size[2], count = index.size[1];
    if (count == 0) return;
    const int64_t h = P / w, tiles = (P + TILE - 1) / TILE, border = Bordered::size(h, w), cells = padded(P + W);
    Scratch memory;
    float* values = memory.take<float>(threads, C, TILE);
    float* score = memory.take<float>(B, tiles, TILE);
    int32_t* label = memory.take<int32_t>(B, tiles, TILE);
    float* around = memory.take<float>(threads, border);
    int32_t* whole = memory.take<int32_t>(threads, border + 2 * cells + least_counts + padded(count));
    parallel_for(B * tiles, 4, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t b = job / tiles, first = job % tiles * TILE, real = P - first < TILE ? P - first : TILE;
            SPROMPT_FLOAT_TYPES(logits.dtype, T,
                                score_tile<T>(logits.as<const T>() + b * logits.stride[0] + first, logits.stride[1], C, real,
                                              values + worker * C * TILE, score + job * TILE, label + job * TILE))
        }
    });
    parallel_for(B, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        int32_t* classes = whole + worker * (border + 2 * cells + least_counts + padded(count));
        int32_t *keys = classes + border, *rest = keys + cells, *counts = rest + cells, *other = counts + least_counts;
        for (int64_t b = begin; b < end; ++b) {
            const float* a = score + b * tiles * TILE;
            const int32_t* k = label + b * tiles * TILE;
            const Bordered map{around + worker * border, classes, h, w, w + 2};
            map.fill(a, k);
            order_keys(map, keys);
            choose_least(keys, P, count, rest, counts, rest);
            sort_by_key(keys, count, rest, other);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t place = b * count + i;
                index.as<int64_t>()[place] = rest[i];
                labels.as<int64_t>()[place] = k[rest[i]];
                SPROMPT_FLOAT_TYPES(scores.dtype, T, from_float(a[rest[i]], scores.as<T>() + place))
            }
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
