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
// that no warp waits for another; their states meet in shared memory at the end of the piece.
//
// Grid: shares; block: WARPS * 32. Shared memory: attn_decode.py knows.
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
struct alignas(16) Share { int sequence, job, tile, tiles, state, unused[3]; };  // where it begins, how long it is, its first state

constexpr int OUT_STRIDE = HEAD_DIM + 8;  // floats; shifts rows by 8 banks: fewer of them meet

struct Piece {
  i64 head;
  int row_tile, first, past;  // tiles
};

SKV_DEV Visible visible_rows(const Sequence& s, int row_tile, int group, int window) {
  int begin[2], end[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int token = min((row_tile * 16 + lane_id() / 4 + r * 8) / group, s.rows - 1);
    end[r] = s.end - s.rows + token + 1;
    begin[r] = max(s.begin, window > 0 ? end[r] - window : 0);
  }
  return sees(begin[0], end[0], begin[1], end[1]);
}

// This warp's tiles of a piece. `begin`, `end`: what any row of the sequence sees.
SKV_DEV void attend(Softmax& softmax, unsigned char* ring, const u32 (&query)[STEPS][4], const Cache& cache, const int* blocks,
                    const Piece& piece, const Scoring& scoring, const Visible& rows, int begin, int end) {
  const int warp = (int)threadIdx.x / 32, tiles_per_block = (int)cache.block_size / TILE;
  int ahead = piece.first + warp;  // the tile to load next
  auto block_of = [&](int tile) { return tile < piece.past && tile * TILE < end ? blocks[tile / tiles_per_block] : 0; };
  int block = block_of(ahead);
  auto load_next = [&](int stage) {
    if (ahead < piece.past) load_tile(ring + stage * STAGE_BYTES, cache, block, piece.head, ahead * TILE, begin, end);
    cp_async_commit();
    ahead += WARPS;
    block = block_of(ahead);  // looked up a tile early: a copy that waited for its own look-up would start late
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) load_next(i);
  int stage = 0;
  for (int tile = piece.first + warp; tile < piece.past; tile += WARPS) {
    load_next((stage + STAGES - 1) % STAGES);
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
  unsigned char* const ring = shared + (int)threadIdx.x / 32 * STAGES * STAGE_BYTES;
  const Cache cache = {keys, values, key_scales, value_scales, block_stride, head_stride, row_stride, scale_block_stride, scale_head_stride, block_size};
  const Output<IO> output = {out, logarithms, sinks, prefix_out, prefix_logarithms, num_heads};
  const Scoring scoring = {(float)scale, (float)cap};
  const int group = (int)(num_heads / num_kv_heads);

  const Share share = reinterpret_cast<const Share*>(shares)[blockIdx.x];
  int left = share.tiles, at = share.sequence, job = share.job, tile = share.tile, state = share.state;
  while (left > 0) {
    const Sequence s = reinterpret_cast<const Sequence*>(sequences)[at];
    const int count = min(left, s.tiles - tile), row_tile = job % s.row_tiles;
    const Piece piece = {job / s.row_tiles, row_tile, s.first_tile + tile, s.first_tile + tile + count};
    const int first_packed = row_tile * 16, live = min(16, s.rows * group - first_packed);

    auto query_row = [&](int row) -> const IO* {
      const int packed = first_packed + row;
      if (row >= live) return nullptr;
      return query + (s.first_row + packed / group) * query_row_stride + (piece.head * group + packed % group) * query_head_stride;
    };
    u32 fragments[STEPS][4];
    load_query(fragments, query_row(lane_id() / 4), query_row(lane_id() / 4 + 8));
    const int begin = max(s.begin, window > 0 ? s.end - s.rows + 1 - (int)window : 0);
    Softmax softmax;
    attend(softmax, ring, fragments, cache, block_table + s.id * table_stride, piece, scoring,
           visible_rows(s, row_tile, group, (int)window), begin, s.end);

    sync_block();  // the other warps still read their rings
    share_softmax(joint, softmax, live);
    sync_block();
    const bool whole = count == s.tiles;
    for (int i = (int)threadIdx.x; i < live * HEAD_DIM; i += WARPS * 32) {
      const int row = i / HEAD_DIM, column = i % HEAD_DIM, packed = first_packed + row;
      const State result = joined_warps(joint, row, column);
      if (whole) {
        write_output(output, s.first_row + packed / group, piece.head * group + packed % group, column, result, s.begin > 0);
      } else {
        const i64 at_state = (i64)state * 16 + row;
        state_out[at_state * HEAD_DIM + column] = output_of(result);
        if (column == 0) state_logarithms[at_state] = logarithm_of(result);
      }
    }
    sync_block();  // before the rings are filled again
    left -= count;
    tile = 0;
    state += !whole;
    if (++job == s.row_tiles * (int)num_kv_heads) job = 0, at++;
  }
}

SKV_EXPORT(attn_decode)
