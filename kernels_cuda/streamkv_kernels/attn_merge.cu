// Joins the states that pieces of a row left (attention.cuh): of decode's shares, of prefill's pieces, of a shared prefix's tiles.
//
// What is to be joined is a list of 8 numbers each, one list for one KV head's rows:
//
//     0 first_row     of the sequence's new tokens in `out`; or where its entries of row_index begin
//     1 first_packed  its first packed row here: (token, query head of the group), token by token
//     2 rows          packed rows; 0 = nothing to do, so that a grid of constant size serves every step
//     3 head          KV head
//     4 state         the first of `states` states that follow each other, each of state_rows rows: row i belongs to first_packed + i
//     5 states
//     6 has_prefix    whether the row's state in prefix_out joins too
//
// Grid: (merges, any); block: any number of warps, a row each. OUT=float makes states of a shared prefix: then `out` and
// `logarithms` are what decode and the last merge take as prefix_out and prefix_logarithms.
#include "attention.cuh"

#ifndef OUT
#define OUT IO
#endif
constexpr int COLUMNS = (HEAD_DIM + 31) / 32;  // of a lane

SKV_KERNEL(attn_merge)
(const float* __restrict__ state_out, const float* __restrict__ state_logarithms,  // [states, state_rows, HEAD_DIM], [states, state_rows]
 const int* __restrict__ merges,     // [grid, 8]
 const int* __restrict__ row_index,  // may be null; else the token in `out` of each row
 OUT* __restrict__ out, float* __restrict__ logarithms, const float* __restrict__ sinks,  // Output
 const float* __restrict__ prefix_out, const float* __restrict__ prefix_logarithms, i64 state_rows, i64 num_heads, i64 num_kv_heads) {
  const int* merge = merges + blockIdx.x * 8;
  const int first_row = merge[0], first_packed = merge[1], rows = merge[2], head = merge[3], states = merge[5];
  const int group = (int)(num_heads / num_kv_heads), warps = (int)blockDim.x / 32;
  const Output<OUT> output = {out, logarithms, sinks, prefix_out, prefix_logarithms, num_heads};
  for (int row = (int)(blockIdx.y * warps + threadIdx.x / 32); row < rows; row += (int)gridDim.y * warps) {
    State state[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) state[i] = {NEG_INF, 0.f, 0.f};
    for (int piece = 0; piece < states; piece++) {
      const i64 at = (merge[4] + piece) * state_rows + row;
      const float logarithm = state_logarithms[at];
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) {
        const int column = i * 32 + lane_id();
        if (column < HEAD_DIM) state[i] = join(state[i], state_of(logarithm, state_out[at * HEAD_DIM + column]));
      }
    }
    const int packed = first_packed + row, place = first_row + packed / group;
    const i64 token = row_index ? row_index[place] : place;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      const int column = i * 32 + lane_id();
      if (column < HEAD_DIM) write_output(output, token, (i64)head * group + packed % group, column, state[i], merge[6] != 0);
    }
  }
}

SKV_EXPORT(attn_merge)
