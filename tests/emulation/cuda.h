// CUDA on the host, for tests only. `cmake -DSPROMPT_EMULATE_CUDA=ON` compiles every csrc/<op>/<op>_cuda.cu as C++ and includes
// this file first. The threads of a block are fibers. A fiber runs until it reaches a barrier, a warp collective or its end;
// then a random choice (seed: SPROMPT_EMULATION_SEED) decides which fiber continues. Blocks run in a random order too. Code
// that lacks a barrier, or that relies on an order of blocks, therefore gives another result. The emulation reports these
// errors: a barrier that not all threads reach, a collective whose lanes differ from its mask, a write behind the end of a
// shared array. Shared memory starts as noise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/cuda.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

// The thread that runs now.
struct Place {
    dim3 thread, block, threads, blocks;
};
extern Place place;

enum class Wait { none, block, warp, done };

// A thread brings a value to a barrier or collective. `kind` names the intrinsic, so that two different intrinsics never match.
void block_barrier(const char* kind, int64_t value);  // block_sum() then has the sum
int64_t block_sum();                                  // sum of the values brought to the last block barrier
// Brings 8 bytes to the lanes of `mask` and returns the values of all 32 lanes; values of lanes outside the mask are noise.
const uint64_t* warp_collective(const char* kind, unsigned mask, uint64_t value);
int lane();

void* shared(const void* site, int64_t bytes);
void* dynamic_shared();
void launch(int64_t blocks, int threads, int64_t shared, const std::function<void()>& kernel);

template <class T>
uint64_t to_bits(T x) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    return bits;
}
template <class T>
T from_bits(uint64_t bits) {
    T x;
    std::memcpy(&x, &bits, sizeof(T));
    return x;
}
template <class T>
T shuffle(const char* kind, unsigned mask, T x, int source) {
    return from_bits<T>(warp_collective(kind, mask, to_bits(x))[source & 31]);
}

}  // namespace emulation

#define threadIdx (emulation::place.thread)
#define blockIdx (emulation::place.block)
#define blockDim (emulation::place.threads)
#define gridDim (emulation::place.blocks)

#define SPROMPT_SHARED(type, name, count) \
    static char name##_site;              \
    type(&name)[count] = *reinterpret_cast<type(*)[count]>(emulation::shared(&name##_site, sizeof(type) * (count)))
#define SPROMPT_SHARED_DYNAMIC(type, name) type* const name = static_cast<type*>(emulation::dynamic_shared())

// -- barriers and collectives

inline void __syncthreads() { emulation::block_barrier("__syncthreads", 0); }
inline int __syncthreads_count(int p) {
    emulation::block_barrier("__syncthreads_count", p != 0);
    return static_cast<int>(emulation::block_sum());
}
inline int __syncthreads_or(int p) {
    emulation::block_barrier("__syncthreads_or", p != 0);
    return emulation::block_sum() != 0;
}
inline int __syncthreads_and(int p) {
    emulation::block_barrier("__syncthreads_and", p == 0);
    return emulation::block_sum() == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_collective("__syncwarp", mask, 0); }
template <class T>
T __shfl_sync(unsigned mask, T x, int source) {
    return emulation::shuffle("__shfl_sync", mask, x, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int step) {
    return emulation::shuffle("__shfl_xor_sync", mask, x, emulation::lane() ^ step);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int step) {
    const T other = emulation::shuffle("__shfl_up_sync", mask, x, emulation::lane() - step);
    return emulation::lane() >= step ? other : x;
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int step) {
    const T other = emulation::shuffle("__shfl_down_sync", mask, x, emulation::lane() + step);
    return emulation::lane() + step < 32 ? other : x;
}
inline unsigned __ballot_sync(unsigned mask, int p) {
    const uint64_t* seen = emulation::warp_collective("__ballot_sync", mask, p != 0);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
        if ((mask >> i & 1) && seen[i]) votes |= 1u << i;
    return votes;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) {
    const uint64_t* seen = emulation::warp_collective("__reduce_add_sync", mask, x);
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) sum += static_cast<unsigned>(seen[i]);
    return sum;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x) {
    const uint64_t* seen = emulation::warp_collective("__reduce_min_sync", mask, x);
    unsigned least = ~0u;
    for (int i = 0; i < 32; ++i)
        if (mask >> i & 1) least = std::min(least, static_cast<unsigned>(seen[i]));
    return least;
}

// -- arithmetic

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
    return y;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline int __float_as_int(float x) { return emulation::from_bits<int>(emulation::to_bits(x)); }
inline float __int_as_float(int x) { return emulation::from_bits<float>(emulation::to_bits(x)); }
inline unsigned __float_as_uint(float x) { return emulation::from_bits<unsigned>(emulation::to_bits(x)); }
inline float __uint_as_float(unsigned x) { return emulation::from_bits<float>(emulation::to_bits(x)); }
inline long long __double_as_longlong(double x) { return emulation::from_bits<long long>(emulation::to_bits(x)); }
inline double __longlong_as_double(long long x) { return emulation::from_bits<double>(emulation::to_bits(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
T __ldg(const T* p) {
    return *p;
}
using std::isfinite;
using std::isnan;
using std::max;
using std::min;

// bfloat16 and float16, with the interface of cuda_bf16.h and cuda_fp16.h.
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x);
    if (std::isnan(x)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return static_cast<float>(emulation::from_bits<_Float16>(x.bits)); }
inline __half __float2half_rn(float x) { return {static_cast<uint16_t>(emulation::to_bits(static_cast<_Float16>(x)))}; }

// -- atomics: nothing interrupts a fiber inside of them

template <class T>
T atomicAdd(T* at, T x) {
    static_assert(std::is_integral_v<T>, "floating-point atomics are not allowed: their sums depend on the order");
    return std::exchange(*at, static_cast<T>(*at + x));
}
template <class T>
T atomicMin(T* at, T x) {
    return std::exchange(*at, std::min(*at, x));
}
template <class T>
T atomicMax(T* at, T x) {
    return std::exchange(*at, std::max(*at, x));
}
template <class T>
T atomicOr(T* at, T x) {
    return std::exchange(*at, static_cast<T>(*at | x));
}
template <class T>
T atomicAnd(T* at, T x) {
    return std::exchange(*at, static_cast<T>(*at & x));
}
template <class T>
T atomicExch(T* at, T x) {
    return std::exchange(*at, x);
}
template <class T>
T atomicCAS(T* at, T expected, T x) {
    const T old = *at;
    if (old == expected) *at = x;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace sprompt {
namespace cuda {

template <class... Parameters, class... Args>
void launch(const Stream&, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, Args... args) {
    const std::tuple<Parameters...> values(static_cast<Parameters>(args)...);
    emulation::launch(blocks, threads, shared, [&] { std::apply(kernel, values); });
}

}  // namespace cuda
}  // namespace sprompt
