// The Python module sprompt._C: one function a kernel, with the arguments of its header; no logic. Tensors are read by
// their public methods (data_ptr, shape, stride, dtype), so the module links to no version of torch. The interpreter lock
// is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/threads.h"
#include "common/views.h"
// One header a room.
// linear_assignment

// mask_conv

// mask_loss

// masks
#include "masks/masks.h"
// mask_nms

// match_cost

// prompts

// resize_masks

// rle
#include "rle/rle.h"

// saliency_masks

namespace py = pybind11;

namespace {

// torch.dtype objects, by identity, as set_dtypes gives them.
std::vector<std::pair<PyObject*, sprompt::DType>> dtypes;

void set_dtypes(const py::dict& codes) {
    dtypes.clear();
    for (const auto& item : codes)
        dtypes.emplace_back(item.first.ptr(), static_cast<sprompt::DType>(item.second.cast<int>()));
    for (const auto& item : dtypes) Py_INCREF(item.first);
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<sprompt::View> {
    PYBIND11_TYPE_CASTER(sprompt::View, const_name("torch.Tensor | None"));

    bool load(handle tensor, bool) {
        if (tensor.is_none()) return true;
        const object dtype = tensor.attr("dtype");
        for (const auto& known : dtypes)
            if (known.first == dtype.ptr()) value.dtype = known.second;
        if (value.dtype == sprompt::DType::none) return false;
        const tuple shape(tensor.attr("shape")), stride(tensor.attr("stride")());
        if (shape.size() > sprompt::max_rank) return false;
        value.rank = static_cast<int32_t>(shape.size());
        for (size_t i = 0; i < shape.size(); ++i) {
            value.size[i] = shape[i].cast<int64_t>();
            value.stride[i] = stride[i].cast<int64_t>();
        }
        value.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
        return true;
    }
};

}  // namespace pybind11::detail

// Defines the Python function `name` as the kernel of that name at the level in force.
#define SPROMPT_DEF(name) module.def(#name, SPROMPT_PICK(name), py::call_guard<py::gil_scoped_release>())

PYBIND11_MODULE(_C, module) {
    if (const char* refusal = sprompt::choose_level()) throw py::import_error(refusal);
    module.def("set_dtypes", &set_dtypes);
    module.def("level", [] { return sprompt::level_name(sprompt::level()); });
    module.def("best_level", [] { return sprompt::level_name(sprompt::best_level()); });
    module.def("thread_source", &sprompt::thread_source);
    module.attr("build") = SPROMPT_BUILD;

    // masks
    SPROMPT_DEF(pack_masks);
    SPROMPT_DEF(unpack_masks);
    SPROMPT_DEF(mask_area);
    SPROMPT_DEF(mask_boxes);
    SPROMPT_DEF(mask_iou);
    SPROMPT_DEF(window_masks);
    // mask_nms

    // saliency_masks

    // prompts

    // mask_conv

    // match_cost

    // linear_assignment

    // mask_loss

    // resize_masks

    // rle
    SPROMPT_DEF(rle_bounds);
    SPROMPT_DEF(rle_encode);
    SPROMPT_DEF(rle_join);
    SPROMPT_DEF(rle_decode);
    module.def("rle_scratch", [](int64_t height, int64_t width) { return sprompt::rle_scratch(height, width); });
}
