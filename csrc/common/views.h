// A View describes a tensor to a kernel: pointer, element type, int64 sizes and int64 strides (in elements). Views describes a
// list of tensors, such as the levels of a pyramid.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace sprompt {

enum class DType : int32_t { none = 0, f32, f64, f16, bf16, u8, i8, i16, i32, i64, b8 };

constexpr int max_rank = 6, max_views = 8;

struct View {
    void* data = nullptr;  // null: the argument was None
    DType dtype = DType::none;
    int32_t rank = 0;
    int64_t size[max_rank] = {};
    int64_t stride[max_rank] = {};

    template <class T>
    SPROMPT_INLINE T* as() const {
        return static_cast<T*>(data);
    }
    SPROMPT_INLINE bool given() const { return dtype != DType::none; }
};

struct Views {
    int32_t count = 0;
    View view[max_views];
};

}  // namespace sprompt
