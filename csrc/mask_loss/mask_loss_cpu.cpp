#include "mask_loss/mask_loss.h"

#include "common/scratch.h"
#include "common/targets.h"
#include "common/threads.h"
#include "common/upsample.h"
#include "common/vmath.h"

namespace sprompt {
namespace SPROMPT_ISA {

// Rows of a mask per chunk of parallel work: rows of the upsampled map (forward) and of the gradient (backward).
constexpr int64_t forward_rows = 64, backward_rows = 32;

// Scratch memory of the workers. Each worker has `count` rows of `length` floats, a whole number of cache lines.
struct Rows {
    float* data;
    int64_t count, length;

    SPROMPT_INLINE float* of(int worker) const { return data + worker * count * length; }
};
static Rows rows_for(const View& logits, int64_t u, int64_t count, int threads, Scratch& memory) {
    const int64_t length = (u * logits.size[2] + 2 * u + 64 + 15) / 16 * 16;
    return {memory.take<float>(threads, count, length), count, length};
}

// One mask's logits and targets, and a worker's rows.
struct Mask {
    const char* logits;
    DType dtype;
    int64_t row_stride, h, w, u, width;
    TargetMap target;
    float *low, *stretched, *target_buffer, *zeros;
};

static Mask mask_of(const View& logits, const View& targets, int64_t ratio, int64_t u, int64_t m, const Rows& buffers,
                    int worker) {
    const int64_t h = logits.size[1], w = logits.size[2], slot = buffers.length;
    const int64_t bytes = logits.dtype == DType::f32 ? 4 : 2;
    float* rows = buffers.of(worker);
    return {logits.as<const char>() + m * logits.stride[0] * bytes,
            logits.dtype,
            logits.stride[1],
            h,
            w,
            u,
            u * w,
            target_map(targets, m * targets.stride[0], ratio, u * w),
            rows + 16,
            rows + slot,
            rows + 2 * slot,
            rows + 3 * slot};
}

// Row Y of the target, with zeros behind it.
SPROMPT_INLINE const float* target_of(const Mask& mask, int64_t Y) {
    if (mask.target.dtype == DType::f32 && mask.width % W == 0)
        return static_cast<const float*>(mask.target.data) + Y * mask.target.row_stride;
    return target_row(mask.target, Y, mask.target_buffer) ? mask.target_buffer : mask.zeros;
}
static void clear(float* row, int64_t n) {
    for (int64_t x = 0; x < n; ++x) row[x] = 0.0f;
}

// Sums of one chunk of rows of one mask: bce, p t, p^2, t^2. They are summed over each row first, then over the rows, so that
// each float sum has few terms.
static void chunk_sums(const Mask& mask, int64_t begin, int64_t end, float* out) {
    vf total[4] = {};
    for (int64_t Y = begin; Y < end; ++Y) {
        const float* target = target_of(mask, Y);
        upsampled_low_row(mask.dtype, mask.logits, mask.row_stride, mask.h, mask.w, mask.u, Y, mask.low);
        vf bce = {}, pt = {}, pp = {}, tt = {};
        for_each_stretched(mask.low, mask.w, mask.u, mask.stretched, [&](int64_t X, vf z) __attribute__((always_inline)) {
            const vf t = load(target + X), zero = {};
            const vf e = exp_small(max_or_second(broadcast(-87.3f), -absolute(z)));
            const vf inverse = 1.0f / (e + 1.0f);
            const vf p = select(z < zero, e * inverse, inverse);
            bce += log1p_unit(e) + fma(-z, t, max_or_second(zero, z));
            pt = fma(p, t, pt);
            pp = fma(p, p, pp);
            tt = fma(t, t, tt);
        });
        total[0] += bce;
        total[1] += pt;
        total[2] += pp;
        total[3] += tt;
    }
    for (int i = 0; i < 4; ++i) out[i] = sum(total[i]);
}

void mask_loss(const View& logits, const View& targets, int64_t ratio, int64_t upsample, const View& bce, const View& dice,
               const View& sums, int threads) {
    const int64_t M = logits.size[0], u = upsample, H = u * logits.size[1], pixels = H * u * logits.size[2];
    const int64_t chunks = pixels > 0 ? (H + forward_rows - 1) / forward_rows : 0;
    Scratch memory;
    const Rows buffers = rows_for(logits, u, 4, threads, memory);
    float* partial = memory.take<float>(M, chunks, 4);
    parallel_for(M * chunks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t job = begin; job < end; ++job) {
            const Mask mask = mask_of(logits, targets, ratio, u, job / chunks, buffers, worker);
            const int64_t first = job % chunks * forward_rows;
            clear(mask.zeros, buffers.length);
            chunk_sums(mask, first, first + forward_rows < H ? first + forward_rows : H, partial + 4 * job);
        }
    });
    for (int64_t m = 0; m < M; ++m) {
        double total[4] = {};
        for (int64_t c = 0; c < chunks; ++c)
            for (int i = 0; i < 4; ++i) total[i] += partial[4 * (m * chunks + c) + i];
        bce.as<float>()[m] = static_cast<float>(pixels > 0 ? total[0] / static_cast<double>(pixels) : 0.0);
        dice.as<float>()[m] = static_cast<float>(1.0 - 2.0 * total[1] / (total[2] + total[3] + 2e-3));
        for (int i = 0; i < 3; ++i) sums.as<float>()[3 * m + i] = static_cast<float>(total[1 + i]);
    }
}

