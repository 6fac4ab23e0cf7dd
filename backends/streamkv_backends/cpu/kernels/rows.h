// The small operations between attention and linear layers, in bf16. Where torch rounds between two operations, so do these.
#pragma once
#include "simd.h"

namespace skv {

// Root mean square norm (arXiv 1910.07467) of outer * inner rows of `width` numbers each; strides in elements.
struct Norm {
  const bf16* x;
  int64_t outer_stride, inner_stride;
  int32_t outer, inner, width;
  int32_t round_first;   // Llama: the normed row is rounded before it is multiplied; else (Gemma) after
  const bf16* weight;    // [width]
  float eps, offset;     // multiplied by weight + offset
  bf16* out;             // [outer][inner][width]
};

// out = act(gate) * up, for rows of gate and up side by side.
struct Gate {
  const bf16* x;  // [rows][2 * width]
  int32_t rows, width;
  enum Kind : int32_t { SILU = 0, GELU_TANH = 1 } kind;
  bf16* out;  // [rows][width]
};

// out = a + b, all [count].
struct Add {
  const bf16 *a, *b;
  bf16* out;
  int64_t count;
};

// Rotary position embedding (arXiv 2104.09864) of the halves of a head: x * cos + (-second half, first half) * sin.
struct Rotate {
  const bf16 *query, *key, *cos, *sin;  // cos and sin: [tokens][dim]
  int64_t query_token, query_head, key_token, key_head;
  int32_t tokens, query_heads, key_heads, dim;
  bf16 *query_out, *key_out;  // [tokens][heads][dim]
};

// Of each row of logits the first of its largest numbers, and whether all are finite.
struct Argmax {
  const bf16* x;  // [rows][width]
  int64_t stride;
  int32_t rows, width;
  int64_t* index;   // [rows]
  uint8_t* finite;  // [rows]
};

void norm_team(const Norm& call);
void gate_team(const Gate& call);
void add_team(const Add& call);
void rotate_team(const Rotate& call);
void argmax_team(const Argmax& call);

}  // namespace skv
