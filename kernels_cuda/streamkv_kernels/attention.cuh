// What attention over a paged KV cache needs, whoever the queries are: attn_decode.cu and attn_prefill.cu are loops around this.
//
// The unit is a warp and a tile: 16 query rows and 16 tokens of one KV head. A lane is (g, t) = (lane / 4, lane % 4), as in PTX's
// pictures of mma.m16n8k16: of scores and outputs it holds rows g and g + 8 (index r = 0, 1), entry j of a fragment being row j / 2.
//
//   load_tile      keys, values and their scales of one tile -> a stage of shared memory, by cp.async of one warp
//   load_query     a step's A fragments of 16 rows of queries, from global memory  (or swap_query and ldmatrix from shared memory)
//   load_keys      B fragments of one stage's keys, for loops that use them more than once;  score_tile is the whole q k^T
//   finish_scores  raw products -> scores in log2 units: key scales, soft-cap, and -inf where a row may not see a token
//   soften         online softmax over N tiles: running maximum and sum, accumulator rescaled, scores become weights
//   value_tile     accumulator += weights x values (weight_fragments, load_values, add_values);  finish_softmax after the last tile
//   State          a softmax that is not finished, of one row and one column: what pieces of a row leave and `join` puts together
//
// Compile-time: HEAD_DIM (a multiple of 16), IO (bf16, f16: queries and outputs), KV (IO, or e4m3, i8: the cache), ROW_TILES (how many
// times 16 rows a warp has at once). 8-bit caches have a scale per token and head; the key's multiplies a column of scores, the value's
// a column of weights, so that no element is multiplied. All MMAs are in IO: every e4m3 and int8 is exact in bf16 and in f16.
//
// Shared memory holds a tile's rows without padding; within a row the 16-byte chunks are permuted so that the 8 rows that an
// ldmatrix reads, as those that a cp.async writes, lie in 8 different groups of 4 banks (chunk_at). Example, 16-bit and HEAD_DIM 64,
// 8 chunks a row; column = banks, number = chunk:
//
//   row 0   0 1 2 3 4 5 6 7          96 (12 chunks):  row 0   0 1 2 3  4 5 6 7  8 9 a b      80 (10 chunks): rows 0-3 as they are,
//   row 1   1 0 3 2 5 4 7 6                           row 2   1 0 3 2  5 4 7 6  9 8 b a                      rows 4-7 in swapped pairs
//   row 2   2 3 0 1 6 7 4 5
//
// 8-bit tiles go through the same ldmatrix, which moves pairs of bytes. Within each 16 columns of a head this leaves another order
// than that of 16-bit tiles: of the contraction q k^T, where only both sides must agree (query_column), and of outputs (output_column).
#pragma once
#include "device.cuh"

#ifndef ROW_TILES
#define ROW_TILES 1
#endif

constexpr int TILE = 16;                                // tokens; every block size is a multiple of it
constexpr int STEPS = HEAD_DIM / 16;                    // MMAs along a head
constexpr bool QUANTISED = sizeof(KV) == 1;
constexpr int CHUNKS = HEAD_DIM * (int)sizeof(KV) / 16;  // of 16 bytes in a row
constexpr int LOAD_STEPS = QUANTISED ? 2 : 1;           // steps that one ldmatrix serves
constexpr int LOADS = (STEPS + LOAD_STEPS - 1) / LOAD_STEPS;
constexpr int TILE_BYTES = TILE * CHUNKS * 16;
constexpr int SCALE_BYTES = QUANTISED ? TILE * 4 : 0;
constexpr int STAGE_BYTES = 2 * (TILE_BYTES + SCALE_BYTES);  // keys, values, key scales, value scales; a multiple of 128
// Weights times scales must not sink below what f16 can hold; 64 x the largest scale of a f16 model (65504 / 127) still fits.
constexpr float WEIGHT_UNIT = QUANTISED && same<IO, f16> ? 64.f : 1.f;
constexpr float LOG2_E = 1.44269504f;
static_assert(HEAD_DIM % 16 == 0 && (QUANTISED || same<KV, IO>), "16-bit caches have the dtype of the queries");

