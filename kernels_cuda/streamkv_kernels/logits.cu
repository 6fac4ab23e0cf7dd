// What is done to logits beside sampling: the most probable token, penalties and masks, log-probabilities.
//
//   layout   logits [rows, vocab_size] with `stride` numbers between rows
//   launch   a block a row, up to 1024 threads; shared memory for a number of 8 bytes a warp, twice
//
// compile-time: LOGIT (float, bf16, f16)
#include "logits.cuh"

constexpr int WARPS = 32;

// Of each row the first of its largest logits, and whether all are finite.
SKV_BOUNDED_KERNEL(most_probable, 1024, 1)(
    const LOGIT* logits, i64 stride, i64 vocab_size, i64* tokens, unsigned char* finite) {
  SKV_SHARED(memory);
  u64* scratch = reinterpret_cast<u64*>(memory);
  u64 best = 0, bad = 0;
  each(logits + blockIdx.x * stride, 0, (int)vocab_size, threadIdx.x, blockDim.x, [&](int token, float x) {
    best = larger_of(best, candidate(token, x));
    bad += !is_finite(x);
  });
  best = block_reduce(best, scratch, larger_of);
  bad = block_reduce(bad, scratch, sum_of);
  if (threadIdx.x == 0) {
    tokens[blockIdx.x] = token_of(best);
    finite[blockIdx.x] = bad == 0;
  }
}

// Short lists of tokens, one a row: row r has the entries start[r] .. start[r + 1]. `f` gets those of this thread.
template <class F> SKV_DEV void each_listed(const i64* start, const int* ids, i64 vocab_size, F f) {
  if (start)
    for (i64 i = start[blockIdx.x] + threadIdx.x; i < start[blockIdx.x + 1]; i += blockDim.x)
      if (ids[i] >= 0 && ids[i] < vocab_size) f(i, ids[i]);
}

// changed = logits after penalties, bias and masks, in this order, float32. Penalties as streamkv.runner.sampling_history
// defines them, bit by bit: seen tokens are divided (at least 0) or multiplied (negative) by `repetition`, then less `presence`
// if the output has them, less `frequency` times how often. In no list is a token twice, but in `banned` it may be.
SKV_BOUNDED_KERNEL(change_logits, 1024, 1)(
    const LOGIT* logits, i64 stride, i64 vocab_size, float* changed, i64 changed_stride,
    const float* penalties,                                              // [rows, 3]
    const i64* seen_start, const int* seen_ids, const int* seen_counts,  // null, or [rows + 1] and lists
    const i64* bias_start, const int* bias_ids, const float* bias,
    const i64* banned_start, const int* banned_ids,
    const u32* allowed, i64 allowed_stride,                              // null, or [rows, words]: bit t % 32 of word t / 32
    i64* best, unsigned char* finite) {                                  // [rows], of `logits`, as most_probable
  SKV_SHARED(memory);
  u64* scratch = reinterpret_cast<u64*>(memory);
  const i64 row = blockIdx.x;
  changed += row * changed_stride;
  if (allowed) allowed += row * allowed_stride;

  u64 largest = 0, bad = 0;
  each(logits + row * stride, 0, (int)vocab_size, threadIdx.x, blockDim.x, [&](int token, float x) {
    largest = larger_of(largest, candidate(token, x));
    bad += !is_finite(x);
    // Nothing that follows makes -inf anything else.
    changed[token] = allowed && !(allowed[token / 32] >> token % 32 & 1u) ? NEG_INF : x;
  });
  largest = block_reduce(largest, scratch, larger_of);  // and the barrier between writing and changing
  bad = block_reduce(bad, scratch, sum_of);
  if (threadIdx.x == 0) {
    best[row] = token_of(largest);
    finite[row] = bad == 0;
  }

  each_listed(seen_start, seen_ids, vocab_size, [&](i64 i, int token) {
    const float repetition = penalties[row * 3], presence = penalties[row * 3 + 1], frequency = penalties[row * 3 + 2];
    float x = changed[token];
    x = x < 0.f ? mul_rn(x, repetition) : div_rn(x, repetition);
    x = add_rn(x, seen_counts[i] > 0 ? -presence : 0.f);
    changed[token] = add_rn(x, -mul_rn(frequency, (float)seen_counts[i]));
  });
  sync_block();
  each_listed(bias_start, bias_ids, vocab_size, [&](i64 i, int token) { changed[token] = add_rn(changed[token], bias[i]); });
  sync_block();
  each_listed(banned_start, banned_ids, vocab_size, [&](i64, int token) { changed[token] = NEG_INF; });
}

// Of one token a row its log-probability, and its rank: 1 + how many logits are larger. A row with NaN or +Inf gives NaN.
SKV_BOUNDED_KERNEL(token_logprobs, 1024, 1)(
    const LOGIT* logits, i64 stride, i64 vocab_size, const i64* tokens, float* logprobs, i64* ranks) {
  SKV_SHARED(memory);
  u64* scratch = reinterpret_cast<u64*>(memory);
  logits += blockIdx.x * stride;
  const float chosen = to_f32(logits[tokens[blockIdx.x]]);
  u64 best = 0, larger = 0, total = 0;
  each(logits, 0, (int)vocab_size, threadIdx.x, blockDim.x, [&](int token, float x) {
    best = larger_of(best, candidate(token, x));
    larger += x > chosen;
  });
  const float largest = logit_of(block_reduce(best, scratch, larger_of));
  larger = block_reduce(larger, scratch, sum_of);
  each(logits, 0, (int)vocab_size, threadIdx.x, blockDim.x, [&](int, float x) { total += weight_of(add_rn(x, -largest)); });
  total = block_reduce(total, scratch, sum_of);
  if (threadIdx.x == 0) {
    const float normaliser = lg2((float)total * (1.f / (float)((u64)1 << WEIGHT_BITS))) * .6931471806f;
    logprobs[blockIdx.x] = is_finite(largest) ? chosen - largest - normaliser : float_of(0x7fc00000u);
    ranks[blockIdx.x] = (i64)larger + 1;
  }
}
SKV_EXPORT(most_probable)
SKV_EXPORT(change_logits)
SKV_EXPORT(token_logprobs)
