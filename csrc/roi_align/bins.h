// The weights of rows and columns in the bins of boxes.
#pragma once

#include "common/lanes.h"
#include "common/scratch.h"
#include "common/threads.h"

namespace sprompt {
namespace SPROMPT_ISA {

// The cells of one axis in every bin. Bin i has the cells begin[i] to begin[i + 1], each once, and none of weight 0.
struct Axis {
    int32_t *begin, *cell;
    float* weight;
    int64_t size;  // number of bins
};

struct Sampling {
    int64_t size, number;  // bins of a side, and samples of a side of a bin

    // Cells of all bins of an axis, and so blocks of columns, at most.
    SPROMPT_INLINE int64_t most() const { return 2 * size * number; }
};

static void locate(float low, float high, int64_t stride, int64_t cells, const Sampling& sampling, const Axis& out) {
    const float pixels = static_cast<float>(stride), end = static_cast<float>(cells);
    const float extent = high > low ? high - low : 0.0f, start = low / pixels - 0.5f;
    const float step = extent / pixels / static_cast<float>(sampling.size * sampling.number);
    const float unit = 1.0f / static_cast<float>(sampling.number);
    int32_t count = 0;
    for (int64_t bin = 0; bin < sampling.size; ++bin) {
        const int32_t first = out.begin[bin] = count;
        // Samples ascend, so a cell that the bin has already is one of the last two.
        const auto add = [&](int32_t cell, float weight) {
            for (int32_t i = count - 1; i >= first && i >= count - 2; --i)
                if (out.cell[i] == cell) {
                    out.weight[i] += weight;
                    return;
                }
            out.cell[count] = cell;
            out.weight[count++] = weight;
        };
        for (int64_t i = bin * sampling.number; i < (bin + 1) * sampling.number; ++i) {
            float at = start + (static_cast<float>(i) + 0.5f) * step;
            if (!(at >= -1.0f && at <= end)) continue;
            at = at < 0.0f ? 0.0f : at > end - 1.0f ? end - 1.0f : at;
            const int32_t cell = static_cast<int32_t>(at);
            const float after = at - static_cast<float>(cell);
            add(cell, (1.0f - after) * unit);
            if (after > 0.0f) add(cell + 1, after * unit);
        }
    }
    out.begin[sampling.size] = count;
}

// The columns that a box needs, in blocks of `width` neighbouring columns: W where rows are contiguous in memory, else 1.
struct Blocks {
    int32_t* start;
    int32_t count;
};

// Changes the cells of columns to places in the blocks. The blocks lie inside a row of `cells` cells if it has so many.
static void to_blocks(const Axis& columns, int64_t width, int64_t cells, Blocks& blocks) {
    const int32_t last = static_cast<int32_t>(cells > width ? cells - width : 0);
    blocks.count = 0;
    for (int32_t i = 0; i < columns.begin[columns.size]; ++i) {
        const int32_t cell = columns.cell[i];
        if (blocks.count == 0 || cell >= blocks.start[blocks.count - 1] + width)
            blocks.start[blocks.count++] = cell < last ? cell : last;
        // A bin may begin one cell before the last cell of the bin before it. If that cell began a block, the block before
        // it ends at this one, so the difference below is -1.
        columns.cell[i] = static_cast<int32_t>((blocks.count - 1) * width) + cell - blocks.start[blocks.count - 1];
    }
}

struct Box {
    int32_t level;  // -1: the box is not read
    Axis rows, columns;
    Blocks blocks;
};

SPROMPT_INLINE bool contiguous_rows(const View& map) { return map.stride[3] == 1 || map.size[3] <= 1; }
SPROMPT_INLINE int64_t block_width(const View& map) { return contiguous_rows(map) ? W : 1; }

// The level of a box of finite numbers: floor(log2 t) is at least v where t is at least 2^v.
static int32_t level_of(const float* box, int32_t levels) {
    const float width = box[2] > box[0] ? box[2] - box[0] : 0.0f, height = box[3] > box[1] ? box[3] - box[1] : 0.0f;
    const float t = __builtin_sqrtf(width * height) / 56.0f + 1e-6f;
    int32_t level = 0;
    for (float power = 2.0f; level + 1 < levels && t >= power; power *= 2.0f) ++level;
    return level;
}

// All boxes (B * N), located in their maps.
static Box* locate_boxes(const Views& maps, const View& boxes, const View& counts, const View& strides,
                         const Sampling& sampling, int threads, Scratch& memory) {
    const int64_t N = boxes.size[1], total = boxes.size[0] * N, most = sampling.most();
    Box* located = memory.take<Box>(total);
    int32_t* begins = memory.take<int32_t>(total, 2, sampling.size + 1);
    int32_t* cells = memory.take<int32_t>(total, 3, most);
    float* weights = memory.take<float>(total, 2, most);
    parallel_for(total, 16, threads, [&](int64_t from, int64_t to, int) {
        for (int64_t i = from; i < to; ++i) {
            Box& box = located[i];
            box.level = -1;
            if (counts.given() && i % N >= counts.as<const int64_t>()[i / N * counts.stride[0]]) continue;
            const float* p = boxes.as<const float>() + 4 * i;
            bool finite = true;
            for (int k = 0; k < 4; ++k) finite = finite && p[k] - p[k] == 0.0f;
            if (!finite) continue;
            const int32_t level = level_of(p, maps.count);
            const View& map = maps.view[level];
            const int64_t height = map.size[2], width = map.size[3], stride = strides.as<const int64_t>()[level];
            if (height == 0 || width == 0) continue;
            box.level = level;
            int32_t *begin = begins + 2 * i * (sampling.size + 1), *cell = cells + 3 * i * most;
            float* weight = weights + 2 * i * most;
            box.rows = {begin, cell, weight, sampling.size};
            box.columns = {begin + sampling.size + 1, cell + most, weight + most, sampling.size};
            box.blocks = {cell + 2 * most, 0};
            locate(p[1], p[3], stride, height, sampling, box.rows);
            locate(p[0], p[2], stride, width, sampling, box.columns);
            to_blocks(box.columns, block_width(map), width, box.blocks);
        }
    });
    return located;
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