SKV_DEV int lane_id() { return (int)threadIdx.x % 32; }
// For addresses in shared memory: where accumulators take nearly all registers (`tight`), addresses are computed anew each time.
SKV_DEV int address_lane(bool tight) { return tight ? opaque(lane_id()) : lane_id(); }

// Byte offset of a 16-byte chunk in a tile whose rows have WIDTH chunks. Tiles begin at multiples of 128 bytes.
template <int WIDTH> SKV_DEV int chunk_at(int row, int chunk) {
  constexpr int even = WIDTH & -WIDTH, spread = even < 8 ? even : 8;  // a row shifts the banks by `spread` groups of them, or a multiple
  return (row * WIDTH + (chunk ^ (row / (8 / spread) % spread))) * 16;
}

// ---------------------------------------------------------------- the cache

// One layer's keys and values: element (block, head, offset in block, column), strides in elements, columns contiguous.
struct Cache {
  const KV *keys, *values;
  const float *key_scales, *value_scales;  // (block, head, offset), offsets contiguous; null unless QUANTISED
  i64 block_stride, head_stride, row_stride, scale_block_stride, scale_head_stride;
  i64 block_size;  // tokens
};

// Start the copy of tokens `token` .. `token` + 15 (a multiple of 16) of block `block`; the caller commits. Tokens outside of
// [begin, end) are not read, their keys and values become 0; `block` is not looked at if that is all of them.
SKV_DEV void load_tile(unsigned char* stage, const Cache& cache, i64 block, i64 head, int token, int begin, int end) {
  const int lane = opaque(lane_id()), offset = token % (int)cache.block_size;
  const i64 base = block * cache.block_stride + head * cache.head_stride + offset * cache.row_stride;
#pragma unroll
  for (int i = lane; i < TILE * CHUNKS; i += 32) {
    const int row = i / CHUNKS, chunk = i % CHUNKS, at = chunk_at<CHUNKS>(row, chunk);
    const bool inside = token + row >= begin && token + row < end;
    const i64 element = inside ? base + row * cache.row_stride + chunk * (16 / (int)sizeof(KV)) : 0;
    cp_async16(stage + at, cache.keys + element, inside);
    cp_async16(stage + TILE_BYTES + at, cache.values + element, inside);
  }
  if (QUANTISED && lane < 8) {  // 4 scales a lane; those outside of [begin, end) come along and are never used
    const int row = lane % 4 * 4;
    const bool inside = token + row + 3 >= begin && token + row < end;
    const float* scales = lane < 4 ? cache.key_scales : cache.value_scales;
    const i64 element = inside ? block * cache.scale_block_stride + head * cache.scale_head_stride + offset + row : 0;
    cp_async16(stage + 2 * TILE_BYTES + lane * 16, scales + element, inside);
  }
}

// ---------------------------------------------------------------- fragments

// First of the two adjacent columns of a head that this lane multiplies in half `half` of a step.
SKV_DEV int query_column(int step, int half) {
  const int t = lane_id() % 4;
  return step * 16 + (QUANTISED ? t * 4 + half * 2 : half * 8 + t * 2);
}

// A fragment of a step: rows g and g + 8 of 16 rows of queries; a null row is zeros. Rows are 4-byte aligned.
SKV_DEV u32x4 load_query(const IO* row_g, const IO* row_g8, int step) {
  u32x4 query;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const IO* row = i % 2 ? row_g8 : row_g;
    query.word[i] = row ? *reinterpret_cast<const u32*>(row + query_column(step, i / 2)) : 0u;
  }
  return query;
}

// For queries that reach their fragments by ldmatrix (chunk 2 step + half): 16 columns as they must lie in shared memory.
SKV_DEV void swap_query(u32x4& first, u32x4& second) {
  if (!QUANTISED) return;
  const u32x4 a = first, b = second;
  first = {a.word[0], a.word[2], b.word[0], b.word[2]};
  second = {a.word[1], a.word[3], b.word[1], b.word[3]};
}

