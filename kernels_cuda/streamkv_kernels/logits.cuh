// Rows of logits: how a block reads one, which of two logits is larger, what a token weighs. Everything that decides which token
// is sampled is integers or IEEE operations written out one by one, so that a GPU, the emulator and any launch geometry agree in
// every bit: floating-point sums would depend on their order, ex2 on the device.
#pragma once
#include "rows.cuh"

// Calls f(index, logit) for the indices begin .. end, shared out between `workers` threads of which this is `worker`. Rows begin
// anywhere, since vocabularies are no multiple of anything: numbers before and behind whole aligned vectors are read singly.
template <class T, class F> SKV_DEV void each(const T* row, int begin, int end, int worker, int workers, F f) {
  constexpr int WIDE = Vector<T>::SIZE;
  const int misaligned = (int)((u64)(row + begin) % 16 / sizeof(T));
  const int head = min(misaligned ? WIDE - misaligned : 0, end - begin), vectors = (end - begin - head) / WIDE;
  for (int i = begin + worker; i < begin + head; i += workers) f(i, to_f32(row[i]));
  for (int i = worker; i < vectors; i += workers) {
    const int index = begin + head + i * WIDE;
    const Vector<T> v = load_vector(row + index);
#pragma unroll
    for (int j = 0; j < WIDE; j++) f(index + j, v.at[j]);
  }
  for (int i = begin + head + vectors * WIDE + worker; i < end; i += workers) f(i, to_f32(row[i]));
}

// Integers in the order of the numbers; -0 is 0. NaN lies beyond infinity.
SKV_DEV u32 key_of(float x) {
  if (x != x) return 0xffffffffu;
  const u32 bits = x == 0.f ? 0u : bits_of(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
SKV_DEV float of_key(u32 key) { return float_of(key >> 31 ? key & 0x7fffffffu : ~key); }

// Logit and token as one number: the larger logit is larger, among equal ones the lower token.
SKV_DEV u64 candidate(int token, float logit) { return (u64)key_of(logit) << 32 | (u32)~token; }
SKV_DEV int token_of(u64 candidate) { return (int)~(u32)candidate; }
SKV_DEV float logit_of(u64 candidate) { return of_key((u32)(candidate >> 32)); }

SKV_DEV bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

SKV_DEV u64 sum_of(u64 a, u64 b) { return a + b; }
SKV_DEV u64 larger_of(u64 a, u64 b) { return a < b ? b : a; }

// exp(x) for x <= 0 in units of 2^-44, relative error below 2e-7 and one unit: integer sums are exact in any order, and 2^19
// tokens of the largest weight fit. 0 for NaN. Cody and Waite's reduction, the polynomial of Cephes' expf.
constexpr int WEIGHT_BITS = 44;
SKV_DEV u64 weight_of(float x) {
  if (!(x > -31.f)) return 0;  // less than half a unit
  const float shifted = add_rn(mul_rn(x, 1.442695041f), 12582912.f);  // 1.5 · 2^23: the sum has no digits behind the point
  const float n = add_rn(shifted, -12582912.f);
  const float r = fma_rn(n, 2.12194440e-4f, fma_rn(n, -0.693359375f, x));  // x - n ln 2
  float p = 1.9875691500e-4f;
  p = fma_rn(p, r, 1.3981999507e-3f);
  p = fma_rn(p, r, 8.3334519073e-3f);
  p = fma_rn(p, r, 4.1665795894e-2f);
  p = fma_rn(p, r, 1.6666665459e-1f);
  p = fma_rn(p, r, 5.0000001201e-1f);
  p = add_rn(fma_rn(p, mul_rn(r, r), r), 1.f);  // exp(r), 0.7 .. 1.42
  return ((u64)(u32)(p * 8388608.f) << (WEIGHT_BITS - 23)) >> (int)-n;
}