// A mask's gradient with respect to z: bce (p - t) + p (1 - p) (toward t + away p).
struct Slopes {
    float bce, toward, away;
};
static Slopes slopes_of(float grad_bce, float grad_dice, const float* sums, int64_t pixels) {
    const double denominator = static_cast<double>(sums[1]) + static_cast<double>(sums[2]) + 2e-3;
    return {static_cast<float>(grad_bce / static_cast<double>(pixels)), static_cast<float>(-2.0 * grad_dice / denominator),
            static_cast<float>(4.0 * grad_dice * sums[0] / (denominator * denominator))};
}

// slope[0 .. width) <- the gradient with respect to row Y of the upsampled logits.
static void slope_row(const Mask& mask, const Slopes& slopes, int64_t Y, float* slope) {
    const float* target = target_of(mask, Y);
    upsampled_low_row(mask.dtype, mask.logits, mask.row_stride, mask.h, mask.w, mask.u, Y, mask.low);
    const vf bce = broadcast(slopes.bce), toward = broadcast(slopes.toward), away = broadcast(slopes.away);
    for_each_stretched(mask.low, mask.w, mask.u, mask.stretched, [&](int64_t X, vf z) __attribute__((always_inline)) {
        const vf t = load(target + X), zero = {};
        const vf e = exp_small(max_or_second(broadcast(-87.3f), -absolute(z)));
        const vf inverse = 1.0f / (e + 1.0f), far = e * inverse;
        const vf p = select(z < zero, far, inverse);
        store(slope + X, fma(bce, p - t, far * inverse * fma(away, p, toward * t)));
    });
}

// Rows [begin, end) of the gradient of one mask. At any time two rows of it are incomplete and held in floats. Each row is
// converted once, when it is complete.
template <class T>
static void chunk_gradient(const Mask& mask, const Slopes& slopes, int64_t begin, int64_t end, float* const* rows, T* out) {
    float *slope = rows[0] + 16, *collapsed = rows[1];
    if (mask.u == 1) {
        for (int64_t y = begin; y < end; ++y) {
            slope_row(mask, slopes, y, slope);
            row_from_float(slope, mask.w, out + y * mask.w);
        }
        return;
    }
    const auto open = [&](int64_t y) { return rows[2 + (y & 1)]; };
    clear(open(0), mask.w);
    clear(open(1), mask.w);
    const auto add = [&](int64_t y, float weight) {
        if (y < begin || y >= end || weight == 0.0f) return;
        float* row = open(y);
        int64_t x = 0;
        for (; x + W <= mask.w; x += W) store(row + x, fma(broadcast(weight), load(collapsed + x), load(row + x)));
        for (; x < mask.w; ++x) row[x] += weight * collapsed[x];
    };
    int64_t done = begin;
    const auto close_until = [&](int64_t y) {
        for (; done < y; ++done) {
            row_from_float(open(done), mask.w, out + done * mask.w);
            clear(open(done), mask.w);
        }
    };
    const int64_t first = mask.u * (begin > 0 ? begin - 1 : 0), last = mask.u * (end < mask.h ? end + 1 : mask.h);
    for (int64_t Y = first; Y < last; ++Y) {
        const RowPair pair = row_pair(Y, mask.h, mask.u);
        if (pair.b < begin || pair.a >= end) continue;
        close_until(pair.a);
        slope_row(mask, slopes, Y, slope);
        collapse_row(slope, mask.w, mask.u, collapsed);
        add(pair.a, pair.weight_a);
        add(pair.b, pair.weight_b);
    }
    close_until(end);
}

void mask_loss_backward(const View& grad_bce, const View& grad_dice, const View& logits, const View& targets, const View& sums,
                        int64_t ratio, int64_t upsample, const View& grad, int threads) {
    const int64_t M = logits.size[0], h = logits.size[1], w = logits.size[2], u = upsample;
    if (h * w == 0) return;
    const int64_t chunks = (h + backward_rows - 1) / backward_rows;
    Scratch memory;
    const Rows buffers = rows_for(logits, u, 8, threads, memory);
    parallel_for(M * chunks, 1, threads, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t job = begin; job < end; ++job) {
            const int64_t m = job / chunks, first = job % chunks * backward_rows;
            const Mask mask = mask_of(logits, targets, ratio, u, m, buffers, worker);
            clear(mask.zeros, buffers.length);
            float* rows[4];
            for (int i = 0; i < 4; ++i) rows[i] = mask.zeros + (1 + i) * buffers.length;
            const Slopes slopes = slopes_of(grad_bce.as<const float>()[m * grad_bce.stride[0]],
                                            grad_dice.as<const float>()[m * grad_dice.stride[0]],
                                            sums.as<const float>() + m * sums.stride[0], u * h * u * w);
            SPROMPT_FLOAT_TYPES(grad.dtype, T, {
                chunk_gradient(mask, slopes, first, first + backward_rows < h ? first + backward_rows : h, rows,
                               grad.as<T>() + m * h * w);
            })
        }
    });
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
