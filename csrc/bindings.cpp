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
#include "linear_assignment/linear_assignment.h"
// mask_conv
#include "mask_conv/mask_conv.h"

// mask_loss
#include "mask_loss/mask_loss.h"
// masks
#include "masks/masks.h"
// mask_nms
#include "mask_nms/mask_nms.h"

// match_cost
#include "match_cost/match_cost.h"
// prompts
#include "prompts/prompts.h"

// resize_masks
#include "resize_masks/resize_masks.h"
// rle
#include "rle/rle.h"

// saliency_masks
#include "saliency_masks/saliency_masks.h"

namespace py = pybind11;

namespace {

// torch.dtype objects, by identity, as set_dtypes gives them.
std::vector<std::pair<PyObject*, sprompt::DType>> dtypes;

void set_dtypes(const py::dict& codes) {
    dtypes.clear();
    for (const auto& item : codes) dtypes.emplace_back(item.first.ptr(), static_cast<sprompt::DType>(item.second.cast<int>()));
    for (const auto& item : dtypes) Py_INCREF(item.first);
}

}  // namespace

namespace pybind11::detail {

#ifdef SPROMPT_CUDA
template <>
struct type_caster<sprompt::Stream> {
    PYBIND11_TYPE_CASTER(sprompt::Stream, const_name("tuple[int, int]"));

    bool load(handle pair, bool) {
        if (!PyTuple_Check(pair.ptr()) || PyTuple_GET_SIZE(pair.ptr()) != 2) return false;
        value.device = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(pair.ptr(), 0)));
        value.handle = PyLong_AsVoidPtr(PyTuple_GET_ITEM(pair.ptr(), 1));
        return !PyErr_Occurred();
    }
};
#endif

template <>
struct type_caster<sprompt::View> {
    PYBIND11_TYPE_CASTER(sprompt::View, const_name("torch.Tensor | None"));

    // Runs for every tensor of every call, so it speaks to the interpreter directly: about half a microsecond.
    bool load(handle tensor, bool) {
        static PyObject *const dtype_name = PyUnicode_InternFromString("dtype"),
                               *const shape_name = PyUnicode_InternFromString("shape"),
                               *const stride_name = PyUnicode_InternFromString("stride"),
                               *const data_ptr_name = PyUnicode_InternFromString("data_ptr");
        if (tensor.is_none()) return true;
        const auto dtype = reinterpret_steal<object>(PyObject_GetAttr(tensor.ptr(), dtype_name));
        const auto shape = reinterpret_steal<object>(PyObject_GetAttr(tensor.ptr(), shape_name));
        const auto stride = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor.ptr(), stride_name));
        const auto address = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr_name));
        if (!dtype || !shape || !stride || !address) throw error_already_set();
        for (const auto& known : dtypes)
            if (known.first == dtype.ptr()) value.dtype = known.second;
        if (value.dtype == sprompt::DType::none || !PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr())) return false;
        const Py_ssize_t rank = PyTuple_GET_SIZE(shape.ptr());
        if (rank > sprompt::max_rank) return false;
        value.rank = static_cast<int32_t>(rank);
        for (Py_ssize_t i = 0; i < rank; ++i) {
            value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
            value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
        }
        value.data = PyLong_AsVoidPtr(address.ptr());
        return !PyErr_Occurred();
    }
};

}  // namespace pybind11::detail

// Defines the Python function `name` as the kernel of that name at the level in force.
#define SPROMPT_DEF(name) module.def(#name, SPROMPT_PICK(name), py::call_guard<py::gil_scoped_release>())

#ifdef SPROMPT_CUDA
// Defines the Python function `name` as the CUDA kernel of that name.
#define SPROMPT_DEF_CUDA(name) cuda.def(#name, &sprompt::cuda::name, py::call_guard<py::gil_scoped_release>())

static void define_cuda(py::module_& module) {
    py::module_ cuda = module.def_submodule("cuda");
    cuda.attr("emulated") = SPROMPT_CUDA_EMULATED;
    cuda.attr("architectures") = SPROMPT_CUDA_ARCHITECTURES;

    // masks
    SPROMPT_DEF_CUDA(pack_masks);
    SPROMPT_DEF_CUDA(unpack_masks);
    SPROMPT_DEF_CUDA(mask_area);
    SPROMPT_DEF_CUDA(mask_boxes);
    SPROMPT_DEF_CUDA(mask_iou);
    SPROMPT_DEF_CUDA(window_masks);

    // mask_nms
    SPROMPT_DEF_CUDA(mask_nms);
    SPROMPT_DEF_CUDA(matrix_nms);

    // linear_assignment
    SPROMPT_DEF_CUDA(linear_assignment);

    // resize_masks
    SPROMPT_DEF_CUDA(resize_masks);
    SPROMPT_DEF_CUDA(resize_bits);

    // rle
    SPROMPT_DEF_CUDA(rle_measure);
    SPROMPT_DEF_CUDA(rle_write);
}
#endif

PYBIND11_MODULE(_C, module) {
    if (const char* refusal = sprompt::choose_level()) throw py::import_error(refusal);
    module.def("set_dtypes", &set_dtypes);
    module.def("level", [] { return sprompt::level_name(sprompt::level()); });
    module.def("best_level", [] { return sprompt::level_name(sprompt::best_level()); });
    module.def("thread_source", &sprompt::thread_source);
    module.attr("build") = SPROMPT_BUILD;

#ifdef SPROMPT_CUDA
    define_cuda(module);
#endif

    // masks
    SPROMPT_DEF(pack_masks);
    SPROMPT_DEF(unpack_masks);
    SPROMPT_DEF(mask_area);
    SPROMPT_DEF(mask_boxes);
    SPROMPT_DEF(mask_iou);
    SPROMPT_DEF(window_masks);
    // mask_nms
    SPROMPT_DEF(mask_nms);
    SPROMPT_DEF(matrix_nms);
    module.attr("nms_scratch_per_mask") = sprompt::nms_scratch_per_mask;

    // saliency_masks
    SPROMPT_DEF(saliency_bits);
    SPROMPT_DEF(saliency_soft);
    SPROMPT_DEF(saliency_maps);

    // prompts
    SPROMPT_DEF(region_mean);
    SPROMPT_DEF(mask_mean);
    SPROMPT_DEF(region_mean_backward);
    SPROMPT_DEF(mask_mean_backward);
    SPROMPT_DEF(prompt_match);
    SPROMPT_DEF(prompt_match_backward);

    // mask_conv
    SPROMPT_DEF(mask_update);
    SPROMPT_DEF(mask_update_backward);

    // match_cost
    SPROMPT_DEF(match_cost);
    // linear_assignment
    SPROMPT_DEF(linear_assignment);

    // mask_loss
    SPROMPT_DEF(mask_loss);
    SPROMPT_DEF(mask_loss_backward);
    // resize_masks
    SPROMPT_DEF(resize_masks);
    SPROMPT_DEF(resize_bits);

    // rle
    SPROMPT_DEF(rle_bounds);
    SPROMPT_DEF(rle_encode);
    SPROMPT_DEF(rle_join);
    SPROMPT_DEF(rle_decode);
    module.def("rle_scratch", [](int64_t height, int64_t width) { return sprompt::rle_scratch(height, width); });
}