// Two bytes of the cache, in the low half of `pair`, as two IO.
SKV_DEV u32 widen(u32 pair) {
  u32 halves;
  if constexpr (same<KV, i8>) halves = i8x2_to_f16x2(pair);
  else halves = e4m3x2_to_f16x2(pair);
  if constexpr (same<IO, f16>) return halves;
  const f32x2 numbers = unpack<f16>(halves);
  return pack<bf16>(numbers.x, numbers.y);
}

// B fragments of q k^T for steps LOAD_STEPS * load ..: entries 0, 1 of tokens 0-7, entries 2, 3 of tokens 8-15. If STEPS is odd, the
// last load of an 8-bit cache has one step only.
SKV_DEV void load_keys(u32 (&keys)[LOAD_STEPS][4], const unsigned char* stage, int load) {
  const int lane = address_lane(QUANTISED || HEAD_DIM > 128), row = lane % 8 + lane / 16 * 8, chunk = min(load * 2 + lane / 8 % 2, CHUNKS - 1);
  u32 raw[4];
  ldmatrix_x4(raw, stage + chunk_at<CHUNKS>(row, chunk));
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (QUANTISED) {
      keys[i % 2][i / 2 * 2] = widen(raw[i]);
      keys[i % 2][i / 2 * 2 + 1] = widen(raw[i] >> 16);
    } else {
      keys[0][i] = raw[i];
    }
  }
}

// B fragments of weights x values for the accumulators 2 step (entries 0, 1) and 2 step + 1 (entries 2, 3), steps as in load_keys.
SKV_DEV void load_values(u32 (&values)[LOAD_STEPS][4], const unsigned char* stage, int load) {
  const int lane = address_lane(QUANTISED || ROW_TILES * HEAD_DIM > 192), row = lane % 16, chunk = min(load * 2 + lane / 16, CHUNKS - 1);
  u32 raw[4];
  ldmatrix_x4_trans(raw, stage + TILE_BYTES + chunk_at<CHUNKS>(row, chunk));
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (QUANTISED) {
      const u32 columns = byte_perm(raw[i], 0u, 0x3120);  // two adjacent columns of two tokens -> two tokens of each column
      values[i / 2][i % 2] = widen(columns);
      values[i / 2][i % 2 + 2] = widen(columns >> 16);
    } else {
      values[0][i] = raw[i];
    }
  }
}

// Column of a head that entry j of accumulator i is of.
SKV_DEV int output_column(int i, int j) {
  const int t = lane_id() % 4;
  return QUANTISED ? i / 2 * 16 + t * 4 + j % 2 * 2 + i % 2 : i * 8 + t * 2 + j % 2;
}

// scores[h][j] = products of row j / 2 with token 8 h + 2 t + j % 2 of the stage; query(step) is a fragment as of load_query.
template <class Query> SKV_DEV void score_tile(float (&scores)[2][4], const Query& query, const unsigned char* stage) {
#pragma unroll
  for (int i = 0; i < 8; i++) scores[i / 4][i % 4] = 0.f;
#pragma unroll
  for (int load = 0; load < LOADS; load++) {
    u32 keys[LOAD_STEPS][4];
    load_keys(keys, stage, load);
#pragma unroll
    for (int i = 0; i < LOAD_STEPS && load * LOAD_STEPS + i < STEPS; i++) {
      const u32x4 rows = query(load * LOAD_STEPS + i);
      mma_m16n8k16<IO>(scores[0], rows.word, keys[i][0], keys[i][1]);
      mma_m16n8k16<IO>(scores[1], rows.word, keys[i][2], keys[i][3]);
    }
  }
}

// ---------------------------------------------------------------- scores and softmax

// Without a cap (0): product * scale, the scale being the layer's * log2 e. With one: cap * tanh(product * scale), the cap being the
// layer's * log2 e, the scale the layer's scale / cap.
struct Scoring { float scale, cap; };

