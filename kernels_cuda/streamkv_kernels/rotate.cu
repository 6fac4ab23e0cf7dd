// Rotary embedding (arXiv 2104.09864) exactly as transformers computes it, rounding included; for models whose own code drives
// the layer. What a model that is ours calls is kv_write.cu, which rotates and writes in one pass.
//
//   out = x · cos + (-second half, first half) · sin, each product rounded, then the sum: bit by bit torch's numbers
//
//   layout   x [tokens, heads, HEAD_DIM] with any strides but a dense last one; cos, sin [tokens, HEAD_DIM], contiguous;
//            out [tokens, heads, HEAD_DIM], contiguous
//   launch   blockIdx.x a token, blockIdx.y some of its heads: a warp a head
//
// compile-time: IO (bf16, f16), HEAD_DIM (a multiple of 32)
#include "rows.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int WIDE = Vector<IO>::SIZE;

SKV_KERNEL(rotate)(const IO* x, i64 token_stride, i64 head_stride, const IO* cos, const IO* sin, i64 heads, IO* out) {
  const i64 token = blockIdx.x;
  const i64 head = (i64)blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  if (head >= heads) return;
  x += token * token_stride + head * head_stride;
  out += (token * heads + head) * HEAD_DIM;
  cos += token * HEAD_DIM;
  sin += token * HEAD_DIM;
  for (int i = threadIdx.x % 32 * WIDE; i < HALF; i += 32 * WIDE) {
    const Vector<IO> a = load_vector(x + i), b = load_vector(x + HALF + i);
    const Vector<IO> cos_a = load_vector(cos + i), cos_b = load_vector(cos + HALF + i);
    const Vector<IO> sin_a = load_vector(sin + i), sin_b = load_vector(sin + HALF + i);
    Vector<IO> to_a, to_b;
#pragma unroll
    for (int j = 0; j < WIDE; j++) {
      to_a.at[j] = rounded<IO>(a.at[j] * cos_a.at[j]) - rounded<IO>(b.at[j] * sin_a.at[j]);
      to_b.at[j] = rounded<IO>(b.at[j] * cos_b.at[j]) + rounded<IO>(a.at[j] * sin_b.at[j]);
    }
    store_vector(out + i, to_a);
    store_vector(out + HALF + i, to_b);
  }
}
SKV_EXPORT(rotate)
