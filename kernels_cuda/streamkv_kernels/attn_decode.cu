// Attention of few new tokens a sequence (1 to 16: a decode step, or a draft to verify) over a paged cache, split over all blocks
// of a persistent grid.
//
// Job: one sequence, one KV head, 16 of its packed rows. A packed row is a (new token, query head of the group), token by token:
// with 4 query heads a KV head, rows 0-3 are token 0. More than 16 of them make several jobs. Every byte of the cache is read once
// for all rows of a job; an MMA has 16 rows anyway.
//
// The jobs' tiles of 16 tokens in one line, cut into equal shares by decode_plan.py:
//
//     sequence 0, head 0        head 1         sequence 1, head 0    head 1
//     |-----------------------|-----------------------|-----|-----|
//     |   block 0     |   block 1     |   block 2     |  block 3  |
//
// A job that lies in one share is written out by its block. Of the others each piece leaves a state (attention.cuh), which
// attn_merge.cu joins. Within a piece every warp takes each WARPS-th tile, with its own ring of STAGES stages in shared memory, so
// that no warp waits for another; their states meet in shared memory at the end of the piece, in place of the rings. Queries stay
// in registers, or, where the accumulators of a wide head need those, behind the rings: as fragments, a lane's 16 bytes side by side.
//
// Grid     one block a share, 2 a multiprocessor whatever the step: a captured graph serves all. Block: WARPS * 32.
// Shared   WARPS rings of STAGES x (keys, values, scales of a tile) and queries of wide heads, or WARPS x 16 rows of float32
//          (attn_decode.py has the bytes).
// Limits   reading the cache, once for all rows of a job; 2 blocks a multiprocessor keep 16 tiles in flight.
//
// Versions
//   1  this; next: keys and values by TMA into more stages (sm_90), and the next piece's first tiles before this one's states meet
#include "attention.cuh"

#ifndef WARPS
#define WARPS 4
#endif
#ifndef STAGES
#define STAGES 2
#endif

// decode_plan.py writes both.
struct alignas(16) Sequence {
  int id;         // row of the block table
  int first_row;  // of its new tokens in queries and outputs
  int rows;       // its new tokens; the last of them is token end - 1, each sees what is before it and itself
  int end;
  int begin;       // tokens before this one are attended to elsewhere (a shared prefix): their states are joined
  int first_tile;  // that any of its rows sees
  int tiles;       // of each job
  int row_tiles;   // jobs of a KV head
};
struct alignas(16) Share {
  int sequence, job, tile;  // where it begins
  int tiles;                // how long it is
  int state;                // the first that it leaves
  int unused[3];
};

constexpr bool QUERY_SHARED = HEAD_DIM > 128;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;  // of a warp
constexpr int OUT_STRIDE = HEAD_DIM + 8;  // floats; shifts rows by 8 banks: fewer of them meet

struct Piece {
  Sequence of;
  int head, first_packed, live;  // KV head, first packed row and number of them
  int first, past;               // tiles
  bool whole;                    // the job has no other piece
};

// The piece that a share begins with. Asked twice, before and after the tiles: kept over them it would take registers that the
// accumulators of a wide head need.
SKV_DEV Piece first_piece(const Share& share, const int* sequences, int group) {
  const Sequence s = reinterpret_cast<const Sequence*>(sequences)[opaque(share.sequence)];
  const int count = min(share.tiles, s.tiles - share.tile), first_packed = share.job % s.row_tiles * 16;
  const int first = s.first_tile + share.tile;
  return {s, share.job / s.row_tiles, first_packed, min(16, s.rows * group - first_packed), first, first + count, count == s.tiles};
}

SKV_DEV Share without(const Share& share, const Piece& piece, int num_kv_heads) {
  const bool last_job = share.job + 1 == piece.of.row_tiles * num_kv_heads;
  const int job = last_job ? 0 : share.job + 1, tiles = share.tiles - (piece.past - piece.first);
  return {share.sequence + last_job, job, 0, tiles, share.state + !piece.whole, {}};
}

SKV_DEV Visible visible_rows(const Piece& piece, int group, int window) {
  const Sequence& s = piece.of;
  int begin[2], end[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int token = min((piece.first_packed + lane_id() / 4 + r * 8) / group, s.rows - 1);
    end[r] = s.end - s.rows + token + 1;
    begin[r] = max(s.begin, window > 0 ? end[r] - window : 0);
  }
  return sees(begin[0], end[0], begin[1], end[1]);
}

// This warp's tiles of a piece; query: score_tile's; no row of the sequence sees a token before `begin`.
template <class Query>
SKV_DEV void attend(Softmax& softmax, unsigned char* ring, const Query& query, const Cache& cache, const int* blocks,
                    const Piece& piece, const Scoring& scoring, const Visible& rows, int begin) {
  const int mine = piece.first + (int)threadIdx.x / 32, end = piece.of.end, tiles_per_block = (int)cache.block_size / TILE;
  auto block_of = [&](int tile) { return tile < piece.past && tile * TILE < end ? blocks[tile / tiles_per_block] : 0; };
  int block = block_of(mine);
  auto load = [&](int tile, int stage) {
    if (tile < piece.past) load_tile(ring + stage * STAGE_BYTES, cache, block, piece.head, tile * TILE, begin, end);
    cp_async_commit();
    block = block_of(tile + WARPS);  // looked up a tile early: a copy that waited for its own look-up would start late
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) load(mine + i * WARPS, i);
  int stage = 0;
  for (int tile = mine; tile < piece.past; tile += WARPS) {
    load(tile + (STAGES - 1) * WARPS, (stage + STAGES - 1) % STAGES);
    cp_async_wait<STAGES - 1>();
    sync_warp();
    const unsigned char* here = ring + stage * STAGE_BYTES;
    float scores[1][2][4];
    score_tile(scores[0], query, here);
    finish_scores(scores[0], here, scoring, rows, tile * TILE);
    soften<1>(softmax, scores);
    value_tile(softmax, scores[0], here);
    sync_warp();  // before the stage is loaded again
    stage = (stage + 1) % STAGES;
  }
  finish_softmax(softmax);
}

