#include "mask_attention/mask_attention.h"

#include "mask_attention/blocks.h"

namespace sprompt {
namespace SPROMPT_ISA {

// The softmax of one query over the keys seen so far: a score `top` near the largest, the sum of the weights e^(score - top),
// and the weighted sum of the values (padded). No score is above top + slack. So top rarely changes after the first block, and
// the CPU, which predicts that it stays, need not wait for the largest score of a block.
constexpr float slack = 16.0f;
struct State {
    float *top, *total, *sums;

    // Takes in the largest score of a block.
    SPROMPT_INLINE void raise(float now, int64_t padded) const {
        if (!(now > *top + slack)) return;
        const vf factor = weight(broadcast(*top), broadcast(now));
        *top = now;
        *total *= factor[0];
        for (int64_t d = 0; d < padded; d += W) store(sums + d, load(sums + d) * factor);
    }
};

// Adds the listed keys of a block to the state of a sparse query. Scores are scratch.
static void attend_list(const float* query, const float* keys, const float* values, int64_t padded, const uint16_t* list,
                        int64_t count, float* scores, State state) {
    products_of_list(query, keys, padded, list, count, scores);
    const int64_t filled = round_up(count, list_step);
    for (int64_t k = count; k < filled; ++k) scores[k] = none;
    vf most = broadcast(none);
    for (int64_t k = 0; k < filled; k += W) most = max_or_second(most, load(scores + k));
    state.raise(largest(most), padded);
    const vf top = broadcast(*state.top);
    vf total = {};
    for (int64_t k = 0; k < filled; k += W) {
        const vf p = weight(load(scores + k), top);
        total += p;
        store(scores + k, p);
    }
    *state.total += sum_of(total);
    for (int64_t d = 0; d < padded; d += NR) {
        vf part[4][2] = {};
        for (int64_t k = 0; k < count; k += 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {  // behind `count` the weights are 0
                const vf p = broadcast(scores[k + i]);
                const float* value = values + list[k + i] * padded + d;
                part[i][0] = fma(p, load(value), part[i][0]);
                part[i][1] = fma(p, load(value + W), part[i][1]);
            }
        for (int i = 0; i < 2; ++i) {
            float* out = state.sums + d + i * W;
            store(out, load(out) + ((part[0][i] + part[1][i]) + (part[2][i] + part[3][i])));
        }
    }
}

// Adds a block of keys to the states of `count` <= MR dense queries. scores (MR, block) are scratch.
template <class StateOf, class Lanes>
static void attend_block(const float* columns, int64_t count, const float* turned, const float* values, int64_t length,
                         int64_t D, int64_t padded, float* scores, const StateOf& state_of, const Lanes& lanes) {
    products_of_block(columns, count, turned, length, D, padded, scores);
    for (int64_t r = 0; r < count; ++r) {
        float* row = scores + r * block;
        const State state = state_of(r);
        vf most = broadcast(none);
        for (int64_t k = 0; k < length; k += W) most = max_or_second(most, choose(lanes(r, k), load(row + k), broadcast(none)));
        state.raise(largest(most), padded);
        const vf top = broadcast(*state.top);
        vf total = {};
        for (int64_t k = 0; k < length; k += W) {
            const vf p = choose(lanes(r, k), weight(load(row + k), top), vf{});
            total += p;
            store(row + k, p);
        }
        *state.total += sum_of(total);
    }
    for (int64_t d = 0; d < padded; d += NR) {
        float tile[MR * NR];
        product_over_keys(count, scores, values + d, padded, length, tile);
        for (int64_t r = 0; r < count; ++r)
            for (int i = 0; i < NR; i += W) {
                float* out = state_of(r).sums + d + i;
                store(out, load(out) + load(tile + r * NR + i));
            }
    }
}

// out and logsum of row (b, h, i) from the states of all chunks.
template <class T>
static void join(const Cut& cut, int64_t row, const float* tops, const float* totals, const float* sums, float* joined,
                 const View& out, const View& logsum) {
    const int64_t b = row / (cut.H * cut.N), inside = row % (cut.H * cut.N), step = cut.H * cut.N;
    float top = none, total = 0;
    for (int64_t c = 0; c < cut.chunks; ++c) {
        const int64_t at = cut.partial(b, c, 0) + inside;
        if (totals[at] != 0 && !(tops[at] <= top)) top = tops[at];
    }
    clear(joined, cut.padded);
    for (int64_t c = 0, at = cut.partial(b, 0, 0) + inside; c < cut.chunks; ++c, at += step) {
        if (totals[at] == 0) continue;
        const vf factor = weight(broadcast(tops[at]), broadcast(top));
        total += totals[at] * factor[0];
        for (int64_t d = 0; d < cut.padded; d += W)
            store(joined + d, fma(load(sums + at * cut.padded + d), factor, load(joined + d)));
    }
    const bool attends = total != 0;
    logsum.as<float>()[row] = attends ? top + log(broadcast(total))[0] : 0.0f;
    if (attends)
        for (int64_t d = 0; d < cut.padded; d += W) store(joined + d, load(joined + d) / total);
    row_from_float(joined, cut.D, out.as<T>() + row * cut.D);
}

template <class T>
static void forward(const View& query, const View& key, const View& value, const View& words, float scale, bool empty_all,
                    const View& out, const View& logsum, int threads) {
    const Cut cut(query, key, threads);
    const int64_t N = cut.N, padded = cut.padded;
    Masks masks(words, empty_all);
    Scratch memory;
    float* queries = memory.take<float>(cut.rows(), padded);  // scaled
    float* tops = memory.take<float>(cut.rows(), cut.chunks);
    float* totals = memory.take<float>(cut.rows(), cut.chunks);
    float* sums = memory.take<float>(cut.rows(), cut.chunks, padded);
    const int64_t matrix = (block + NR) * padded;
    const int64_t scratch_floats = round_up(3 * matrix + MR * (block + padded) + padded, 16) + Attended::ints(N);
    float* scratch = memory.take<float>(threads, scratch_floats);
    masks.find_empty(cut.B, threads, memory);
    parallel_for(cut.B * cut.H, grain_of(N * padded), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i)
            pack_rows<T>(query, i / cut.H, i % cut.H, 0, N, padded, scale, queries + i * N * padded);
    });
    parallel_for(cut.tasks(), 1, threads, [&](int64_t begin, int64_t end, int worker) {
        float* keys = scratch + worker * scratch_floats;  // (block, padded)
        float* values = keys + matrix;
        float* turned = values + matrix;       // [slice][padded][NR]
        float* scores = turned + matrix;       // (MR, block)
        float* columns = scores + MR * block;  // [D][MR]
        Attended attended(reinterpret_cast<int32_t*>(scratch + (worker + 1) * scratch_floats - Attended::ints(N)), N);
        for (int64_t i = begin; i < end; ++i) {
            const Task task(cut, i);
            for (int64_t h = task.head; h < task.heads; ++h) {
                const int64_t at = cut.partial(task.b, task.c, h);
                for (int64_t r = 0; r < N; ++r) tops[at + r] = none, totals[at + r] = 0;
                clear(sums + at * padded, N * padded);
            }
            for (int64_t j = task.first; j < task.last; ++j) {
                const int64_t first = j * block, length = smaller(cut.S - first, block);
                masks.list(task.b, N, first, length, attended);
                if (attended.queries() == 0) continue;
                for (int64_t h = task.head; h < task.heads; ++h) {
                    const float* rows = queries + (task.b * cut.H + h) * N * padded;
                    const int64_t at = cut.partial(task.b, task.c, h);
                    const auto state_of = [&](int64_t r) {
                        return State{tops + at + r, totals + at + r, sums + (at + r) * padded};
                    };
                    pack_rows<T>(key, task.b, h, first, length, padded, 1.0f, keys);
                    pack_rows<T>(value, task.b, h, first, length, padded, 1.0f, values);
                    Ahead<T> ahead(cut, task, j, h, attended.queries(), key, value);
                    for (int64_t r = 0; r < attended.sparse_count; ++r) {
                        ahead.some(1);
                        const int64_t q = attended.sparse[r];
                        attend_list(rows + q * padded, keys, values, padded, attended.lists + q * block, attended.counts[q],
                                    scores, state_of(q));
                    }
                    if (attended.dense_count == 0) continue;
                    turn_rows(keys, length, padded, turned);
                    const Groups groups(attended.dense_count);
                    for (int64_t g = 0; g < groups.count; ++g) {
                        const int32_t* of = attended.dense + groups.begin(g);
                        const int64_t count = groups.begin(g + 1) - groups.begin(g);
                        ahead.some(count);
                        bool all[MR];
                        for (int64_t r = 0; r < count; ++r) all[r] = masks.whole(task.b, of[r]);
                        pack_columns(rows, padded, of, count, cut.D, columns);
                        attend_block(
                            columns, count, turned, values, length, cut.D, padded, scores,
                            [&](int64_t r) { return state_of(of[r]); },
                            [&](int64_t r, int64_t k) { return masks.lanes(task.b, of[r], first, length, k, all[r]); });
                    }
                }
            }
        }
    });
    parallel_for(cut.rows(), grain_of(cut.chunks * padded), threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t row = begin; row < end; ++row)
            join<T>(cut, row, tops, totals, sums, scratch + worker * scratch_floats, out, logsum);
    });
}

void mask_attention(const View& query, const View& key, const View& value, const View& words, double scale, bool empty_all,
                    const View& out, const View& logsum, int threads) {
    SPROMPT_FLOAT_TYPES(query.dtype, T,
                        forward<T>(query, key, value, words, static_cast<float>(scale), empty_all, out, logsum, threads))
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
