// From logits to tokens: temperature, top-k, top-p, min-p, and the token that one uniform number picks. No sorting, no rejection,
// nothing that depends on the other rows: a row's token is a function of its logits, parameters, seed, branch and position.
//
// Defined as streamkv.runner.sampler defines it:
//
//   x          = logit / temperature, rounded to float32; temperature 0 takes the first of the largest logits
//   top-k      keeps x >= the k-th largest
//   top-p      of these, keeps x >= the smallest v for which exp(x - largest) over all x > v sums to less than p of the whole
//   min-p      keeps x >= the largest + log p, summed in float64, rounded to float32
//   token      the first in order of ids at which the running sum of the kept weights exceeds u times their sum
//   u          (word + 1/2) / 2^32, word = the first of Philox 4x32-10 with key seed and counter (position, branch, 0)
//
// Equal to that bit by bit but for exp and the sums, which there are float32 and float64, here integers (logits.cuh): where they
// disagree, u or p lies within about 1e-6 of a step of the distribution. Greedy tokens, top-k and min-p are always equal.
//
//   search     the smallest key v such that the sum over keys above v is less than a target: BINS equal parts of the range of
//              keys, one histogram in shared memory, the part where the sum crosses the target becomes the range; at most three
//              passes over the row. Counts for top-k, weights for top-p
//   launch     a block a row, up to 1024 threads. Shared memory: see `Shared`
//   versions   1. What to measure first: conflicts of the histogram's 64-bit atomics, and rows split between blocks for few rows
//
// compile-time: LOGIT (float, bf16, f16)
#include "logits.cuh"

constexpr int BINS = 4096, WARPS = 32;
constexpr float COLDEST = 1e-30f;  // division by less could overflow; long before, only the most probable token has any weight
struct Shared {
  u64 bins[BINS];
  u64 scratch[WARPS], segment[WARPS];
  u64 found[2];
};

struct Row { const LOGIT* logits; int size; float temperature; };

// f(token, x) for the tokens begin .. end, by `workers` threads.
template <class F> SKV_DEV void each_scaled(Row row, int begin, int end, int worker, int workers, F f) {
  const bool as_they_are = row.temperature == 1.f;
  each(row.logits, begin, end, worker, workers,
       [&](int token, float logit) { f(token, as_they_are ? logit : div_rn(logit, row.temperature)); });
}
template <class F> SKV_DEV void each_scaled(Row row, F f) { each_scaled(row, 0, row.size, threadIdx.x, blockDim.x, f); }

// The sum of `value` over the threads before this one.
SKV_DEV u64 sum_before(u64 value, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 sum = value;
  for (int back = 1; back < 32; back *= 2) {
    const u64 other = shfl(sum, (lane - back) & 31);
    if (lane >= back) sum += other;
  }
  if (lane == 31) shared.scratch[warp] = sum;
  sync_block();
  for (int i = 0; i < warp; i++) sum += shared.scratch[i];
  sync_block();
  return sum - value;
}

// The smallest key v among lowest .. highest such that the values of larger keys sum to less than `target`, which is at least 1
// and at most the sum of all. value(x) of a logit, looked at only within the range.
template <class F> SKV_DEV u32 search(Row row, Shared& shared, u32 lowest, u32 highest, u64 target, F value) {
  const int own = (BINS + (int)blockDim.x - 1) / (int)blockDim.x;
  u64 above = 0;
  for (;;) {
    int shift = 0;
    while ((highest - lowest) >> shift >= BINS) shift++;
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) shared.bins[i] = 0;
    sync_block();
    each_scaled(row, [&](int, float x) {
      const u32 key = key_of(x);
      if (key < lowest || key > highest) return;
      const u64 amount = value(x);
      if (amount) atomic_add(&shared.bins[(key - lowest) >> shift], amount);
    });
    sync_block();
    // Threads take the bins from above: exactly one finds the target within its own.
    u64 mine = 0;
    for (int i = 0; i < own; i++) {
      const int bin = BINS - 1 - ((int)threadIdx.x * own + i);
      if (bin >= 0) mine += shared.bins[bin];
    }
    u64 sum = above + sum_before(mine, shared);
    for (int i = 0; i < own; i++) {
      const int bin = BINS - 1 - ((int)threadIdx.x * own + i);
      if (bin < 0) break;
      const u64 next = sum + shared.bins[bin];
      if (sum < target && next >= target) {
        shared.found[0] = (u64)bin;
        shared.found[1] = sum;
      }
      sum = next;
    }
    sync_block();
    lowest += (u32)shared.found[0] << shift;
    above = shared.found[1];
    if (!shift) return lowest;
    highest = lowest + ((1u << shift) - 1u) < highest ? lowest + ((1u << shift) - 1u) : highest;
  }
}

// p · total rounded up, at least 1: a sum of integers is below this if and only if it is below p · total.
SKV_DEV u64 at_least(double p, u64 total) {
  const double exact = p * (double)total;
  const u64 below = (u64)exact, target = below + ((double)below < exact);
  return target ? target : 1;
}

