// The new tokens' keys and values go to their slots of the KV pool, on the way normed, rotated and quantised; the queries, normed
// and rotated, to `q_out`. Everything between reading and writing is float32: numbers are rounded once.
//
//   norm     root mean square norm over a head of q and k (Qwen 3: offset 0; Gemma 3: 1), where there is a weight
//   rotary   embedding (arXiv 2104.09864) of the first ROT_DIM numbers of a head of q and k. ROPE 1 turns (i, i + ROT_DIM / 2),
//            as Llama, GPT-NeoX; 2 turns neighbours (2 i, 2 i + 1), as GPT-J, ChatGLM; 0 nothing. How angles depend on the
//            position (llama3, yarn, longrope) and are scaled is the table's affair: cos and sin [positions, ROT_DIM / 2].
//            3 turns (i, i + HEAD_DIM / 2) bit by bit as transformers, rounding included (rotate.cu): cos and sin [tokens, HEAD_DIM]
//   KV       bf16, f16, or with a float32 scale for every token and head: e4m3 (largest magnitude = 448), i8 (127). A head
//            with NaN or Inf has such a scale, so that what reads it notices
//   layout   keys and values of a layer by strides in elements: slot = block · block_size + offset of a head lies at
//            block · block_stride + head · head_stride + offset · row_stride; scales alike, offsets side by side
//   slot -1  k and v of that token go nowhere
//   launch   blockIdx.x a token, blockIdx.y some of its q_heads + 2 · kv_heads heads: a warp a head, 4 numbers a lane at a time
//
// compile-time: IO (bf16, f16), KV (bf16, f16, e4m3, i8), HEAD_DIM, ROT_DIM (both multiples of 4), ROPE, NORM (0, 1)
#include "rows.cuh"

constexpr bool QUANTISED = sizeof(KV) == 1;
constexpr float LARGEST = same<KV, i8> ? 127.f : 448.f;
constexpr bool HALVES = ROPE == 1 || ROPE == 3;
#if ROPE == 3
using Angle = IO;
#else
using Angle = float;
#endif
constexpr float TINY = 1e-30f;                         // a head without a larger number is stored as zeros
constexpr int TURNING = ROPE ? ROT_DIM / 4 : 0;        // units of a head that are rotated
constexpr int UNITS = HEAD_DIM / 4, EACH = (UNITS + 31) / 32;

// Four numbers of a head, in two pairs of neighbours.
struct Unit { float a[2], b[2]; };

// Where the pairs of unit u begin: those of ROPE 1 and 3 lie half of the rotated part apart.
SKV_DEV int first_pair(int u) { return HALVES && u < TURNING ? 2 * u : 4 * u; }
SKV_DEV int second_pair(int u) { return HALVES && u < TURNING ? 2 * u + ROT_DIM / 2 : 4 * u + 2; }

template <class T> SKV_DEV void load_pair(float (&to)[2], const T* from) {
  const f32x2 pair = unpack<T>(*reinterpret_cast<const u32*>(from));
  to[0] = pair.x;
  to[1] = pair.y;
}
SKV_DEV u32 byte_of(e4m3 x) { return x.bits; }
SKV_DEV u32 byte_of(i8 x) { return (unsigned char)x.value; }
template <class T> SKV_DEV void store_pair(T* pointer, const float (&from)[2]) {
  if constexpr (sizeof(T) == 1)
    *reinterpret_cast<u16*>(pointer) = (u16)(byte_of(to<T>(from[0])) | byte_of(to<T>(from[1])) << 8);
  else
    *reinterpret_cast<u32*>(pointer) = pack<T>(from[0], from[1]);
}

SKV_DEV void turn(float& x, float& y, float cos, float sin) {
  const float turned = x * cos - y * sin;
  y = y * cos + x * sin;
  x = turned;
}
// ROPE 1 and 2: angles from the table.
SKV_DEV void turn_unit(Unit& unit, const float* cos, const float* sin) {
  turn(unit.a[0], ROPE == 1 ? unit.b[0] : unit.a[1], cos[0], sin[0]);
  turn(ROPE == 1 ? unit.a[1] : unit.b[0], unit.b[1], cos[1], sin[1]);
}
// ROPE 3: those of a whole head, and products are rounded.
SKV_DEV void turn_unit(Unit& unit, const IO* cos, const IO* sin) {
  float cos_a[2], sin_a[2], cos_b[2], sin_b[2];
  load_pair(cos_a, cos), load_pair(cos_b, cos + HEAD_DIM / 2);
  load_pair(sin_a, sin), load_pair(sin_b, sin + HEAD_DIM / 2);
  for (int j = 0; j < 2; j++) {
    const float a = unit.a[j], b = unit.b[j];
    unit.a[j] = rounded<IO>(a * cos_a[j]) - rounded<IO>(b * sin_a[j]);
    unit.b[j] = rounded<IO>(b * cos_b[j]) + rounded<IO>(a * sin_b[j]);
  }
}

