// How the launchers of CUDA kernels are declared. Includes nothing of CUDA, so every <op>.h may use it.
#pragma once

#include "common/views.h"

namespace sprompt {

// Where a kernel runs: the ordinal of the device and the cudaStream_t, as torch gives them.
struct Stream {
    int device = 0;
    void* handle = nullptr;
};

}  // namespace sprompt

// SPROMPT_CUDA_KERNEL(name, parameters...) declares sprompt::cuda::name(const Stream&, parameters...), which launches and
// returns. Defined in <op>_cuda.cu; there is no such function in a build without CUDA. Python sees it as _C.cuda.name.
#define SPROMPT_BIND_CUDA(name)
#define SPROMPT_CUDA_KERNEL(name, ...)            \
    namespace cuda {                              \
    void name(const Stream& stream, __VA_ARGS__); \
    SPROMPT_BIND_CUDA(name)                       \
    }
