// The Python module sprompt._C has one function per kernel, with the arguments of the kernel's declaration, by position. This
// file names no kernel. CMake writes kernels.h, which includes every csrc/<op>/<op>.h. In this file SPROMPT_KERNEL and
// SPROMPT_CUDA_KERNEL (common/isa.h, common/cuda.h) also bind the kernel that they declare.
//
// The module reads tensors through DLPack's table of C functions, or by their public methods. So it does not link to torch. The
// interpreter lock is released while a kernel runs.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cuda.h"
#include "common/isa.h"
#include "common/scratch.h"
#include "common/threads.h"
#include "common/views.h"

namespace sprompt {
namespace python {

// ---- Reads a tensor by DLPack's "C exchange API" (torch 2.10 and later, dlpack.h 1.3). The API is a table of C functions. A
// capsule in the attribute __dlpack_c_exchange_api__ of the type holds it. About 20 ns per tensor. The structs are copied from
// dlpack.h.

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t rank;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*tensor_from_object)(void* object, DLTensor* out);  // borrows; returns 0, or -1 with a Python exception
    void* current_stream;
};

// The table of a type, or null. The function remembers the type of the last call.
const ExchangeApi* exchange_api(PyTypeObject* type) {
    static PyTypeObject* known = nullptr;
    static const ExchangeApi* api = nullptr;
    if (type == known) return api;
    PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    const ExchangeApi* found = nullptr;
    if (capsule != nullptr && PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        found = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    PyErr_Clear();
    Py_XDECREF(capsule);
    while (found != nullptr && found->major != 1) found = found->previous;
    if (found != nullptr && found->tensor_from_object == nullptr) found = nullptr;
    Py_INCREF(type);
    Py_XDECREF(known);
    known = type;
    return api = found;
}

DType dtype_of(const DLTensor& tensor) {
    static constexpr struct {
        uint8_t code, bits;
        DType dtype;
    } known[] = {{0, 8, DType::i8},   {0, 16, DType::i16}, {0, 32, DType::i32}, {0, 64, DType::i64},  {1, 8, DType::u8},
                 {2, 16, DType::f16}, {2, 32, DType::f32}, {2, 64, DType::f64}, {4, 16, DType::bf16}, {6, 8, DType::b8}};
    for (const auto& type : known)
        if (type.code == tensor.code && type.bits == tensor.bits && tensor.lanes == 1) return type.dtype;
    return DType::none;
}

// Returns false with a Python exception set, or without one if the kernels do not support such tensors.
bool read_exchanged(const ExchangeApi& api, PyObject* object, View& view) {
    DLTensor tensor;
    if (api.tensor_from_object(object, &tensor) != 0) return false;
    view.dtype = dtype_of(tensor);
    if (view.dtype == DType::none || tensor.rank > max_rank) return false;
    view.rank = tensor.rank;
    for (int i = 0; i < tensor.rank; ++i) {
        view.size[i] = tensor.shape[i];
        view.stride[i] = tensor.strides[i];
    }
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    return true;
}

// ---- Reads a tensor by its public methods: dtype, shape, stride(), data_ptr(). About half a microsecond per tensor.

// The torch.dtype objects that set_dtypes received, compared by identity.
std::vector<std::pair<PyObject*, DType>> dtypes;

struct Object {  // owns a reference
    PyObject* pointer;
    explicit Object(PyObject* owned) : pointer(owned) {}
    Object(const Object&) = delete;
    ~Object() { Py_XDECREF(pointer); }
};

bool read_by_methods(PyObject* tensor, View& view) {
    static PyObject *const dtype_name = PyUnicode_InternFromString("dtype"),
                           *const shape_name = PyUnicode_InternFromString("shape"),
                           *const stride_name = PyUnicode_InternFromString("stride"),
                           *const data_ptr_name = PyUnicode_InternFromString("data_ptr");
    const Object dtype(PyObject_GetAttr(tensor, dtype_name));
    if (dtype.pointer == nullptr) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
        return false;
    }
    for (const auto& known : dtypes)
        if (known.first == dtype.pointer) view.dtype = known.second;
    if (view.dtype == DType::none) return false;
    const Object shape(PyObject_GetAttr(tensor, shape_name));
    if (shape.pointer == nullptr) return false;
    const Object stride(PyObject_CallMethodNoArgs(tensor, stride_name));
    if (stride.pointer == nullptr) return false;
    const Object address(PyObject_CallMethodNoArgs(tensor, data_ptr_name));
    if (address.pointer == nullptr) return false;
    if (!PyTuple_Check(shape.pointer) || !PyTuple_Check(stride.pointer)) return false;
    const Py_ssize_t rank = PyTuple_GET_SIZE(shape.pointer);
    if (rank > max_rank || PyTuple_GET_SIZE(stride.pointer) != rank) return false;
    view.rank = static_cast<int32_t>(rank);
    for (Py_ssize_t i = 0; i < rank; ++i) {
        view.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.pointer, i));
        view.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.pointer, i));
    }
    view.data = PyLong_AsVoidPtr(address.pointer);
    return PyErr_Occurred() == nullptr;
}