SKV_KERNEL(kv_write)(const IO* q, i64 q_token, i64 q_head, const IO* k, i64 k_token, i64 k_head, const IO* v, i64 v_token,
                     i64 v_head, i64 q_heads, i64 kv_heads,
                     const IO* q_weight, const IO* k_weight, double eps, double offset,    // NORM: [HEAD_DIM]
                     const Angle* cos, const Angle* sin, const i64* positions,            // ROPE 1, 2: [tokens], rows of the table
                     IO* q_out,                                                            // [tokens, q_heads, HEAD_DIM]
                     const i64* slots, i64 block_size,                                     // [tokens]
                     KV* keys, KV* values, i64 block_stride, i64 head_stride, i64 row_stride,
                     float* key_scales, float* value_scales, i64 scale_block_stride, i64 scale_head_stride) {
  const int lane = threadIdx.x % 32;
  const i64 token = blockIdx.x;
  i64 head = (i64)blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  if (head >= q_heads + 2 * kv_heads) return;
  const bool is_q = head < q_heads, is_v = head >= q_heads + kv_heads;
  const IO* from = is_q ? q + token * q_token : is_v ? v + token * v_token : k + token * k_token;
  const IO* weight = is_q ? q_weight : k_weight;
  head -= is_v ? q_heads + kv_heads : is_q ? 0 : q_heads;
  from += head * (is_q ? q_head : is_v ? v_head : k_head);
  const i64 slot = is_q ? 0 : slots[token];
  if (slot < 0) return;

  Unit units[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int u = lane + 32 * i;
    units[i] = {};
    if (u >= UNITS) continue;
    load_pair(units[i].a, from + first_pair(u));
    load_pair(units[i].b, from + second_pair(u));
  }

  if (NORM && !is_v) {
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++)
      for (int j = 0; j < 2; j++) squares += units[i].a[j] * units[i].a[j] + units[i].b[j] * units[i].b[j];
    squares = warp_reduce(squares, [](float x, float y) { return x + y; });
    const float factor = rsqrt(squares / HEAD_DIM + (float)eps);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int u = lane + 32 * i;
      if (u >= UNITS) continue;
      for (int j = 0; j < 2; j++) {
        units[i].a[j] *= factor * (to_f32(weight[first_pair(u) + j]) + (float)offset);
        units[i].b[j] *= factor * (to_f32(weight[second_pair(u) + j]) + (float)offset);
      }
    }
  }

  if (ROPE && !is_v) {
    const i64 row = ROPE == 3 ? token * HEAD_DIM : positions[token] * (ROT_DIM / 2);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int u = lane + 32 * i;
      if (u < TURNING) turn_unit(units[i], cos + row + 2 * u, sin + row + 2 * u);
    }
  }

  if (is_q) {
    IO* out = q_out + (token * q_heads + head) * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int u = lane + 32 * i;
      if (u >= UNITS) continue;
      store_pair(out + first_pair(u), units[i].a);
      store_pair(out + second_pair(u), units[i].b);
    }
    return;
  }

  const i64 block = slot / block_size, row = slot % block_size;
  KV* out = (is_v ? values : keys) + block * block_stride + head * head_stride + row * row_stride;
  float factor = 1.f;
  if (QUANTISED) {
    float most = 0.f, spoilt = 0.f;  // the larger of a number and NaN is the number, so NaN needs a sum of its own
#pragma unroll
    for (int i = 0; i < EACH; i++)
      for (int j = 0; j < 2; j++) {
        most = fmaxf(most, fmaxf(fabsf(units[i].a[j]), fabsf(units[i].b[j])));
        spoilt += 0.f * units[i].a[j] + 0.f * units[i].b[j];
      }
    most = warp_reduce(most, [](float x, float y) { return fmaxf(x, y); });
    spoilt = warp_reduce(spoilt, [](float x, float y) { return x + y; });
    factor = most > TINY ? LARGEST / most : 0.f;
    if (lane == 0)
      (is_v ? value_scales : key_scales)[block * scale_block_stride + head * scale_head_stride + row] = most / LARGEST + spoilt;
  }
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int u = lane + 32 * i;
    if (u >= UNITS) continue;
    if (QUANTISED)
      for (int j = 0; j < 2; j++) units[i].a[j] *= factor, units[i].b[j] *= factor;
    store_pair(out + first_pair(u), units[i].a);
    store_pair(out + second_pair(u), units[i].b);
  }
}
SKV_EXPORT(kv_write)
