// Ragged chunked prefill over the paged cache, and the shared-prefix pass of cascade attention.
//
// Work     A piece = ROWS packed rows of one sequence and a range of its tokens. Packed row r is query token r / group, head
//          kv_head * group + r % group, so that a key that is read once serves the whole group. One block a (piece, KV head), heads
//          innermost, in the order of the list, which prefill_plan.py makes on the host: longest first.
// Block    WARPS warps of ROW_TILES x 16 rows each, all over the same tokens: the cache goes through a ring of two stages of SPAN
//          tokens, each warp copies whole tiles of 16 and so looks up one table entry for each.
// Shared   queries [ROWS][HEAD_DIM], permuted like tiles, then 2 x SPAN / 16 tiles.
// Visible  A row sees tokens [first, past): causal bound, window, length and the piece's range make one pair of integers a row.
//          Steps that no row of a warp sees are skipped by that warp; the block's range is bounded by its first and last row.
// Output   Rows of `out`, or, if the piece is one of several of its rows, a state for attn_merge: normalised, log2 of its weight.
// Cascade  row_index gathers the rows of all sequences that share a prefix; causal = 0; every piece leaves a state.
//
// Versions
//   1  4 warps x 16 rows: every warp reads every key and value from shared memory, one ldmatrix for two MMAs
//   2  4 warps x 32 rows (ROW_TILES 2): one ldmatrix for four MMAs, 255 registers; for steps with tiles enough to fill the device
//   next  wgmma with keys and values by TMA (sm_90a): no fragment passes through registers
#include "attention.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, WARP_ROWS = 16 * ROW_TILES, ROWS = WARPS * WARP_ROWS;
constexpr int SPAN = HEAD_DIM > 128 ? 32 : 64, TILES = SPAN / TILE;  // tokens and tiles of a step; 32 keeps head_dim 256 below 99 KiB
constexpr int PART = ROW_TILES == 1 && !QUANTISED ? TILES : 2;  // tiles whose scores a warp holds at a time: registers decide
constexpr int QUERY_CHUNKS = HEAD_DIM / 8;
constexpr int QUERY_BYTES = ROWS * QUERY_CHUNKS * 16;
static_assert(TILES <= WARPS && TILES % PART == 0, "a warp loads a tile");

struct alignas(16) Piece {  // a line of the plan
  int sequence, row;   // of the tables; its first packed row
  int begin, end;      // tokens
  int state, pieces;   // piece of KV head h leaves state `state` + h * `pieces`; -1 = its rows have no other pieces
  int has_prefix;      // whether prefix_out has a state of its rows
  int unused;
};

// Where the rows of a block come from and go to.
struct Rows {
  const int* index;  // null: row r of the batch is token r
  int start, packed, group, kv_head;
};
SKV_DEV i64 token_of(const Rows& rows, int packed) {
  const int row = rows.start + packed / rows.group;
  return rows.index ? rows.index[row] : row;
}
SKV_DEV int head_of(const Rows& rows, int packed) { return rows.kv_head * rows.group + packed % rows.group; }

// Where 8 columns of a query lie.
SKV_DEV int query_at(int row, int chunk) { return chunk_at<QUERY_CHUNKS>(row, chunk); }

// Rows from the last on are zeros: they are computed with and go nowhere.
SKV_DEV void copy_queries(unsigned char* target, const IO* query, const Rows& rows, int first, i64 token_stride, i64 head_stride) {
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * STEPS; i += THREADS) {
    const int row = i / STEPS, step = i % STEPS, packed = first + row;
    const bool inside = packed < rows.packed;
    const IO* source = inside ? query + token_of(rows, packed) * token_stride + head_of(rows, packed) * head_stride + step * 16 : query;
    unsigned char *low = target + query_at(row, step * 2), *high = target + query_at(row, step * 2 + 1);
    if (QUANTISED) {
      u32x4 a{}, b{};
      if (inside) a = load16(source), b = load16(source + 8);
      swap_query(a, b);
      store16(low, a), store16(high, b);
    } else {
      cp_async16(low, source, inside);
      cp_async16(high, inside ? source + 8 : query, inside);
    }
  }
}

// The tokens that packed rows see. Rows past the last take its limits: whatever they hold, they lengthen no range.
struct Limits { int context, last_packed, group, begin, end, window, causal; };
SKV_DEV int position_of(const Limits& limits, int packed) { return limits.context + min(packed, limits.last_packed) / limits.group; }
SKV_DEV int first_seen(const Limits& limits, int packed) {
  return limits.window ? max(limits.begin, position_of(limits, packed) - limits.window + 1) : limits.begin;
}
SKV_DEV int past_seen(const Limits& limits, int packed) {
  return limits.causal ? min(limits.end, position_of(limits, packed) + 1) : limits.end;
}