// Tokens that rows g and g + 8 see: begin[r] .. begin[r] + count[r] - 1.
struct Visible { int begin[2], count[2]; };

SKV_DEV Visible sees(int begin_g, int end_g, int begin_g8, int end_g8) {
  return {{begin_g, begin_g8}, {max(end_g - begin_g, 0), max(end_g8 - begin_g8, 0)}};
}
// Whether this lane's rows see all of `tokens` tokens from `token` on.
SKV_DEV bool sees_all(const Visible& rows, int token, int tokens) {
  const bool first = token >= rows.begin[0] && token + tokens <= rows.begin[0] + rows.count[0];
  return first && token >= rows.begin[1] && token + tokens <= rows.begin[1] + rows.count[1];
}

// Raw products of the tile that begins at `token` become scores in log2 units, -inf where a row does not see a token.
SKV_DEV void finish_scores(float (&scores)[2][4], const unsigned char* stage, const Scoring& scoring, const Visible& rows, int token) {
  const int t = lane_id() % 4;
  const float* key_scales = reinterpret_cast<const float*>(stage + 2 * TILE_BYTES);
  const bool all = sees_all(rows, token, TILE);
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int column = h * 8 + t * 2 + j % 2;
      float score = scores[h][j] * scoring.scale;
      if (QUANTISED) score *= key_scales[column];
      if (scoring.cap != 0.f) score = scoring.cap * tanh_(score);
      const bool visible = all || (u32)(token + column - rows.begin[j / 2]) < (u32)rows.count[j / 2];
      scores[h][j] = visible ? score : NEG_INF;
    }
}

// The softmax of 16 rows under way: weights are 2^(score - top), `sum` and `out` are sums over what this lane has seen of them.
struct Softmax {
  float top[2] = {NEG_INF, NEG_INF};
  float sum[2] = {0.f, 0.f};
  float out[HEAD_DIM / 8][4] = {};
};

// Scores of N tiles become weights; before that, what is in `softmax` is brought to the new maximum. A row that has seen nothing yet
// has the maximum -inf, and -inf - -inf would be NaN: its weights are taken from 0 instead, and are all 0.
template <int N> SKV_DEV void soften(Softmax& softmax, float (&scores)[N][2][4]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float top = softmax.top[r];
#pragma unroll
    for (int i = 0; i < N * 4; i++) top = fmaxf(top, scores[i / 4][i / 2 % 2][r * 2 + i % 2]);
    top = fmaxf(top, shfl_xor(top, 1));
    top = fmaxf(top, shfl_xor(top, 2));
    const float from = top == NEG_INF ? 0.f : top, shrink = ex2(softmax.top[r] - from);
    softmax.top[r] = top;
    softmax.sum[r] *= shrink;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++) {
      softmax.out[i][r * 2] *= shrink;
      softmax.out[i][r * 2 + 1] *= shrink;
    }
#pragma unroll
    for (int i = 0; i < N * 4; i++) {
      float& score = scores[i / 4][i / 2 % 2][r * 2 + i % 2];
      score = ex2(score - from);
      softmax.sum[r] += score;
    }
  }
}

// A fragments of a tile's weights, times the scales of its values.
SKV_DEV void weight_fragments(u32 (&fragment)[4], const float (&weights)[2][4], const unsigned char* stage) {
  const int t = lane_id() % 4;
  const float* value_scales = reinterpret_cast<const float*>(stage + 2 * TILE_BYTES + SCALE_BYTES);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float pair[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      pair[j] = weights[i / 2][i % 2 * 2 + j];
      // Where the weight is 0 the scale may be that of no token, NaN even.
      if (QUANTISED && pair[j] != 0.f) pair[j] *= value_scales[i / 2 * 8 + t * 2 + j] * WEIGHT_UNIT;
    }
    fragment[i] = pack<IO>(pair[0], pair[1]);
  }
}