// ---- Arguments. read() sets `out`, or sets a Python exception and returns false.

struct Place {  // where an argument stands, for messages
    const char* function;
    int position;
};

bool wrong(const Place& place, const char* rule, PyObject* got) {
    if (PyErr_Occurred() == nullptr)
        PyErr_Format(PyExc_TypeError, "%s(): argument %d must be %s, got %R", place.function, place.position, rule, got);
    return false;
}

bool read(PyObject* object, const Place& place, View& out) {
    if (object == Py_None) return true;
    const ExchangeApi* api = exchange_api(Py_TYPE(object));
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (!(api != nullptr ? read_exchanged(*api, object, out) : read_by_methods(object, out)))
        return wrong(place, "a tensor of at most 6 dimensions and of a type in common/views.h, or None", type);
    bool readable = out.data != nullptr;
    for (int i = 0; i < out.rank; ++i) readable = readable || out.size[i] == 0;
    return readable || wrong(place, "a tensor with memory of its own", type);  // fake and meta tensors have no memory
}
static_assert(max_rank == 6, "the message above says 6");

bool read(PyObject* object, const Place& place, Views& out) {
    const bool list = PyList_Check(object);
    if (!list && !PyTuple_Check(object)) return wrong(place, "a list or tuple of tensors", object);
    const Py_ssize_t count = list ? PyList_GET_SIZE(object) : PyTuple_GET_SIZE(object);
    if (count > max_views) return wrong(place, "a list of at most 8 tensors", object);
    for (Py_ssize_t i = 0; i < count; ++i)
        if (!read(list ? PyList_GET_ITEM(object, i) : PyTuple_GET_ITEM(object, i), place, out.view[i])) return false;
    out.count = static_cast<int32_t>(count);
    return true;
}
static_assert(max_views == 8, "the message above says 8");

bool read(PyObject* object, const Place& place, bool& out) {
    if (!PyBool_Check(object)) return wrong(place, "a bool", object);
    out = object == Py_True;
    return true;
}

bool read(PyObject* object, const Place&, int64_t& out) {
    out = PyLong_AsLongLong(object);
    return out != -1 || PyErr_Occurred() == nullptr;
}

bool read(PyObject* object, const Place& place, int& out) {
    int64_t value = 0;
    if (!read(object, place, value)) return false;
    out = static_cast<int>(value);
    return out == value || wrong(place, "an int of 32 bits", object);
}

bool read(PyObject* object, const Place&, double& out) {
    out = PyFloat_AsDouble(object);
    return out != -1.0 || PyErr_Occurred() == nullptr;
}

bool read(PyObject* object, const Place& place, float& out) {
    double value = 0;
    if (!read(object, place, value)) return false;
    out = static_cast<float>(value);
    return true;
}

bool read(PyObject* object, const Place& place, Stream& out) {  // (ordinal of the device, cudaStream_t)
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2) return wrong(place, "a tuple (device, stream)", object);
    out.handle = PyLong_AsVoidPtr(PyTuple_GET_ITEM(object, 1));
    return PyErr_Occurred() == nullptr && read(PyTuple_GET_ITEM(object, 0), place, out.device);
}

// ---- Functions

PyObject* to_python(const char* text) { return PyUnicode_FromString(text); }
PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }

struct Unlocked {  // releases the interpreter lock while it lives
    PyThreadState* state = PyEval_SaveThread();
    Unlocked() = default;
    Unlocked(const Unlocked&) = delete;
    ~Unlocked() { PyEval_RestoreThread(state); }
};

// One function of the module. Its Python object holds this struct in a capsule. The struct lives as long as the process.
template <class R, class... A>
struct Function {
    PyMethodDef definition;
    R (*code)(A...);

