// Common parts of the CUDA kernels: launching on torch's stream, shared memory, element types, warp sums. Every
// csrc/<op>/<op>_cuda.cu includes this file, and defines its kernels in an unnamed namespace and its launcher in sprompt::cuda.
// Nothing here synchronises. Scratch memory comes from the caller.
//
// With SPROMPT_EMULATE_CUDA the same sources are compiled as C++ for tests, and tests/emulation/cuda.h runs their blocks and
// threads on the host. So kernels declare shared arrays with SPROMPT_SHARED, are started by launch(), and use no inline PTX.
#pragma once

#ifdef SPROMPT_EMULATE_CUDA
#include "emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdio>
#include <exception>

#include "common/cuda.h"

namespace sprompt {
namespace cuda {

constexpr int warp = 32;
constexpr unsigned whole_warp = 0xffffffffu;
constexpr int64_t most_blocks = 0x7fffffff;  // of a grid's first dimension

// The exception that a launcher throws. Its text begins with "CUDA: ". In Python it is a RuntimeError. It does not derive from
// std::runtime_error, which needs <string>: nvcc would parse that header four times per file, which takes a second.
class Failure : public std::exception {
    char text_[160];

  public:
    explicit Failure(const char* text) { std::snprintf(text_, sizeof text_, "CUDA: %s", text); }
    const char* what() const noexcept override { return text_; }
};

#ifndef SPROMPT_EMULATE_CUDA

// `count` elements of the block's shared memory, uninitialised. `count` is a constant expression.
#define SPROMPT_SHARED(type, name, count) __shared__ type name[count]
// The dynamic shared memory, of the size that launch() was given, aligned to 16 bytes.
#define SPROMPT_SHARED_DYNAMIC(type, name)                          \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared)

inline void check(cudaError_t status) {
    if (status != cudaSuccess) throw Failure(cudaGetErrorString(status));
}

// Starts kernel(args...) with `blocks` blocks of `threads` threads on the stream, with `shared` bytes of dynamic shared memory.
// Launches nothing if `blocks` is 0.
template <class... Parameters, class... Args>
void launch(const Stream& stream, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, Args... args) {
    if (blocks <= 0) return;
    if (blocks > most_blocks) throw Failure("a grid of more than 2^31 - 1 blocks");
    int before = stream.device;
    check(cudaGetDevice(&before));
    if (before != stream.device) check(cudaSetDevice(stream.device));
    cudaError_t status = cudaSuccess;
    if (shared > 32 * 1024) {  // a kernel must ask for more than 48 KB, static arrays included
        // The kernel always asks for the most that a block may have, so that host threads that launch at the same time set the
        // same value.
        const void* code = reinterpret_cast<const void*>(kernel);
        cudaFuncAttributes of_kernel;
        int most = 0;
        status = cudaFuncGetAttributes(&of_kernel, code);
        if (status == cudaSuccess)
            status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, stream.device);
        if (status == cudaSuccess)
            status = cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          most - static_cast<int>(of_kernel.sharedSizeBytes));
    }
    if (status == cudaSuccess) {
        kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream.handle)>>>(
            static_cast<Parameters>(args)...);
        status = cudaGetLastError();
    }
    if (before != stream.device) check(cudaSetDevice(before));
    check(status);
}

#endif

// Element types as they are stored in memory. Sums and comparisons are in float.
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
__device__ inline float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
// Rounds to nearest, ties to even.
__device__ inline void from_float(float x, float* out) { *out = x; }
__device__ inline void from_float(float x, bf16* out) { out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline void from_float(float x, f16* out) { out->bits = __half_as_ushort(__float2half_rn(x)); }

// Clamps to +-2^127. NaN stays.
__device__ inline float held(float x) {
    if (fabsf(x) > 0x1p127f) x = x > 0.0f ? 0x1p127f : -0x1p127f;
    return x;
}

// Two cells by their weights, without fused operations.
__device__ inline float blend(float a, float b, float w0, float w1) { return __fadd_rn(__fmul_rn(a, w0), __fmul_rn(b, w1)); }

// Runs the statement with T as the element type of a float tensor.
#define SPROMPT_DEVICE_FLOATS(dtype, T, ...)                      \
    do {                                                          \
        if ((dtype) == ::sprompt::DType::f32) {                   \
            using T = float;                                      \
            __VA_ARGS__;                                          \
        } else if ((dtype) == ::sprompt::DType::bf16) {           \
            using T = ::sprompt::cuda::bf16;                      \
            __VA_ARGS__;                                          \
        } else if ((dtype) == ::sprompt::DType::f16) {            \
            using T = ::sprompt::cuda::f16;                       \
            __VA_ARGS__;                                          \
        } else {                                                  \
            throw ::sprompt::cuda::Failure("not a float tensor"); \
        }                                                         \
    } while (false)

inline int64_t tiles(int64_t size, int64_t block) { return (size + block - 1) / block; }

// The sum over a warp, returned in every lane. All 32 lanes must take part. For integers only. The order of the additions is
// fixed.
template <class T>
__device__ inline T warp_sum(T x) {
    for (int step = warp / 2; step > 0; step /= 2) x += __shfl_xor_sync(whole_warp, x, step);
    return x;
}
template <class T>
__device__ inline T warp_min(T x) {
    for (int step = warp / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(whole_warp, x, step);
        x = other < x ? other : x;
    }
    return x;
}
template <class T>
__device__ inline T warp_max(T x) {
    for (int step = warp / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(whole_warp, x, step);
        x = other > x ? other : x;
    }
    return x;
}

}  // namespace cuda
}  // namespace sprompt