// softmax.out += weights x what load_values gave for `load`.
SKV_DEV void add_values(Softmax& softmax, const u32 (&weights)[4], const u32 (&values)[LOAD_STEPS][4], int load) {
#pragma unroll
  for (int i = 0; i < LOAD_STEPS && load * LOAD_STEPS + i < STEPS; i++) {
    const int step = load * LOAD_STEPS + i;
    mma_m16n8k16<IO>(softmax.out[step * 2], weights, values[i][0], values[i][1]);
    mma_m16n8k16<IO>(softmax.out[step * 2 + 1], weights, values[i][2], values[i][3]);
  }
}

// softmax.out += weights x values of the stage.
SKV_DEV void value_tile(Softmax& softmax, const float (&weights)[2][4], const unsigned char* stage) {
  u32 fragment[4];
  weight_fragments(fragment, weights, stage);
#pragma unroll
  for (int load = 0; load < LOADS; load++) {
    u32 values[LOAD_STEPS][4];
    load_values(values, stage, load);
    add_values(softmax, fragment, values, load);
  }
}

// After the last tile: `sum` of each row becomes that of all four lanes that hold parts of it, and `out` loses its unit.
SKV_DEV void finish_softmax(Softmax& softmax) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    softmax.sum[r] += shfl_xor(softmax.sum[r], 1);
    softmax.sum[r] += shfl_xor(softmax.sum[r], 2);
  }
  if (WEIGHT_UNIT != 1.f) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) softmax.out[i / 4][i % 4] *= 1.f / WEIGHT_UNIT;
  }
}

// ---------------------------------------------------------------- states

// A softmax of some tokens, of one row and one column of values: sum of 2^(score - top) and of 2^(score - top) * value. Nothing seen:
// {NEG_INF, 0, 0}. In memory a state is normalised: out / sum in float32 and its logarithm top + log2 sum; that is {logarithm, 1, out}.
struct State { float top, sum, out; };

SKV_DEV State join(const State& a, const State& b) {
  const float top = fmaxf(a.top, b.top), from = top == NEG_INF ? 0.f : top;
  const float of_a = ex2(a.top - from), of_b = ex2(b.top - from);
  return {top, a.sum * of_a + b.sum * of_b, a.out * of_a + b.out * of_b};
}
SKV_DEV State state_of(float logarithm, float out) { return {logarithm, logarithm == NEG_INF ? 0.f : 1.f, logarithm == NEG_INF ? 0.f : out}; }
// A sink: a logit (in units of e) that joins the softmax with the value 0.
SKV_DEV State sink_of(float logit) { return {logit * LOG2_E, 1.f, 0.f}; }
// NaN stays NaN; a row that saw nothing is 0.
SKV_DEV float output_of(const State& state) { return state.sum == 0.f ? 0.f : state.out / state.sum; }
SKV_DEV float logarithm_of(const State& state) { return state.sum == 0.f ? NEG_INF : state.top + lg2(state.sum); }

// Where finished rows go, and what else of theirs there is. Rows are tokens, all [tokens, heads, ..] contiguous.
template <class T> struct Output {
  T* out;
  float* logarithms;         // [tokens, heads], may be null
  const float* sinks;        // [heads], may be null
  const float *prefix_out, *prefix_logarithms;  // states of tokens that were attended to elsewhere, may be null
  i64 num_heads;
};

// One column of one row, by exactly one thread.
template <class T> SKV_DEV void write_output(const Output<T>& to_, i64 token, i64 head, int column, State state, bool has_prefix) {
  const i64 row = token * to_.num_heads + head, element = row * HEAD_DIM + column;
  if (has_prefix && to_.prefix_out) state = join(state, state_of(to_.prefix_logarithms[row], to_.prefix_out[element]));
  if (to_.sinks) state = join(state, sink_of(to_.sinks[head]));
  to_.out[element] = to<T>(output_of(state));
  if (to_.logarithms && column == 0) to_.logarithms[row] = logarithm_of(state);
}
