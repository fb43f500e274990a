// The few instructions that the WKV6 kernels use beyond plain C++. tests/emulator has the same names for a CPU, so that
// the kernels' own source runs there, thread by thread.
#pragma once
#include <cstdint>

#ifdef WKV6_EMULATE
#include "cuda_emulator.h"
#else
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle(float value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

template <class T>
DEVICE T load_shared(const T* from) { return *from; }
template <class T>
DEVICE void store_shared(T* to, T value) { *to = value; }
DEVICE float2 load_pair(const float* from) { return __ldg(reinterpret_cast<const float2*>(from)); }
DEVICE uint32_t load_word(const void* from) { return __ldg(reinterpret_cast<const uint32_t*>(from)); }

DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global to shared memory, in the background; zeros where not `valid`.
DEVICE void copy_16_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8. Lane (g, q) gets row g, columns 2q, 2q+1.
DEVICE void load_matrices(uint32_t x[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_matrices_transposed(uint32_t x[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// c (16 x 8) += a (16 x 16) b (16 x 8), bfloat16 operands.
DEVICE void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers in one register, the first in the lower half; round to nearest even.
DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE float unpack_bf16(uint32_t x, int half) { return __uint_as_float(half ? x & 0xffff0000u : x << 16); }
DEVICE uint32_t pack_fp16(float low, float high) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE float unpack_fp16(uint32_t x, int half) {
  float y;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(y) : "r"(half ? x >> 16 : x));
  return y;
}
#endif
