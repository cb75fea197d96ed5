// The cells of a map, read row by row as floats.
#pragma once

#include "common/half.h"

namespace sprompt {
namespace SPROMPT_ISA {

SPROMPT_INLINE vf held(vf x) {  // clamps to +-2^127; NaN stays
    x = x > broadcast(0x1p127f) ? broadcast(0x1p127f) : x;
    return x < broadcast(-0x1p127f) ? broadcast(-0x1p127f) : x;
}

// A map of any strides. row() returns the first `used` cells of row y as contiguous floats, in place or in `buffer` (used,
// padded to 32).
template <class T>
struct Dense {
    const T* data;
    int64_t row_stride, column_stride;
    SPROMPT_INLINE const float* row(int64_t y, int64_t used, float* buffer) const {
        const T* p = data + y * row_stride;
        if (column_stride == 1) return unit(p, used, buffer);
        for (int64_t i = 0; i < used; ++i) buffer[i] = to_float(p[i * column_stride]);
        return buffer;
    }
    static SPROMPT_INLINE const float* unit(const float* p, int64_t, float*) { return p; }
    template <class U>
    static SPROMPT_INLINE const float* unit(const U* p, int64_t used, float* buffer) {
        row_to_float(p, used, buffer);
        return buffer;
    }
};

// cells[index[0 .. W)].
SPROMPT_INLINE vf gather(const float* cells, const int32_t* index) {
#if defined(__AVX512F__)
    return (vf)_mm512_i32gather_ps((__m512i)load(index), cells, 4);
#else
    vf x;
    for (int k = 0; k < W; ++k) x[k] = cells[index[k]];
    return x;
#endif
}

}  // namespace SPROMPT_ISA
}  // namespace sprompt
