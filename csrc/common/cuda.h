// How the launchers of CUDA kernels are declared. This file includes no CUDA header, so every <op>.h may include it.
#pragma once

#include "common/views.h"

namespace sprompt {

// Where a kernel runs: the ordinal of the device and the cudaStream_t, as torch gives them.
struct Stream {
    int device = 0;
    void* handle = nullptr;
};

}  // namespace sprompt

// SPROMPT_CUDA_KERNEL(name, parameters...) declares the launcher sprompt::cuda::name(const Stream&, parameters...). It launches
// and returns without waiting. <op>_cuda.cu defines it; a build without CUDA does not have it. Python sees it as _C.cuda.name.
#define SPROMPT_BIND_CUDA(name)
#define SPROMPT_CUDA_KERNEL(name, ...)            \
    namespace cuda {                              \
    void name(const Stream& stream, __VA_ARGS__); \
    SPROMPT_BIND_CUDA(name)                       \
    }