// Softmax over PART tiles of a stage, of the rows of one warp. first_row: within the block; first_packed: of the sequence.
SKV_DEV void attend_part(
    Softmax (&softmax)[ROW_TILES], const Limits& limits, const Scoring& scoring, const unsigned char* queries,
    const unsigned char* stage, int first_row, int first_packed, int token)
{
  const int lane = opaque(lane_id());
  float scores[ROW_TILES][PART][2][4] = {};
#pragma unroll
  for (int load = 0; load < LOADS; load++) {
    u32 query[LOAD_STEPS][ROW_TILES][4];
#pragma unroll
    for (int i = 0; i < LOAD_STEPS && load * LOAD_STEPS + i < STEPS; i++)
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++)
        ldmatrix_x4(query[i][m], queries + query_at(first_row + m * 16 + lane % 16, (load * LOAD_STEPS + i) * 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < PART; n++) {
      u32 keys[LOAD_STEPS][4];
      load_keys(keys, stage + n * STAGE_BYTES, load);
#pragma unroll
      for (int i = 0; i < LOAD_STEPS && load * LOAD_STEPS + i < STEPS; i++)
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
          mma_m16n8k16<IO>(scores[m][n][0], query[i][m], keys[i][0], keys[i][1]);
          mma_m16n8k16<IO>(scores[m][n][1], query[i][m], keys[i][2], keys[i][3]);
        }
    }
  }
  const bool all = token >= first_seen(limits, first_packed + WARP_ROWS - 1) && token + PART * TILE <= past_seen(limits, first_packed);
#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
    Visible rows = {{token, token}, {PART * TILE, PART * TILE}};
    if (!all) {  // computed when it matters: the registers are worth more
      const int g = first_packed + m * 16 + lane / 4;
      rows = sees(first_seen(limits, g), past_seen(limits, g), first_seen(limits, g + 8), past_seen(limits, g + 8));
    }
#pragma unroll
    for (int n = 0; n < PART; n++) finish_scores(scores[m][n], stage + n * STAGE_BYTES, scoring, rows, token + n * TILE);
    soften(softmax[m], scores[m]);
  }
#pragma unroll
  for (int n = 0; n < PART; n++) {
    u32 weights[ROW_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) weight_fragments(weights[m], scores[m][n], stage + n * STAGE_BYTES);
#pragma unroll
    for (int load = 0; load < LOADS; load++) {
      u32 values[LOAD_STEPS][4];
      load_values(values, stage + n * STAGE_BYTES, load);
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) add_values(softmax[m], weights[m], values, load);
    }
  }
}

// What the sums of `part` are multiplied with in the normalised sums of `whole`, which it belongs to.
SKV_DEV float share_of(const State& part, const State& whole) {
  return whole.sum == 0.f ? 0.f : ex2(part.top - (whole.top == NEG_INF ? 0.f : whole.top)) / whole.sum;
}

// This lane's columns of a finished row: half `half` of MMA step `step` of the head, from query_column(step, half) on.
SKV_DEV f32x2 two_columns(const Softmax& softmax, int r, int step, int half) {
  const int accumulator = step * 2, entry = r * 2;
  if (QUANTISED) return {softmax.out[accumulator][entry + half], softmax.out[accumulator + 1][entry + half]};
  return {softmax.out[accumulator + half][entry], softmax.out[accumulator + half][entry + 1]};
}

// Row r of the softmax is finished: with its sink and what was attended to elsewhere.
SKV_DEV void write_row(const Output<IO>& to_, const Softmax& softmax, int r, i64 token, int head, bool has_prefix) {
  const i64 row = token * to_.num_heads + head;
  const State own = {softmax.top[r], softmax.sum[r], 0.f};
  State whole = own, prefix = {NEG_INF, 0.f, 0.f};
  if (has_prefix) prefix = state_of(to_.prefix_logarithms[row], 0.f), whole = join(whole, prefix);
  if (to_.sinks) whole = join(whole, sink_of(to_.sinks[head]));
  const float of_own = share_of(own, whole), of_prefix = share_of(prefix, whole);
#pragma unroll
  for (int i = 0; i < STEPS * 2; i++) {
    const int column = query_column(i / 2, i % 2);
    f32x2 two = two_columns(softmax, r, i / 2, i % 2);
    two = {two.x * of_own, two.y * of_own};
    if (has_prefix && of_prefix != 0.f) {
      const float* other = to_.prefix_out + row * HEAD_DIM + column;
      two = {two.x + other[0] * of_prefix, two.y + other[1] * of_prefix};
    }
    *reinterpret_cast<u32*>(to_.out + row * HEAD_DIM + column) = pack<IO>(two.x, two.y);
  }
  if (to_.logarithms && lane_id() % 4 == 0) to_.logarithms[row] = logarithm_of(whole);
}

SKV_DEV void leave_state(float* out, float* logarithm, const Softmax& softmax, int r) {
  const State own = {softmax.top[r], softmax.sum[r], 0.f};
  const float share = share_of(own, own);
#pragma unroll
  for (int i = 0; i < STEPS * 2; i++) {
    const f32x2 two = two_columns(softmax, r, i / 2, i % 2);
    float* target = out + query_column(i / 2, i % 2);
    target[0] = two.x * share;
    target[1] = two.y * share;
  }
  if (lane_id() % 4 == 0) *logarithm = logarithm_of(own);
}

