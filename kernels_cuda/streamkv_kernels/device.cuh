// The device layer: the only file that knows PTX. Kernels include nothing else, and nothing here needs a CUDA header.
//
// Compiled by NVRTC this is CUDA for sm_80 and later; compiled by g++ with -DSKV_EMU the same names run on a processor
// (emulator.h). Whoever adds a function adds it to both. What kernels may use beside it: threadIdx, blockIdx, blockDim, gridDim,
// __restrict__, fmaxf, fminf, fabsf, sqrtf, min, max. Collectives (mma, ldmatrix, shuffles, sync_warp) are for whole warps only.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;

// Storage types: what lies in memory. Arithmetic is float (`to_f32`, `to<T>`).
struct bf16 { u16 bits; };
struct f16 { u16 bits; };
struct e4m3 { unsigned char bits; };  // 8 bits: sign, 4 of exponent (bias 7), 3 of mantissa; no infinity, 0x7f is NaN
struct i8 { signed char value; };
struct f32x2 { float x, y; };
struct alignas(16) u32x4 { u32 word[4]; };

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;

#ifdef SKV_EMU
#include "emulator.h"
#else

#define NEG_INF __int_as_float((int)0xff800000)
#define SKV_DEV static __device__ __forceinline__
#define SKV_KERNEL(name) extern "C" __global__ void name
// At most `threads` threads a block, and registers for at least `blocks` blocks a multiprocessor.
#define SKV_BOUNDED_KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#define SKV_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define SKV_EXPORT(name)

SKV_DEV u32 bits_of(float x) { return __float_as_uint(x); }
SKV_DEV float float_of(u32 bits) { return __uint_as_float(bits); }
SKV_DEV u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// x, of which the compiler knows nothing: what is computed from it is computed where it is used, not once for all and kept.
SKV_DEV int opaque(int x) { asm volatile("" : "+r"(x)); return x; }

SKV_DEV void sync_block() { __syncthreads(); }
SKV_DEV void sync_warp() { __syncwarp(); }
template <class T> SKV_DEV T shfl_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <class T> SKV_DEV T shfl(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// d += a b: a 16 x 16 (row), b 16 x 8 (column), d 16 x 8; the fragments are those of PTX's mma.m16n8k16.
template <class T> SKV_DEV void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static_assert(same<T, bf16> || same<T, f16>, "the multiplicands are bf16 or f16");
#define SKV_MMA(type) \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (same<T, bf16>) SKV_MMA("bf16");
  else SKV_MMA("f16");
#undef SKV_MMA
}

// Four 8 x 8 matrices of 16-bit numbers: lane 8 i + r gives the address of row r of matrix i, r[i] is this lane's pair of it.
SKV_DEV void ldmatrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
SKV_DEV void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// 16 bytes from global to shared memory, both aligned; zeros if not `pred`, and then `global` is not read.
SKV_DEV void cp_async16(void* shared, const void* global, bool pred) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16,%2;" ::"r"(shared_address(shared)), "l"(global), "r"(pred ? 16 : 0) : "memory");
}
SKV_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N committed groups of this thread are in flight. Other threads see the bytes after a barrier only.
template <int N> SKV_DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

SKV_DEV u32x4 load16(const void* pointer) { return *static_cast<const u32x4*>(pointer); }
SKV_DEV void store16(void* pointer, u32x4 value) { *static_cast<u32x4*>(pointer) = value; }

