// What the host hands to the attention kernels; the mirror of these structs in Python is `native.py`.
#pragma once
#include "simd.h"

namespace skv {

// One step's packed batch, as `streamkv.attention.StepTensors` has it.
struct Step {
  int32_t num_seqs, num_tokens, max_blocks, block_size;
  const int32_t* query_start;   // [num_seqs + 1]
  const int32_t* seq_lens;      // [num_seqs]
  const int32_t* block_tables;  // [num_seqs][max_blocks]
  const int64_t* slots;         // [num_tokens], -1 = padding
};

// As `streamkv.attention.LayerSpec`; window 0 and soft_cap 0 = none.
struct Shape {
  int32_t num_heads, num_kv_heads, head_dim, window;
  float scale, soft_cap;
};

// One layer's tensors. Strides in elements; a head's numbers lie side by side.
struct Call {
  void* pool;  // [num_blocks][num_kv_heads][2][block_size * head_dim]
  const void *query, *key, *value;
  int64_t query_token, query_head, key_token, key_head, value_token, value_head;
  const float* sinks;  // [num_heads], or null
  void* out;           // [num_tokens][num_heads][head_dim]
  int32_t is_float;    // else bf16
};

struct Plan;

// Inside a parallel region: every thread of the team calls it; ends with a barrier.
void attend_team(Plan& plan, const Call& call);

}  // namespace skv