// Philox 4x32-10 (Salmon et al., SC '11), the first word.
SKV_DEV u32 philox(u64 seed, u32 branch, u64 position) {
  u32 c[4] = {(u32)position, (u32)(position >> 32), branch, 0u}, k[2] = {(u32)seed, (u32)(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const u64 p = (u64)0xd2511f53u * c[0], q = (u64)0xcd9e8d57u * c[2];
    c[0] = (u32)(q >> 32) ^ c[1] ^ k[0];
    c[1] = (u32)q;
    c[2] = (u32)(p >> 32) ^ c[3] ^ k[1];
    c[3] = (u32)p;
    k[0] += 0x9e3779b9u;
    k[1] += 0xbb67ae85u;
  }
  return c[0];
}

// The integer part of (word + 1/2) / 2^32 · total, total < 2^63.
SKV_DEV u64 share_of(u32 word, u64 total) {
  const u64 low = (u64)word * (u32)total, half = total >> 1;
  return (u64)word * (total >> 32) + (low >> 32) + (half >> 32) + (((low & 0xffffffffu) + (half & 0xffffffffu)) >> 32);
}

// The first token at which the running sum of the weights exceeds share_of(word, their sum). The largest logit always has weight.
template <class F> SKV_DEV int pick(Row row, Shared& shared, u32 word, F weight) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, width = (row.size + warps - 1) / warps;
  // Every warp adds up a part of the row; the one with the token in it is gone through by all threads.
  u64 sum = 0;
  each_scaled(row, min(warp * width, row.size), min((warp + 1) * width, row.size), threadIdx.x % 32, 32,
              [&](int, float x) { sum += weight(x); });
  sum = warp_reduce(sum, sum_of);
  if (threadIdx.x % 32 == 0) shared.segment[warp] = sum;
  sync_block();
  u64 total = 0;
  for (int i = 0; i < warps; i++) total += shared.segment[i];
  const u64 target = share_of(word, total);
  u64 before = 0;
  int part = 0;
  while (before + shared.segment[part] <= target) before += shared.segment[part++];

  const int begin = min(part * width, row.size), end = min(begin + width, row.size);
  const int own = (end - begin + (int)blockDim.x - 1) / (int)blockDim.x;
  const int first = min(begin + (int)threadIdx.x * own, end), last = min(first + own, end);
  u64 mine = 0;
  each_scaled(row, first, last, 0, 1, [&](int, float x) { mine += weight(x); });
  u64 running = before + sum_before(mine, shared);
  if (running <= target && running + mine > target)
    each_scaled(row, first, last, 0, 1, [&](int token, float x) {
      const u64 next = running + weight(x);
      if (running <= target && next > target) shared.found[0] = (u64)token;
      running = next;
    });
  sync_block();
  return (int)shared.found[0];
}

SKV_BOUNDED_KERNEL(sample, 1024, 1)(
    const LOGIT* logits, i64 stride, i64 vocab_size,          // [rows, vocab_size], `stride` numbers between rows
    const float* temperature,                                 // [rows]; 0 = the most probable token
    const i64* top_k, const double* top_p,                    // [rows]; 0 and 1 = all
    const double* log_min_p,                                  // [rows]; -inf = all
    const i64* seed, const i64* branch, const i64* position,  // [rows]
    const i64* fallback,                                      // [rows] or null: tokens for rows of -inf
    i64* tokens) {                                            // [rows]
  SKV_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const i64 r = blockIdx.x;
  const bool greedy = temperature[r] == 0.f;
  const Row row = {logits + r * stride, (int)vocab_size, greedy ? 1.f : fmaxf(temperature[r], COLDEST)};

  u64 best = 0;
  each_scaled(row, [&](int token, float x) { best = larger_of(best, candidate(token, x)); });
  best = block_reduce(best, shared.scratch, larger_of);
  const float largest = logit_of(best);
  int token = token_of(best);
  if (largest == NEG_INF) {
    if (fallback) token = (int)fallback[r];
  } else if (!greedy && is_finite(largest)) {
    const u32 highest = key_of(largest);
    u32 low = 0;
    if (top_k[r] > 0 && top_k[r] < vocab_size)
      low = search(row, shared, 0u, highest, (u64)top_k[r], [](float) { return (u64)1; });
    const auto weight = [&](float x) { return key_of(x) < low ? 0 : weight_of(add_rn(x, -largest)); };
    if (top_p[r] < 1.) {
      u64 total = 0;
      each_scaled(row, [&](int, float x) { total += weight(x); });
      total = block_reduce(total, shared.scratch, sum_of);
      const u64 target = at_least(top_p[r], total);
      // What is kept last weighs at least as much as an equal share of what is cut: no need to count those below.
      const float least = (lg2((float)(total - target + 1)) - lg2((float)vocab_size) - (float)WEIGHT_BITS) * .6931471806f;
      const u32 bound = key_of(largest + least - .01f - 1e-6f * fabsf(largest));
      low = search(row, shared, bound < low ? low : bound, highest, target, weight);
    }
    const u32 least_probable = key_of((float)((double)largest + log_min_p[r]));
    if (low < least_probable) low = least_probable;
    token = pick(row, shared, philox((u64)seed[r], (u32)branch[r], (u64)position[r]), weight);
  }
  if (threadIdx.x == 0) tokens[r] = min(max(token, 0), (int)vocab_size - 1);
}
SKV_EXPORT(sample)
