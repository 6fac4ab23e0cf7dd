// The vectors that all kernels here are written in, for GCC and Clang. One file, compiled once per instruction set:
//
//   avx512bf16   -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16     W = 16, pairs of bf16 multiplied by one instruction
//   avx512       the same without bf16                                       W = 16
//   avx2         -mavx2 -mfma                                                W = 8
//   portable     nothing                                                     W = 4 (SSE2, NEON)
//
// A vector of W floats is `vf`. The compilers' vector extensions do the arithmetic; the few instructions that they have no
// word for stand here and nowhere else. NaN and Inf keep their meaning: never compile with -ffast-math.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace skv {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
// The same, wherever they lie and whatever lies there.
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * W), aligned(2), may_alias));
typedef uint32_t u32_any __attribute__((aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

static inline vf splat(float x) { return x - vf{}; }
static inline vu splat(uint32_t x) { return x - vu{}; }
static inline float as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t as_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

// ---- bf16 <-> float: round to nearest even, NaN stays NaN ---------------------------------------------------------
static inline float to_float(bf16 x) { return as_float((uint32_t)x.bits << 16); }
static inline float to_float(float x) { return x; }
static inline bf16 to_bf16(float x) {
  const uint32_t u = as_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {(uint16_t)(u >> 16 | 0x40)};
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline vf load(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh_any*)p, vu) << 16); }
static inline void store(float* p, vf x) { *(vf_any*)p = x; }
static inline vh narrow(vf x) {
#ifdef __AVX512BF16__
  return (vh)_mm512_cvtneps_pbh((__m512)x);  // subnormal numbers become 0
#else
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const vu quiet = u >> 16 | 0x40;
  const vi is_nan = (u & 0x7fffffff) > 0x7f800000;
  return __builtin_convertvector((vu)(is_nan ? (vi)quiet : (vi)rounded), vh);
#endif
}
static inline void store(bf16* p, vf x) { *(vh_any*)p = narrow(x); }
// What a value is after a trip through memory in type T: where torch rounds between two operations, so do we.
static inline vf rounded(const float*, vf x) { return x; }
static inline vf rounded(const bf16*, vf x) { return (vf)(__builtin_convertvector(narrow(x), vu) << 16); }

static inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where a is NaN
static inline vf vabs(vf x) { return (vf)((vu)x & 0x7fffffff); }
static inline vi lanes() {
  vi x;
  for (int i = 0; i < W; i++) x[i] = i;
  return x;
}

static inline float sum(vf x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s[W];
  memcpy(s, &x, sizeof s);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; i++) s[i] += s[i + step];
  return s[0];
#endif
}
static inline float largest(vf x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < W; i++) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

// e^x for x <= 88, relative error below 2e-7; what is below e^-87 counts as 0; NaN stays NaN.
static inline vf vexp(vf x) {
  const vi none = x < -87.f;
  x = none ? splat(-87.f) : x;
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * 1.44269504f + magic) - magic;
  const vf r = x - n * 0.693145752f - n * 1.42860677e-6f;
  vf p = splat(1.f / 720);
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return select(none, vf{}, p * (vf)((__builtin_convertvector(n, vi) + 127) << 23));
}
static inline vf vsigmoid(vf x) {  // of -|x| first: nothing overflows
  const vf e = vexp(-vabs(x));
  return select(x < 0.f, e, splat(1.f)) / (1.f + e);
}
static inline vf vtanh(vf x) {
  const vf e = vexp(-2.f * vabs(x)), t = (1.f - e) / (1.f + e), s = x * x;
  // Near 0 the difference 1 - e has few digits left: there a polynomial (Cephes, tanhf.c), relative error below 1.2e-7.
  vf p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  return select(s < .390625f, x + x * s * p, select(x < 0.f, -t, t));
}

// ---- dot products: one step consumes Pair<T> numbers of each lane ---------------------------------------------------
// Two bf16, or one float, of 4 bytes: what is multiplied and summed at once.
template <class T> constexpr int PAIR = 4 / sizeof(T);

static inline vf dot(const float*, vf acc, vu a, uint32_t b) { return acc + (vf)a * as_float(b); }
static inline vf dot(const bf16*, vf acc, vu a, uint32_t b) {
#ifdef __AVX512BF16__
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)splat(b));
#else
  acc += (vf)(a << 16) * as_float(b << 16);
  return acc + (vf)(a & 0xffff0000) * as_float(b & 0xffff0000);
#endif
}

static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
static inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace skv