SKV_BOUNDED_KERNEL(attn_prefill, THREADS, HEAD_DIM > 128 ? 1 : 2)(
    const IO* __restrict__ query,             // (token, head, column)
    const KV* __restrict__ keys, const KV* __restrict__ values,
    const float* __restrict__ key_scales, const float* __restrict__ value_scales,  // null for a 16-bit cache
    const int* __restrict__ block_tables,     // [sequences, table_stride]
    const int* __restrict__ query_start,      // [sequences + 1]
    const int* __restrict__ seq_lens,         // [sequences]
    const int* __restrict__ row_index,        // null, or the token of each row that query_start counts
    const int* __restrict__ pieces,           // [gridDim.x / num_kv_heads]
    IO* __restrict__ out, float* __restrict__ logarithms, const float* __restrict__ sinks,  // Output
    const float* __restrict__ prefix_out, const float* __restrict__ prefix_logarithms,
    float* __restrict__ state_out, float* __restrict__ state_logarithms,  // [states, ROWS, HEAD_DIM], [states, ROWS]
    i64 query_row_stride, i64 query_head_stride, i64 block_stride, i64 head_stride, i64 row_stride, i64 scale_block_stride,
    i64 scale_head_stride, i64 block_size, i64 table_stride, i64 num_heads, i64 num_kv_heads, i64 window, double scale, double cap,
    i64 causal)
{
  SKV_SHARED(shared);
  const int lane = lane_id(), warp = (int)threadIdx.x / 32, kv_head = (int)blockIdx.x % (int)num_kv_heads;
  const int group = (int)(num_heads / num_kv_heads);
  const Piece piece = reinterpret_cast<const Piece*>(pieces)[blockIdx.x / (u32)num_kv_heads];
  const int start = query_start[piece.sequence], num_queries = query_start[piece.sequence + 1] - start;
  const int context = seq_lens[piece.sequence] - num_queries;  // causal only
  const int* table = block_tables + piece.sequence * table_stride;
  const Rows rows = {row_index, start, num_queries * group, group, kv_head};
  const Cache cache = {keys, values, key_scales, value_scales, block_stride, head_stride, row_stride, scale_block_stride, scale_head_stride, block_size};
  const Output<IO> output = {out, logarithms, sinks, prefix_out, prefix_logarithms, num_heads};
  const Scoring scoring = {(float)scale, (float)cap};

  const Limits limits = {context, rows.packed - 1, group, piece.begin, piece.end, (int)window, (int)causal};
  const int begin = first_seen(limits, piece.row), end = past_seen(limits, piece.row + ROWS - 1);

  unsigned char* const tiles = shared + QUERY_BYTES;
  int ahead = begin / TILE * TILE + warp * TILE;  // the token this warp loads next from
  auto block_of = [&](int token) { return token < end ? table[token / (int)block_size] : 0; };
  int block = block_of(ahead);
  auto load_next = [&](int stage) {
    if (warp < TILES) load_tile(tiles + (stage * TILES + warp) * STAGE_BYTES, cache, block, kv_head, ahead, begin, end);
    cp_async_commit();
    ahead += SPAN;
    block = block_of(ahead);  // looked up a step early: a copy that waited for its own look-up would start late
  };
  copy_queries(shared, query, rows, piece.row, query_row_stride, query_head_stride);
  load_next(0);

  const int warp_row = piece.row + warp * WARP_ROWS;
  const int warp_begin = first_seen(limits, warp_row), warp_end = past_seen(limits, warp_row + WARP_ROWS - 1);
  Softmax softmax[ROW_TILES];
  for (int token = begin / TILE * TILE, stage = 0; token < end; token += SPAN, stage ^= 1) {
    cp_async_wait<0>();
    sync_block();  // this step's tiles have come for every warp, and every warp has left the other stage
    load_next(stage ^ 1);
#pragma unroll 1
    for (int n = 0; n < TILES; n += PART) {
      const int from = token + n * TILE;
      const int first_row = opaque(warp) * WARP_ROWS;
      if (from < warp_end && from + PART * TILE > warp_begin)
        attend_part(softmax, limits, scoring, shared, tiles + (stage * TILES + n) * STAGE_BYTES, first_row, piece.row + first_row, from);
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int m = 0; m < ROW_TILES; m++) {
    finish_softmax(softmax[m]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int packed = warp_row + m * 16 + r * 8 + lane / 4;
      if (packed >= rows.packed) continue;
      if (piece.state < 0) {
        write_row(output, softmax[m], r, token_of(rows, packed), head_of(rows, packed), piece.has_prefix != 0);
      } else {
        const i64 row = ((i64)piece.state + kv_head * piece.pieces) * ROWS + packed - piece.row;
        leave_state(state_out + row * HEAD_DIM, state_logarithms + row, softmax[m], r);
      }
    }
  }
}
SKV_EXPORT(attn_prefill)
