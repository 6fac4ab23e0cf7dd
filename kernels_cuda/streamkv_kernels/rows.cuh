// What the small kernels share: vectors of 16 bytes, and values that a warp or a block agrees on.
#pragma once
#include "device.cuh"

// The numbers of 16 bytes.
template <class T> struct Vector {
  static constexpr int SIZE = 16 / (int)sizeof(T);
  float at[SIZE];
};

template <class T> SKV_DEV Vector<T> load_vector(const T* pointer) {
  const u32x4 raw = load16(pointer);
  Vector<T> result;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (same<T, float>) {
      result.at[i] = float_of(raw.word[i]);
    } else {
      const f32x2 pair = unpack<T>(raw.word[i]);
      result.at[2 * i] = pair.x;
      result.at[2 * i + 1] = pair.y;
    }
  }
  return result;
}

template <class T> SKV_DEV void store_vector(T* pointer, const Vector<T>& vector) {
  u32x4 raw;
#pragma unroll
  for (int i = 0; i < 4; i++) raw.word[i] = pack<T>(vector.at[2 * i], vector.at[2 * i + 1]);
  store16(pointer, raw);
}

// x as it is after it was stored as T.
template <class T> SKV_DEV float rounded(float x) { return to_f32(to<T>(x)); }

// All lanes get the same: every combination is made of the same two numbers on both of its sides. `combine` is commutative.
template <class T, class F> SKV_DEV T warp_reduce(T value, F combine) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) value = combine(value, shfl_xor(value, mask));
  return value;
}

// All threads of the block get the same; `scratch` has room for one value a warp and is free again afterwards.
template <class T, class F> SKV_DEV T block_reduce(T value, T* scratch, F combine) {
  value = warp_reduce(value, combine);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  sync_block();
  value = scratch[0];
  for (int i = 1; i < (int)blockDim.x / 32; i++) value = combine(value, scratch[i]);
  sync_block();
  return value;
}
