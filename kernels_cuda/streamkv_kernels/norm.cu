// Root mean square norm (arXiv 1910.07467), rounded where the models round:
//
//   out = x / sqrt(mean(x²) + eps) · (weight + offset)
//
//   styles   Llama: offset 0, the quotient is rounded before it is multiplied. Gemma: offset 1, only the product is rounded.
//            OLMo 2 and others: offset 0, only the product is rounded. Sum and quotient are float32 in all.
//   add      with a `residual`, x + residual (rounded) is what is normed, and takes the residual's place: the two steps
//            between every attention or MLP and the next one read and write each number once.
//   layout   x: `rows` rows in two nested loops, `inner` a step of the outer one, strides in elements: heads of a token or a
//            part of a merged product need no copy. out [rows, width], contiguous. Width a multiple of 8, rows on 16 bytes.
//   launch   ROW_THREADS 32: a warp a row, blockDim.x / 32 rows a block (heads). Else a block a row, blockDim.x = ROW_THREADS.
//   versions 1: two passes, the second out of the first-level cache; float32 sum by warp, then by block.
//
// compile-time: IO (bf16, f16), ROW_THREADS
#include "rows.cuh"

constexpr int WIDE = Vector<IO>::SIZE;

SKV_KERNEL(rms_norm)(const IO* x, i64 outer_stride, i64 inner_stride, i64 inner, i64 rows, i64 width,
                     IO* residual, i64 residual_stride,  // null, or [rows, width]
                     const IO* weight,                   // [width]
                     double eps, double offset, i64 round_first, IO* out) {
  SKV_SHARED(shared);
  const i64 row = (i64)blockIdx.x * (blockDim.x / ROW_THREADS) + threadIdx.x / ROW_THREADS;
  if (row >= rows) return;  // whole warps only
  const int first = threadIdx.x % ROW_THREADS * WIDE;
  x += row / inner * outer_stride + row % inner * inner_stride;
  out += row * width;
  if (residual) residual += row * residual_stride;

  float squares = 0.f;
  for (int i = first; i < width; i += ROW_THREADS * WIDE) {
    Vector<IO> v = load_vector(x + i);
    if (residual) {
      const Vector<IO> r = load_vector(residual + i);
#pragma unroll
      for (int j = 0; j < WIDE; j++) v.at[j] = rounded<IO>(v.at[j] + r.at[j]);
      store_vector(residual + i, v);
    }
#pragma unroll
    for (int j = 0; j < WIDE; j++) squares += v.at[j] * v.at[j];
  }
  const auto sum = [](float a, float b) { return a + b; };
  squares = ROW_THREADS == 32 ? warp_reduce(squares, sum) : block_reduce(squares, reinterpret_cast<float*>(shared), sum);
  const float scale = rsqrt(squares / (float)width + (float)eps);

  const IO* from = residual ? residual : x;  // each thread reads what it wrote itself
  for (int i = first; i < width; i += ROW_THREADS * WIDE) {
    Vector<IO> v = load_vector(from + i);
    const Vector<IO> w = load_vector(weight + i);
#pragma unroll
    for (int j = 0; j < WIDE; j++) {
      v.at[j] *= scale;
      if (round_first) v.at[j] = rounded<IO>(v.at[j]);
      v.at[j] *= w.at[j] + (float)offset;
    }
    store_vector(out + i, v);
  }
}
SKV_EXPORT(rms_norm)
