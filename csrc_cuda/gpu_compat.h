// The differences between nvcc, clang for AMD GPUs and the emulator. Device code includes no CUDA,
// HIP or torch header.
//
//   kWave           lanes per wave (warp): 32, or 64 on CDNA
//   indices         thread_index(), lane_index(), block_x(), block_y()
//   collectives     block_barrier(), shuffle(), shuffle_xor(), any_lane(): all lanes must take part
//   order           wait_for_inputs(): the first statement of every kernel
//   storage types   Half, BFloat16: 16 bits in memory, float in registers
#pragma once

#include <stdint.h>

#include "arguments.h"

#if defined(PORTALM_EMULATED)
#include "emulator.h"

#elif defined(__HIP__)  // clang -x hip -nogpuinc: compiler builtins, no ROCm header
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define PORTALM_BOUNDS(threads) __attribute__((amdgpu_flat_work_group_size(threads, threads)))
#define PORTALM_SHARED(type, name, count) __shared__ type name[count]

namespace portalm {
constexpr int kWave = __AMDGCN_WAVEFRONT_SIZE__;

__device__ inline int thread_index() { return __builtin_amdgcn_workitem_id_x(); }
__device__ inline int block_x() { return __builtin_amdgcn_workgroup_id_x(); }
__device__ inline int block_y() { return __builtin_amdgcn_workgroup_id_y(); }

__device__ inline void block_barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
// Make this thread's writes visible to the device, and the device's writes to this thread.
__device__ inline void device_fence() { __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "agent"); }
__device__ inline void wait_for_inputs() {}  // kernels of a stream do not overlap

__device__ inline uint32_t shuffle(uint32_t value, int source_lane) {
  return __builtin_amdgcn_ds_bpermute(source_lane * 4, value);
}
__device__ inline bool any_lane(bool is) {
  return kWave == 64 ? __builtin_amdgcn_ballot_w64(is) != 0 : __builtin_amdgcn_ballot_w32(is) != 0;
}
__device__ inline int32_t atomic_add(int32_t* p, int32_t value) {
  return __hip_atomic_fetch_add(p, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

__device__ inline float exp2_of(float x) { return __builtin_exp2f(x); }
template <typename To, typename From>
__device__ inline To bits_as(From from) {
  return __builtin_bit_cast(To, from);
}
}  // namespace portalm

#else  // nvcc
#define PORTALM_BOUNDS(threads) __launch_bounds__(threads, 1)
#define PORTALM_SHARED(type, name, count) __shared__ type name[count]

namespace portalm {
constexpr int kWave = 32;

__device__ inline int thread_index() { return threadIdx.x; }
__device__ inline int block_x() { return blockIdx.x; }
__device__ inline int block_y() { return blockIdx.y; }

__device__ inline void block_barrier() { __syncthreads(); }
__device__ inline void device_fence() { __threadfence(); }
// Wait until all earlier kernels of the stream are complete, and allow the next one to start.
// `launch` lets a kernel start while its predecessor still runs, so nothing may be read or written
// before this. Without that launch attribute, both instructions do nothing.
__device__ inline void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline uint32_t shuffle(uint32_t value, int source_lane) {
  return __shfl_sync(0xFFFFFFFFu, value, source_lane);
}
__device__ inline bool any_lane(bool is) { return __any_sync(0xFFFFFFFFu, is); }
__device__ inline int32_t atomic_add(int32_t* p, int32_t value) { return atomicAdd(p, value); }

__device__ inline float exp2_of(float x) { return exp2f(x); }
template <typename To, typename From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace portalm
#endif

namespace portalm {

__device__ inline int lane_index() { return thread_index() % kWave; }

__device__ inline float shuffle(float value, int source_lane) {
  return bits_as<float>(shuffle(bits_as<uint32_t>(value), source_lane));
}
template <typename V>
__device__ inline V shuffle_xor(V value, int mask) {
  return shuffle(value, lane_index() ^ mask);
}

template <typename V>
__device__ constexpr V max_of(V a, V b) {
  return a > b ? a : b;
}

// -- 16-byte memory accesses ------------------------------------------------------------------

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Loads and stores of global memory, declared as such, as clang cannot always infer it for AMD
// GPUs. `load_stream` bypasses the L1 cache, for memory that is read once. It must not use the
// non-coherent path (ld.global.nc): the kernel may start before its predecessor has written.
#if defined(__HIP__)
using Words = uint32_t __attribute__((ext_vector_type(4)));
using GlobalWords = __attribute__((address_space(1))) Words;

__device__ inline Bytes16 load(const Bytes16* p) {
  return bits_as<Bytes16>(*(const GlobalWords*)p);
}
__device__ inline void store(Bytes16* p, const Bytes16& x) { *(GlobalWords*)p = bits_as<Words>(x); }
__device__ inline Bytes16 load_stream(const Bytes16* p) {
  return bits_as<Bytes16>(__builtin_nontemporal_load((const GlobalWords*)p));
}
#else
__device__ inline Bytes16 load(const Bytes16* p) { return *p; }
__device__ inline void store(Bytes16* p, const Bytes16& x) { *p = x; }
__device__ inline Bytes16 load_stream(const Bytes16* p) {
#if defined(__CUDA_ARCH__)
  Bytes16 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
               : "l"(p));
  return x;
#else
  return *p;
#endif
}
#endif

// -- numbers ----------------------------------------------------------------------------------
// Eight elements are 16 bytes, unpacked to floats and packed from floats.

struct BFloat16 {
  __device__ static void unpack(const Bytes16& v, float (&out)[kVector]) {
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = bits_as<float>(v.word[i] << 16);
      out[2 * i + 1] = bits_as<float>(v.word[i] & 0xFFFF0000u);
    }
  }
  __device__ static uint32_t pack2(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return round(low) | round(high) << 16;
#endif
  }
  __device__ static uint32_t round(float x) {  // to the nearest, ties to even
    const uint32_t bits = bits_as<uint32_t>(x);
    if (x != x) return 0x7FC0;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  }
  __device__ static Bytes16 pack(const float (&x)[kVector]) {
    Bytes16 v;
    for (int i = 0; i < 4; ++i) v.word[i] = pack2(x[2 * i], x[2 * i + 1]);
    return v;
  }
};

struct Half {
  __device__ static float from_bits(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#elif defined(__CUDACC__)
    return 0;  // nvcc's host pass, which has no such type
#else
    return static_cast<float>(bits_as<_Float16>(bits));
#endif
  }
  __device__ static uint16_t to_bits(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#elif defined(__CUDACC__)
    return 0;
#else
    return bits_as<uint16_t>(static_cast<_Float16>(x));
#endif
  }
  __device__ static void unpack(const Bytes16& v, float (&out)[kVector]) {
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = from_bits(static_cast<uint16_t>(v.word[i]));
      out[2 * i + 1] = from_bits(static_cast<uint16_t>(v.word[i] >> 16));
    }
  }
  __device__ static Bytes16 pack(const float (&x)[kVector]) {
    Bytes16 v;
    for (int i = 0; i < 4; ++i)
      v.word[i] = to_bits(x[2 * i]) | uint32_t{to_bits(x[2 * i + 1])} << 16;
    return v;
  }
};

// Element `index`, a multiple of 8, of an array of 16-bit numbers.
__device__ inline Bytes16* vector_at(void* base, int64_t index) {
  return static_cast<Bytes16*>(base) + index / kVector;
}
__device__ inline const Bytes16* vector_at(const void* base, int64_t index) {
  return static_cast<const Bytes16*>(base) + index / kVector;
}

}  // namespace portalm