SKV_DEV float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
SKV_DEV float lg2(float x) { float y; asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
SKV_DEV float rsqrt(float x) { float y; asm("rsqrt.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }

// IEEE operations that no compiler merges or approximates: the same bits everywhere. fma_rn rounds once.
SKV_DEV float add_rn(float a, float b) { return __fadd_rn(a, b); }
SKV_DEV float mul_rn(float a, float b) { return __fmul_rn(a, b); }
SKV_DEV float div_rn(float a, float b) { return __fdiv_rn(a, b); }
SKV_DEV float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SKV_DEV void atomic_add(u64* pointer, u64 value) { atomicAdd(pointer, value); }

SKV_DEV float to_f32(bf16 x) { return float_of((u32)x.bits << 16); }
SKV_DEV float to_f32(f16 x) { float y; asm("cvt.f32.f16 %0,%1;" : "=f"(y) : "h"(x.bits)); return y; }
SKV_DEV u16 bf16_bits(float x) { u16 y; asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(y) : "f"(x)); return y; }
SKV_DEV u16 f16_bits(float x) { u16 y; asm("cvt.rn.f16.f32 %0,%1;" : "=h"(y) : "f"(x)); return y; }
SKV_DEV int round_to_int(float x) { int y; asm("cvt.rni.s32.f32 %0,%1;" : "=r"(y) : "f"(x)); return y; }

template <class T> SKV_DEV u32 pack(float lo, float hi) {
  static_assert(same<T, bf16> || same<T, f16>, "pairs are of bf16 or f16");
  u32 y;
  if constexpr (same<T, bf16>) asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(hi), "f"(lo));
  else asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

// Bytes b0 .. b3 of a and b4 .. b7 of b, picked by the digits of `pick`, lowest first.
SKV_DEV u32 byte_perm(u32 a, u32 b, u32 pick) { return __byte_perm(a, b, pick); }
SKV_DEV u32 f16x2_mul(u32 a, u32 b) { u32 y; asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b)); return y; }
SKV_DEV u32 f16x2_fma(u32 a, u32 b, u32 c) { u32 y; asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(y) : "r"(a), "r"(b), "r"(c)); return y; }
SKV_DEV u32 f16x2_sub(u32 a, u32 b) { u32 y; asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b)); return y; }
#endif

// ---------------------------------------------------------------- the same on both sides

template <class T> SKV_DEV f32x2 unpack(u32 pair) { return {to_f32(T{(u16)(pair & 0xffffu)}), to_f32(T{(u16)(pair >> 16)})}; }

// tanh to about 3e-7 absolute, for soft-capped scores and GELU.
SKV_DEV float tanh_(float x) { return 1.f - 2.f / (1.f + ex2(x * 2.885390082f)); }

// Two e4m3 in the low 16 bits of `pair` as two f16, exactly: the exponent moves by 7 bits, the bias (7 against 15) by a factor 256.
SKV_DEV u32 e4m3x2_to_f16x2(u32 pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  u32 y;
  asm("cvt.rn.f16x2.e4m3x2 %0,%1;" : "=r"(y) : "h"((u16)pair));
  return y;
#else
  const u32 wide = byte_perm(pair, 0u, 0x1404);  // each byte in the upper half of its 16 bits
  const u32 magnitude = (wide & 0x7f007f00u) >> 1;
  // What a NaN's code stands for here, 480 / 256, is the only number whose product with 35840 is infinite; inf - inf is NaN.
  const u32 product = f16x2_mul(magnitude, 0x78607860u), zero_or_nan = f16x2_sub(product, product);
  return f16x2_fma(magnitude, 0x5c005c00u, zero_or_nan) | (wide & 0x80008000u);  // * 256
#endif
}
// Two int8 in the low 16 bits of `pair` as two f16, exactly: 1024 + (x + 128) has x + 128 in its low bits.
SKV_DEV u32 i8x2_to_f16x2(u32 pair) { return f16x2_sub(byte_perm(pair ^ 0x8080u, 0x64u, 0x4140), 0x64806480u); }

SKV_DEV float to_f32(e4m3 x) { return to_f32(f16{(u16)(e4m3x2_to_f16x2(x.bits) & 0xffffu)}); }
SKV_DEV float to_f32(i8 x) { return (float)x.value; }
SKV_DEV float to_f32(float x) { return x; }

// Rounded to nearest even, and to the largest finite number if it is beyond; NaN stays NaN.
SKV_DEV unsigned char e4m3_bits(float x) {
  const u32 bits = bits_of(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (unsigned char)(sign | 0x7fu);
  if (magnitude >= 0x43e80000u) return (unsigned char)(sign | 0x7eu);  // 464, half a step above 448, and more
  if (magnitude < 0x3c800000u) return (unsigned char)(sign | (u32)round_to_int(float_of(magnitude) * 512.f));  // < 2^-6: steps of 2^-9
  const u32 rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  const u32 code = (rounded >> 20) - ((127u - 7u) << 3);
  return (unsigned char)(sign | (code < 0x7eu ? code : 0x7eu));
}

template <class T> SKV_DEV T to(float x) {
  if constexpr (same<T, float>) return x;
  else if constexpr (same<T, bf16>) return {bf16_bits(x)};
  else if constexpr (same<T, f16>) return {f16_bits(x)};
  else if constexpr (same<T, e4m3>) return {e4m3_bits(x)};
  else return {(signed char)round_to_int(fminf(fmaxf(x, -127.f), 127.f))};  // i8, symmetric
}