    static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
        return call(*static_cast<Function*>(PyCapsule_GetPointer(self, nullptr)), args, count, std::index_sequence_for<A...>());
    }
    template <size_t... I>
    static PyObject* call(const Function& function, PyObject* const* args, Py_ssize_t count, std::index_sequence<I...>) {
        const char* name = function.definition.ml_name;
        if (count != static_cast<Py_ssize_t>(sizeof...(A)))
            return PyErr_Format(PyExc_TypeError, "%s() takes %zu arguments, got %zd", name, sizeof...(A), count);
        std::tuple<std::decay_t<A>...> values;
        if (!(... && read(args[I], Place{name, static_cast<int>(I) + 1}, std::get<I>(values)))) return nullptr;
        try {
            const auto run = [&] {
                const Unlocked unlocked;
                return function.code(std::get<I>(values)...);
            };
            if constexpr (std::is_void_v<R>) {
                run();
            } else {
                return to_python(run());
            }
        } catch (const std::bad_alloc&) {
            return PyErr_NoMemory();
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
            return nullptr;
        }
        Py_RETURN_NONE;
    }
};

template <class R, class... A>
PyObject* make(const char* name, R (*code)(A...)) {
    auto* function = new Function<R, A...>{{name, nullptr, METH_FASTCALL, nullptr}, code};
    PyObject* (*const call)(PyObject*, PyObject* const*, Py_ssize_t) = &Function<R, A...>::call;
    function->definition.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));
    const Object self(PyCapsule_New(function, nullptr, nullptr));
    return self.pointer == nullptr ? nullptr : PyCFunction_New(&function->definition, self.pointer);
}

// One declaration of a header. `make` is called at import, when the level in force is known.
struct Declared {
    const char* name;
    PyObject* (*make)();
    bool cuda;
};
std::vector<Declared>& declared() {
    static std::vector<Declared> all;
    return all;
}
bool bind(const char* name, bool cuda, PyObject* (*make)()) {
    declared().push_back({name, make, cuda});
    return true;
}

}  // namespace python
}  // namespace sprompt

// From here on a declaration also binds its kernel.
#define SPROMPT_BIND_AS(name, cuda, value)            \
    [[maybe_unused]] static const bool name##_bound = \
        ::sprompt::python::bind(#name, cuda, []() -> PyObject* { return ::sprompt::python::make(#name, value); });
#undef SPROMPT_BIND
#define SPROMPT_BIND(name) SPROMPT_BIND_AS(name, false, SPROMPT_PICK(name))
#ifdef SPROMPT_CUDA
#undef SPROMPT_BIND_CUDA
#define SPROMPT_BIND_CUDA(name) SPROMPT_BIND_AS(name, true, &::sprompt::cuda::name)
#endif
#include "kernels.h"

namespace sprompt {
namespace python {

PyObject* set_dtypes(PyObject*, PyObject* codes) {  // {torch.dtype: code of DType}
    PyObject *dtype = nullptr, *code = nullptr;
    dtypes.clear();
    for (Py_ssize_t at = 0; PyDict_Next(codes, &at, &dtype, &code);) {
        Py_INCREF(dtype);
        dtypes.emplace_back(dtype, static_cast<DType>(PyLong_AsLong(code)));
    }
    Py_RETURN_NONE;
}
PyMethodDef methods[] = {{"set_dtypes", set_dtypes, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "sprompt._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

bool fill(PyObject* module) {
    const auto add = [](PyObject* to, const char* name, PyObject* value) {
        if (value != nullptr && PyModule_AddObject(to, name, value) == 0) return true;
        Py_XDECREF(value);
        return false;
    };
    if (!add(module, "build", to_python(SPROMPT_BUILD))) return false;
    if (!add(module, "level", make("level", +[] { return level_name(level()); }))) return false;
    if (!add(module, "best_level", make("best_level", +[] { return level_name(best_level()); }))) return false;
    if (!add(module, "thread_source", make("thread_source", &thread_source))) return false;
    if (!add(module, "poison_scratch", make("poison_scratch", &poison_scratch))) return false;
    PyObject* cuda = nullptr;
#ifdef SPROMPT_CUDA
    cuda = PyModule_New("sprompt._C.cuda");
    if (!add(module, "cuda", cuda)) return false;
    if (!add(cuda, "emulated", PyBool_FromLong(SPROMPT_CUDA_EMULATED))) return false;
    if (!add(cuda, "architectures", to_python(SPROMPT_CUDA_ARCHITECTURES))) return false;
#endif
    for (const Declared& it : declared())
        if (!add(it.cuda ? cuda : module, it.name, it.make())) return false;
    return true;
}

}  // namespace python
}  // namespace sprompt

PyMODINIT_FUNC PyInit__C() {
    if (const char* refusal = sprompt::choose_level()) {
        PyErr_SetString(PyExc_ImportError, refusal);
        return nullptr;
    }
    PyObject* module = PyModule_Create(&sprompt::python::definition);
    if (module != nullptr && !sprompt::python::fill(module)) Py_CLEAR(module);
    return module;
}
