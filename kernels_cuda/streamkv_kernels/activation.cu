// Gated activations: out = act(gate) · up, where gate and up are the halves of a row, as one merged product leaves them.
// The activation is rounded before the product, as torch does it.
//
//   layout   x [rows, 2 · width] with `row_stride` elements between rows, out [rows, width], contiguous; width a multiple of 8
//   launch   blockIdx.x a row, blockIdx.y a piece of it: 8 numbers a thread
//
// compile-time: IO (bf16, f16), GELU (0: SiLU, 1: GELU with tanh)
#include "rows.cuh"

// (1 + tanh y) / 2 is the logistic function of 2 y, without the difference of two numbers near 1 that tanh leaves at y < -3.
SKV_DEV float activate(float x) {
  const float y = GELU ? 1.595769122f * (x + .044715f * x * x * x) : x;  // 2 sqrt(2 / pi)
  return x / (1.f + ex2(-1.442695041f * y));
}

SKV_KERNEL(gate)(const IO* x, i64 row_stride, i64 width, IO* out) {
  constexpr int WIDE = Vector<IO>::SIZE;
  const i64 row = blockIdx.x;
  const i64 i = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * WIDE;
  if (i >= width) return;
  Vector<IO> v = load_vector(x + row * row_stride + i);
  const Vector<IO> up = load_vector(x + row * row_stride + width + i);
#pragma unroll
  for (int j = 0; j < WIDE; j++) v.at[j] = rounded<IO>(activate(v.at[j])) * up.at[j];
  store_vector(out + row * width + i, v);
}
SKV_EXPORT(gate)