// Each warp's part of the piece into shared memory: [WARPS][16][OUT_STRIDE] outputs, then [WARPS][16][2] maxima and sums.
SKV_DEV void share_softmax(float* shared, const Softmax& softmax, int live) {
  const int lane = lane_id(), warp = (int)threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = warp * 16 + lane / 4 + r * 8;
    if (row % 16 >= live) continue;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) shared[row * OUT_STRIDE + output_column(i, j)] = softmax.out[i][r * 2 + j];
    if (lane % 4 == 0) {
      float* sums = shared + WARPS * 16 * OUT_STRIDE + row * 2;
      sums[0] = softmax.top[r];
      sums[1] = softmax.sum[r];
    }
  }
}

SKV_DEV State joined_warps(const float* shared, int row, int column) {
  State state = {NEG_INF, 0.f, 0.f};
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) {
    const int at = warp * 16 + row;
    const float* sums = shared + WARPS * 16 * OUT_STRIDE + at * 2;
    state = join(state, {sums[0], sums[1], shared[at * OUT_STRIDE + column]});
  }
  return state;
}

SKV_BOUNDED_KERNEL(attn_decode, WARPS * 32, 2)
(const IO* __restrict__ query,  // [tokens, heads, HEAD_DIM], strides of the first two
 const KV* __restrict__ keys, const KV* __restrict__ values,  // Cache
 const float* __restrict__ key_scales, const float* __restrict__ value_scales,
 const int* __restrict__ block_table,  // [sequences, table_stride]
 const int* __restrict__ sequences, const int* __restrict__ shares,  // the plan
 IO* __restrict__ out, float* __restrict__ logarithms, const float* __restrict__ sinks,  // Output
 const float* __restrict__ prefix_out, const float* __restrict__ prefix_logarithms,
 float* __restrict__ state_out, float* __restrict__ state_logarithms,  // [states, 16, HEAD_DIM], [states, 16]
 i64 query_row_stride, i64 query_head_stride, i64 block_stride, i64 head_stride, i64 row_stride, i64 scale_block_stride,
 i64 scale_head_stride, i64 block_size, i64 table_stride, i64 num_heads, i64 num_kv_heads, i64 window, double scale, double cap) {
  SKV_SHARED(shared);
  float* const joint = reinterpret_cast<float*>(shared);  // after the last tile of a piece, in place of the rings
  const int lane = lane_id(), warp = (int)threadIdx.x / 32;
  unsigned char *const ring = shared + warp * RING_BYTES, *const kept = shared + WARPS * RING_BYTES;
  const Cache cache = {keys, values, key_scales, value_scales, block_stride, head_stride, row_stride, scale_block_stride, scale_head_stride, block_size};
  const Output<IO> output = {out, logarithms, sinks, prefix_out, prefix_logarithms, num_heads};
  const Scoring scoring = {(float)scale, (float)cap};
  const int group = (int)(num_heads / num_kv_heads);

  for (Share share = reinterpret_cast<const Share*>(shares)[blockIdx.x]; share.tiles > 0;) {
    Softmax softmax;
    {
      const Piece piece = first_piece(share, sequences, group);
      const Sequence& s = piece.of;
      auto query_row = [&](int row) -> const IO* {
        const int packed = piece.first_packed + row;
        if (row >= piece.live) return nullptr;
        return query + (s.first_row + packed / group) * query_row_stride + ((i64)piece.head * group + packed % group) * query_head_stride;
      };
      const IO *row_g = query_row(lane / 4), *row_g8 = query_row(lane / 4 + 8);
      const int* blocks = block_table + s.id * table_stride;
      const Visible rows = visible_rows(piece, group, (int)window);
      const int begin = max(s.begin, window > 0 ? s.end - s.rows + 1 - (int)window : 0);
      if (QUERY_SHARED) {
        for (int step = warp; step < STEPS; step += WARPS) store16(kept + (step * 32 + lane) * 16, load_query(row_g, row_g8, step));
        sync_block();
        attend(softmax, ring, [&](int step) { return load16(kept + (step * 32 + lane) * 16); }, cache, blocks, piece, scoring, rows, begin);
      } else {
        u32x4 fragments[STEPS];
#pragma unroll
        for (int step = 0; step < STEPS; step++) fragments[step] = load_query(row_g, row_g8, step);
        attend(softmax, ring, [&](int step) { return fragments[step]; }, cache, blocks, piece, scoring, rows, begin);
      }
    }
    const Piece piece = first_piece(share, sequences, group);
    sync_block();  // the other warps still read their rings
    share_softmax(joint, softmax, piece.live);
    sync_block();
    for (int i = (int)threadIdx.x; i < piece.live * HEAD_DIM; i += WARPS * 32) {
      const int row = i / HEAD_DIM, column = i % HEAD_DIM, packed = piece.first_packed + row;
      const State result = joined_warps(joint, row, column);
      if (piece.whole) {
        write_output(output, piece.of.first_row + packed / group, piece.head * group + packed % group, column, result, piece.of.begin > 0);
      } else {
        const i64 state = (i64)share.state * 16 + row;
        state_out[state * HEAD_DIM + column] = output_of(result);
        if (column == 0) state_logarithms[state] = logarithm_of(result);
      }
    }
    sync_block();  // before the rings are filled again
    share = without(share, piece, (int)num_kv_heads);
  }
}

SKV_EXPORT(attn_decode)
