// Paged attention over one pool layer: write this step's keys and values, then attend. bf16 or float, prefill, chunk and decode alike.
//
// Pool of a layer: [block][kv_head][2][block_size * D]. The slots of a block are cut into tiles of 16 tokens, laid out so that no
// kernel ever sums across lanes or converts what it loads (a pair is 2 bf16 or 1 float, 4 bytes):
//
//     keys of a tile     [D / pair][16 tokens][pair]    one vector = the same pair of dimensions of 16 tokens (W at a time)
//     values of a tile   [16 / pair][D][pair]           one vector = the same pair of tokens in W dimensions
//
// The query heads of one KV head are rows of one small matrix, so every key and value is loaded once a group (GQA).
// Softmax runs over chunks of 128 tokens that begin at multiples of 128; the chunks' results (max, sum, weighted values) are
// merged in order. That a result depends on nothing else than its own sequence follows from it: neither the batch, nor how a
// prompt was cut, nor splitting, nor sharing changes a bit of it.
//
//     split    few sequences and many threads: chunks are computed apart, merged afterwards
//     shared   several sequences begin with the same blocks: those chunks are read once for all of them
//
// Sources: PagedAttention (arXiv 2309.06180), online softmax (arXiv 1805.02867), cascade inference (flashinfer.ai 2024/02/02).
#include "amx.h"
#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <exception>
#include <vector>

namespace skv {
namespace {

constexpr int TILE = 16, CHUNK = 128, TILES = CHUNK / TILE;
constexpr int ROWS = 32;     // most query rows that share what is loaded
constexpr int R_MAX = 6;     // rows of a register tile
constexpr int MAX_DIM = 512; // of a head
constexpr int SPAN = 128;    // dimensions that are summed in one go: longer sums lose digits
constexpr float NOTHING = -FLT_MAX;  // maximum of no scores; finite, so that a difference of two is 0 and not NaN

// One query row: head `group` of KV head h reads head h * G + group of token `token`, which stands at `position`.
struct Row {
  int32_t token, group, position;
};

// What one thread does at a time: some rows, for every KV head in turn of the list.
struct Item {
  enum Kind : int32_t { WHOLE, PREFIX, SUFFIX, PART, MERGE } kind;
  int32_t first_row, num_rows;
  int32_t sequence;             // whose block table it walks
  int32_t first_chunk, end_chunk;
  int64_t scratch;              // PREFIX writes, SUFFIX reads: state of its first row; PART, MERGE: partial of first row and chunk 0
  int32_t num_chunks;           // PART, MERGE: chunks of the whole, of which partials are kept
};

}  // namespace

// A step for layers of one shape; filled once, used by each of them.
struct Plan {
  Step step;
  Shape shape;
  std::vector<Row> rows;
  std::vector<Item> first, second;  // the second list needs what the first has left in `scratch`
  std::vector<float> scratch;
  int state_size() const { return shape.head_dim + 2; }  // weighted values, sum, maximum
};

namespace {

// ---- register tiles -----------------------------------------------------------------------------------------------

// Both ask for what is read one phase later, line by line as they read: the values while the scores are computed, the next keys
// while the values are summed. All at once would wait for memory; `later` null = many rows share what is read, so it pays not.

template <class T, int R, int N>  // scores of R rows with N tiles of keys
inline void scores(const T* q, int dim, const T* const* tiles, const T* const* later, float* s) {
  constexpr int V = TILE / W, P = PAIR<T>;
  for (int from = 0; from < dim / P; from += SPAN / P) {
    vf acc[R][N * V] = {};
    for (int d = from; d < std::min(dim, from * P + SPAN) / P; d++) {
      vu key[N * V];
#pragma GCC unroll 8
      for (int j = 0; j < N * V; j++) key[j] = *(const vu_any*)(tiles[j / V] + (d * TILE + j % V * W) * P);
      if (later)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) prefetch(later[j] + d * TILE * P);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const uint32_t query = *(const u32_any*)(q + r * dim + d * P);
#pragma GCC unroll 8
        for (int j = 0; j < N * V; j++) acc[r][j] = dot((const T*)0, acc[r][j], key[j], query);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int j = 0; j < N * V; j++) {
        float* to = s + r * CHUNK + j * W;
        store(to, from ? load(to) + acc[r][j] : acc[r][j]);
      }
  }
}

template <class T, int R, int C>  // weighted values of R rows in C * W dimensions from `d0` on
inline void weigh(const T* weights, const T* const* tiles, const T* const* later, int tokens, int dim, int d0, float* out) {
  constexpr int P = PAIR<T>;
  vf acc[R][C] = {};
  const auto pairs = [&](int tile, int first, int last, uint32_t mask) {
    const T *values = tiles[tile], *w = weights + tile * TILE;
    for (int t = first; t < last; t++) {
      vu value[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) value[c] = *(const vu_any*)(values + (t * dim + d0 + c * W) * P) & mask;
      if (later)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) prefetch(later[tile] + (t * dim + d0 + c * W) * P);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const uint32_t weight = *(const u32_any*)(w + r * CHUNK + t * P);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[r][c] = dot((const T*)0, acc[r][c], value[c], weight);
      }
    }
  };
  const int whole = tokens / TILE, rest = tokens % TILE / P;
  for (int j = 0; j < whole; j++) pairs(j, 0, TILE / P, ~0u);
  if (tokens % TILE) {
    pairs(whole, 0, rest, ~0u);
    // The second slot of the last pair holds no token and perhaps NaN: 0 * NaN would be NaN.
    if (tokens % P) pairs(whole, rest, rest + 1, 0xffff);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) store(out + r * dim + d0 + c * W, acc[r][c]);
}

template <class T, int R>
void scores_of_rows(const T* q, int dim, const T* const* tiles, const T* const* later, int num_tiles, float* s) {
  constexpr int N = W == 16 ? 4 : 1;  // 24 accumulators of 32 registers, 12 of 16
  int j = 0;
  for (; j + N <= num_tiles; j += N) scores<T, R, N>(q, dim, tiles + j, later ? later + j : nullptr, s + j * TILE);
  for (; j < num_tiles; j++) scores<T, R, 1>(q, dim, tiles + j, later ? later + j : nullptr, s + j * TILE);
}

template <class T, int R>
void weigh_rows(const T* weights, const T* const* tiles, const T* const* later, int tokens, int dim, float* out) {
  constexpr int C = W == 16 ? 4 : W == 8 ? 2 : 4;
  int d = 0;
  for (; d + C * W <= dim; d += C * W) weigh<T, R, C>(weights, tiles, later, tokens, dim, d, out);
  for (; d < dim; d += W) weigh<T, R, 1>(weights, tiles, later, tokens, dim, d, out);
}

template <template <int> class F, class... A>
inline void by_rows(int count, A... args) {
  switch (count) {
    case 6: F<6>::run(args...); break;
    case 5: F<5>::run(args...); break;
    case 4: F<4>::run(args...); break;
    case 3: F<3>::run(args...); break;
    case 2: F<2>::run(args...); break;
    default: F<1>::run(args...);
  }
}
template <class T>
struct Tiles {
  template <int R>
  struct Scores {
    static void run(const T* q, int dim, const T* const* tiles, const T* const* later, int n, float* s) {
      scores_of_rows<T, R>(q, dim, tiles, later, n, s);
    }
  };
  template <int R>
  struct Weigh {
    static void run(const T* w, const T* const* tiles, const T* const* later, int n, int dim, float* o) {
      weigh_rows<T, R>(w, tiles, later, n, dim, o);
    }
  };
};

// ---- one chunk ------------------------------------------------------------------------------------------------------

// Results of some rows: of one chunk, or of all chunks so far.
struct State {
  alignas(64) float values[ROWS * MAX_DIM];
  alignas(64) float sum[ROWS], max[ROWS];
};

template <class T>
struct Bench {  // what one thread works with
  alignas(64) T query[ROWS * MAX_DIM];
  alignas(64) float score[ROWS * CHUNK];
  alignas(64) T weight[ROWS * CHUNK];
  alignas(64) T values[CHUNK * MAX_DIM];  // of a chunk, one after the other, for the matrix tiles
  int tile_rows = 0;                      // what the matrix tiles are set up for; 0 = they are not
  State chunk, total;
};

// ---- the same with matrix tiles ---------------------------------------------------------------------------------------
// For items of many rows, prompts above all. They sum in another order than vectors do, so that here bf16 results may differ in the
// last bit between a token in a long chunk and the same token decoded; float32 never sees a tile.

#ifdef __AMX_BF16__
inline bool by_tiles(int rows, int dim) { return rows > 8 && dim % TILE_DEPTH == 0 && tiles_allowed(); }

inline void tile_scores(const Bench<bf16>& bench, int rows, int dim, const bf16* const* keys, const bf16* const* later, int num_tiles,
                        float* score) {
  for (int j = 0; j < num_tiles; j += 2) {
    const int k = std::min(j + 1, num_tiles - 1);  // an odd last one is computed twice, the second time behind the end
    tiles_multiply(bench.query, dim * 2, rows > TILE_ROWS, keys[j], keys[k], 64, dim, score + j * TILE, CHUNK * 4, [&](int step) {
      for (int i = 0; later && i < TILE_ROWS; i++) {
        prefetch(later[j] + (step * TILE_ROWS + i) * 32);
        prefetch(later[k] + (step * TILE_ROWS + i) * 32);
      }
    });
  }
}

inline void tile_weigh(Bench<bf16>& bench, int rows, int dim, const bf16* const* values, const bf16* const* later, int tokens,
                       float* out) {
  // Side by side, and zeros where no token is: 0 * NaN would be NaN.
  const int pairs = tokens / 2, end = (tokens + TILE_DEPTH - 1) / TILE_DEPTH * TILE_DEPTH;
  bf16* side = bench.values;
  for (int t = 0; t < pairs; t++, side += 2 * dim) {
    const bf16* from = values[t / 8] + t % 8 * dim * 2;
    for (int d = 0; d < dim; d += 32) {
      *(vu*)(side + d) = *(const vu_any*)(from + d);
      *(vu*)(side + dim + d) = *(const vu_any*)(from + dim + d);
      if (later) {
        prefetch(later[t / 8] + t % 8 * dim * 2 + d);
        prefetch(later[t / 8] + t % 8 * dim * 2 + dim + d);
      }
    }
  }
  if (tokens % 2) {
    const bf16* from = values[pairs / 8] + pairs % 8 * dim * 2;
    for (int d = 0; d < 2 * dim; d += 32) *(vu*)(side + d) = *(const vu_any*)(from + d) & 0xffff;
    side += 2 * dim;
  }
  memset(side, 0, sizeof(bf16) * (bench.values + end * dim - side));
  for (int r = 0; r < rows; r++) memset(bench.weight + r * CHUNK + tokens, 0, sizeof(bf16) * (end - tokens));
  written();
  for (int d = 0; d < dim; d += 32) {
    const bf16* b = bench.values + d * 2;
    tiles_multiply(bench.weight, CHUNK * 2, rows > TILE_ROWS, b, b + 32, dim * 4, end, out + d, dim * 4, [](int) {});
  }
}
#endif

// The softmax's numerators of one row, in place of its scores; [first, last) is what the row sees of the chunk.
template <class T>
void soften(const Shape& shape, float* s, T* weight, int tokens, int first, int last, float* max, float* sum) {
  const int end = (tokens + TILE - 1) / TILE * TILE;
  *max = NOTHING;
  *sum = 0;
  if (first >= last) {
    memset(weight, 0, end * sizeof(T));
    return;
  }
  const int low = first / W * W, high = std::min(end, (last + W - 1) / W * W);
  vf top = splat(NOTHING);
  for (int i = low; i < high; i += W) {
    vf x = load(s + i) * shape.scale;
    if (shape.soft_cap > 0) x = vtanh(x / shape.soft_cap) * shape.soft_cap;
    if (i < first || i + W > last) {
      const vi at = lanes() + i;
      x = select((at >= first) & (at < last), x, splat(NOTHING));
    }
    store(s + i, x);
    top = vmax(x, top);  // a NaN is passed over here; it comes back from the exponential
  }
  *max = largest(top);
  vf total = {};
  for (int i = low; i < high; i += W) {
    vf e = vexp(load(s + i) - *max);
    if (i < first || i + W > last) {
      const vi at = lanes() + i;
      e = select((at >= first) & (at < last), e, vf{});
    }
    total += e;
    store(weight + i, e);
  }
  memset(weight, 0, low * sizeof(T));
  memset(weight + high, 0, (end - high) * sizeof(T));
  *sum = skv::sum(total);
}

// total = total merged with one chunk's part. The only place where results meet.
void merge(State& total, const float* values, const float* sum, const float* max, int rows, int dim) {
  alignas(64) float keep[ROWS], add[ROWS];
  for (int r = 0; r < rows; r += W) {
    const vf old = load(total.max + r), now = load(max + r), top = vmax(old, now);
    const vf f = vexp(old - top), g = vexp(now - top);
    store(keep + r, f);
    store(add + r, g);
    store(total.max + r, top);
    store(total.sum + r, load(total.sum + r) * f + load(sum + r) * g);
  }
  for (int r = 0; r < rows; r++)
    for (int d = 0; d < dim; d += W) {
      float* t = total.values + r * dim + d;
      store(t, load(t) * keep[r] + load(values + r * dim + d) * add[r]);
    }
}

void clear(State& state, int rows, int dim) {
  memset(state.values, 0, sizeof(float) * rows * dim);
  for (int r = 0; r < ROWS; r++) {
    state.sum[r] = 0;
    state.max[r] = NOTHING;
  }
}

// Keys of a chunk, tile by tile; the values lie block_size * dim behind them.
template <class T>
int find_tiles(const Plan& plan, const T* pool, const Item& item, int head, int chunk, int length, const T** keys) {
  const int dim = plan.shape.head_dim, size = plan.step.block_size, end = std::min(length, (chunk + 1) * CHUNK);
  const int32_t* table = plan.step.block_tables + (int64_t)item.sequence * plan.step.max_blocks;
  int count = 0;
  for (int position = chunk * CHUNK; position < end; position += TILE) {
    const T* part = pool + ((int64_t)table[position / size] * plan.shape.num_kv_heads + head) * 2 * size * dim;
    keys[count++] = part + position % size * dim;
  }
  return count;
}

// The keys that are read after a chunk: of the following one, or behind the last one of the next head's first.
template <class T>
void find_next(const Plan& plan, const T* pool, const Item& item, int head, int chunk, int length, const T** keys) {
  if (++chunk == item.end_chunk) {
    chunk = item.first_chunk;
    head = std::min(head + 1, plan.shape.num_kv_heads - 1);
  }
  const int count = find_tiles(plan, pool, item, head, chunk, length, keys);
  for (int j = count; j < TILES; j++) keys[j] = keys[0];
}

template <class T>
void multiply_keys(Bench<T>& bench, int rows, int dim, const T* const* keys, const T* const* later, int num_tiles) {
#ifdef __AMX_BF16__
  if constexpr (sizeof(T) == 2)
    if (by_tiles(rows, dim)) return tile_scores(bench, rows, dim, keys, later, num_tiles, bench.score);
#endif
  for (int r = 0; r < rows; r += R_MAX)
    by_rows<Tiles<T>::template Scores>(std::min(R_MAX, rows - r), (const T*)bench.query + r * dim, dim, keys, r ? nullptr : later,
                                       num_tiles, bench.score + r * CHUNK);
}

template <class T>
void multiply_values(Bench<T>& bench, int rows, int dim, const T* const* values, const T* const* later, int tokens) {
#ifdef __AMX_BF16__
  if constexpr (sizeof(T) == 2)
    if (by_tiles(rows, dim)) return tile_weigh(bench, rows, dim, values, later, tokens, bench.chunk.values);
#endif
  for (int r = 0; r < rows; r += R_MAX)
    by_rows<Tiles<T>::template Weigh>(std::min(R_MAX, rows - r), (const T*)bench.weight + r * CHUNK, values, r ? nullptr : later, tokens,
                                      dim, bench.chunk.values + r * dim);
}

template <class T>
void prepare_tiles(Bench<T>& bench, int rows, int dim) {
#ifdef __AMX_BF16__
  if constexpr (sizeof(T) == 2)
    if (by_tiles(rows, dim) && bench.tile_rows != std::min(rows, TILE_ROWS)) tiles_begin(bench.tile_rows = std::min(rows, TILE_ROWS));
#endif
  (void)bench, (void)rows, (void)dim;
}

template <class T>
void leave_tiles(Bench<T>& bench) {
#ifdef __AMX_BF16__
  if (bench.tile_rows) tiles_end();
#endif
  bench.tile_rows = 0;
}

template <class T>
void compute_chunk(const Plan& plan, const T* pool, const Item& item, int head, int chunk, Bench<T>& bench) {
  const Shape& shape = plan.shape;
  const int dim = shape.head_dim, size = plan.step.block_size, begin = chunk * CHUNK;
  const Row* rows = plan.rows.data() + item.first_row;
  const int length = item.kind == Item::PREFIX ? begin + CHUNK : rows[item.num_rows - 1].position + 1;
  const int tokens = std::min(CHUNK, length - begin), num_tiles = (tokens + TILE - 1) / TILE;
  const T *keys[TILES], *values[TILES], *next[TILES];
  find_tiles(plan, pool, item, head, chunk, length, keys);
  for (int j = 0; j < num_tiles; j++) values[j] = keys[j] + size * dim;
  const bool few = item.num_rows <= 16;  // bound by memory: the first rows ask for what comes
  if (few) find_next(plan, pool, item, head, chunk, item.kind == Item::PREFIX ? INT32_MAX : length, next);
  multiply_keys(bench, item.num_rows, dim, keys, few ? values : nullptr, num_tiles);
  for (int r = 0; r < item.num_rows; r++) {
    const int position = rows[r].position;
    const int first = shape.window ? std::max(0, position - shape.window + 1 - begin) : 0;
    soften(shape, bench.score + r * CHUNK, bench.weight + r * CHUNK, tokens, first, std::min(tokens, position + 1 - begin),
           bench.chunk.max + r, bench.chunk.sum + r);
  }
  multiply_values(bench, item.num_rows, dim, values, few ? next : nullptr, tokens);
}

// ---- one item -------------------------------------------------------------------------------------------------------

void save(const State& state, int rows, int dim, float* to, int64_t stride) {
  for (int r = 0; r < rows; r++, to += stride) {
    memcpy(to, state.values + r * dim, sizeof(float) * dim);
    to[dim] = state.sum[r];
    to[dim + 1] = state.max[r];
  }
}
void restore(State& state, int rows, int dim, const float* from, int64_t stride) {
  for (int r = 0; r < rows; r++, from += stride) {
    memcpy(state.values + r * dim, from, sizeof(float) * dim);
    state.sum[r] = from[dim];
    state.max[r] = from[dim + 1];
  }
}

template <class T>
void finish(const Plan& plan, const Item& item, int head, State& state, const float* sinks, T* out) {
  const Shape& shape = plan.shape;
  const int group = shape.num_heads / shape.num_kv_heads, dim = shape.head_dim;
  for (int r = 0; r < item.num_rows; r++) {
    const Row& row = plan.rows[item.first_row + r];
    const int query_head = head * group + row.group;
    float total = state.sum[r], factor = 1;
    if (sinks) {  // one more logit, whose value is 0
      const float top = std::max(state.max[r], sinks[query_head]);
      factor = expf(state.max[r] - top);
      total = total * factor + expf(sinks[query_head] - top);
    }
    T* o = out + ((int64_t)row.token * shape.num_heads + query_head) * dim;
    for (int d = 0; d < dim; d += W) store(o + d, load(state.values + r * dim + d) * (factor / total));
  }
}

template <class T>
void run_item(Plan& plan, const Call& call, const Item& item, int head, Bench<T>& bench) {
  const Shape& shape = plan.shape;
  const int group = shape.num_heads / shape.num_kv_heads, dim = shape.head_dim, rows = item.num_rows;
  // Scratch: [row][kv_head] states, or [row][kv_head][chunk] partials.
  const int64_t size = plan.state_size(), chunks = item.kind == Item::PART || item.kind == Item::MERGE ? item.num_chunks : 1;
  const int64_t stride = size * chunks * shape.num_kv_heads, at = item.scratch + head * size * chunks;
  float* scratch = plan.scratch.data();
  clear(bench.total, rows, dim);
  if (item.kind == Item::MERGE) {
    for (int chunk = item.first_chunk; chunk < item.end_chunk; chunk++) {
      restore(bench.chunk, rows, dim, scratch + (at + chunk * size), stride);
      merge(bench.total, bench.chunk.values, bench.chunk.sum, bench.chunk.max, rows, dim);
    }
    finish(plan, item, head, bench.total, call.sinks, (T*)call.out);
    return;
  }
  for (int r = 0; r < rows; r++) {
    const Row& row = plan.rows[item.first_row + r];
    const T* q = (const T*)call.query + row.token * call.query_token + (head * group + row.group) * call.query_head;
    memcpy(bench.query + r * dim, q, sizeof(T) * dim);
  }
  prepare_tiles(bench, rows, dim);
  if (item.kind == Item::SUFFIX) restore(bench.total, rows, dim, scratch + at, stride);
  for (int chunk = item.first_chunk; chunk < item.end_chunk; chunk++) {
    compute_chunk(plan, (const T*)call.pool, item, head, chunk, bench);
    if (item.kind == Item::PART)
      save(bench.chunk, rows, dim, scratch + (at + chunk * size), stride);
    else
      merge(bench.total, bench.chunk.values, bench.chunk.sum, bench.chunk.max, rows, dim);
  }
  if (item.kind == Item::PREFIX)
    save(bench.total, rows, dim, scratch + at, stride);
  else if (item.kind != Item::PART)
    finish(plan, item, head, bench.total, call.sinks, (T*)call.out);
}

template <class T>
void write_token(const Plan& plan, const Call& call, int token) {
  constexpr int P = PAIR<T>;
  const Shape& shape = plan.shape;
  const int dim = shape.head_dim, size = plan.step.block_size;
  const int64_t slot = plan.step.slots[token];
  if (slot < 0) {  // padding: nothing to write, and nobody computes its output
    memset((T*)call.out + (int64_t)token * shape.num_heads * dim, 0, sizeof(T) * shape.num_heads * dim);
    return;
  }
  const int64_t block = slot / size;
  const int tile = slot % size / TILE, at = slot % TILE;
  for (int head = 0; head < shape.num_kv_heads; head++) {
    T* part = (T*)call.pool + (block * shape.num_kv_heads + head) * 2 * size * dim + tile * TILE * dim;
    const T* k = (const T*)call.key + token * call.key_token + head * call.key_head;
    const T* v = (const T*)call.value + token * call.value_token + head * call.value_head;
    for (int d = 0; d < dim; d += P) memcpy(part + (d * TILE / P + at) * P, k + d, 4);
    T* values = part + size * dim + at / P * dim * P + at % P;
    for (int d = 0; d < dim; d++) values[d * P] = v[d];
  }
}

template <class T>
void attend(Plan& plan, const Call& call) {
#pragma omp for schedule(static)
  for (int token = 0; token < plan.step.num_tokens; token++) write_token<T>(plan, call, token);
  static thread_local Bench<T> bench;
  const int heads = plan.shape.num_kv_heads;
  for (const auto* list : {&plan.first, &plan.second}) {
    if (list->empty()) continue;
    const int count = (int)list->size() * heads;
    // Some heads in a row to one thread, which asks for the next one's keys in time; few enough that all end together.
    const int run = std::max(1, std::min(heads, count / (8 * omp_get_num_threads())));
#pragma omp for schedule(dynamic, run) nowait
    for (int i = 0; i < count; i++) run_item<T>(plan, call, (*list)[i / heads], i % heads, bench);
    leave_tiles(bench);
#pragma omp barrier
  }
}

// ---- planning -------------------------------------------------------------------------------------------------------

// Sequences that decode and begin with the same blocks, in whole chunks; each sequence is in one group at most.
struct Group {
  std::vector<int> members;
  int chunks;
};

int common_chunks(const Step& step, int a, int b, int limit) {
  const int per_chunk = CHUNK / step.block_size;
  const int32_t *x = step.block_tables + (int64_t)a * step.max_blocks, *y = step.block_tables + (int64_t)b * step.max_blocks;
  int chunks = 0;
  while (chunks < limit && !memcmp(x + chunks * per_chunk, y + chunks * per_chunk, sizeof(int32_t) * per_chunk)) chunks++;
  return chunks;
}

std::vector<Group> find_groups(const Step& step) {
  std::vector<int> order;
  for (int s = 0; s < step.num_seqs; s++)
    if (step.query_start[s + 1] - step.query_start[s] == 1 && step.seq_lens[s] > CHUNK) order.push_back(s);
  const auto table = [&](int s) { return step.block_tables + (int64_t)s * step.max_blocks; };
  // By first block: only equal ones can share a chunk. Stable, so that the same step gives the same plan.
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return table(a)[0] < table(b)[0]; });
  std::vector<Group> groups;
  for (size_t i = 0; i < order.size();) {
    Group group{{order[i]}, (step.seq_lens[order[i]] - 1) / CHUNK};
    size_t j = i + 1;
    for (; j < order.size() && table(order[j])[0] == table(order[i])[0]; j++) {
      const int shared = common_chunks(step, order[i], order[j], std::min(group.chunks, (step.seq_lens[order[j]] - 1) / CHUNK));
      if (!shared) break;
      group.chunks = shared;
      group.members.push_back(order[j]);
    }
    if (group.members.size() > 1) groups.push_back(std::move(group));
    i = j;
  }
  return groups;
}

void add_rows(Plan& plan, int s, int group) {
  const Step& step = plan.step;
  const int first = step.query_start[s], count = step.query_start[s + 1] - first;
  for (int t = 0; t < count; t++)
    for (int g = 0; g < group; g++) plan.rows.push_back({first + t, g, step.seq_lens[s] - count + t});
}

void plan_step(Plan& plan, int threads) {
  const Step& step = plan.step;
  const Shape& shape = plan.shape;
  const int group = shape.num_heads / shape.num_kv_heads;
  const int64_t size = plan.state_size();
  int64_t scratch = 0;
  std::vector<int> shared(step.num_seqs, 0);     // chunks that the sequence's group computes
  std::vector<int64_t> state(step.num_seqs, 0);  // where its state is then
  if (!shape.window && CHUNK % step.block_size == 0) {
    for (const Group& g : find_groups(step)) {
      const int first = (int)plan.rows.size();
      for (size_t m = 0; m < g.members.size(); m++) {
        shared[g.members[m]] = g.chunks;
        state[g.members[m]] = scratch + (int64_t)m * group * size * shape.num_kv_heads;
        add_rows(plan, g.members[m], group);
      }
      const int end = (int)plan.rows.size();
      for (int r = first; r < end; r += ROWS)
        plan.first.push_back({Item::PREFIX, r, std::min(ROWS, end - r), g.members[0], 0, g.chunks,
                              scratch + (int64_t)(r - first) * size * shape.num_kv_heads, 0});
      scratch += (int64_t)(end - first) * size * shape.num_kv_heads;
    }
  }
  std::vector<Item> items;
  for (int s = 0; s < step.num_seqs; s++) {
    if (!step.seq_lens[s] || step.query_start[s] == step.query_start[s + 1]) continue;
    const int first = (int)plan.rows.size();
    add_rows(plan, s, group);
    const int end = (int)plan.rows.size();
    for (int r = first; r < end; r += ROWS) {
      const int count = std::min(ROWS, end - r), last = plan.rows[r + count - 1].position;
      const int seen = shape.window ? std::max(0, plan.rows[r].position - shape.window + 1) / CHUNK : 0;
      const int64_t from = shared[s] ? state[s] + (int64_t)(r - first) * size * shape.num_kv_heads : 0;
      items.push_back({shared[s] ? Item::SUFFIX : Item::WHOLE, r, count, s, std::max(seen, shared[s]), last / CHUNK + 1, from, 0});
    }
  }
  const bool few = (int64_t)(items.size() + plan.first.size()) * shape.num_kv_heads < 2 * threads;
  for (const Item& item : items) {
    const int chunks = item.end_chunk - item.first_chunk;
    if (item.kind == Item::WHOLE && few && chunks > 4) {
      const int parts = std::min(threads, chunks / 2), each = (chunks + parts - 1) / parts;
      Item part = item;
      part.kind = Item::PART;
      part.num_chunks = chunks;
      part.scratch = scratch - item.first_chunk * size;  // a window sees only the last chunks
      scratch += (int64_t)item.num_rows * size * shape.num_kv_heads * chunks;
      for (int c = item.first_chunk; c < item.end_chunk; c += each) {
        part.first_chunk = c;
        part.end_chunk = std::min(item.end_chunk, c + each);
        plan.first.push_back(part);
      }
      part.kind = Item::MERGE;
      part.first_chunk = item.first_chunk;
      plan.second.push_back(part);
    } else {
      (item.kind == Item::WHOLE ? plan.first : plan.second).push_back(item);
    }
  }
  // The costliest first: nobody waits long for the last one.
  for (auto* list : {&plan.first, &plan.second})
    std::stable_sort(list->begin(), list->end(), [](const Item& a, const Item& b) {
      return (int64_t)a.num_rows * (a.end_chunk - a.first_chunk) > (int64_t)b.num_rows * (b.end_chunk - b.first_chunk);
    });
  plan.scratch.resize(scratch);
}

}  // namespace

void attend_team(Plan& plan, const Call& call) {
  if (call.is_float)
    attend<float>(plan, call);
  else
    attend<bf16>(plan, call);
}

}  // namespace skv

extern "C" {

// A step for layers of one shape. The step's arrays must live as long as the plan. Null if memory is short.
skv::Plan* skv_plan(const skv::Step* step, const skv::Shape* shape) {
  try {
    auto* plan = new skv::Plan{*step, *shape, {}, {}, {}, {}};
    skv::plan_step(*plan, omp_get_max_threads());
    return plan;
  } catch (const std::exception&) {  // no exception may reach C
    return nullptr;
  }
}

void skv_plan_free(skv::Plan* plan) { delete plan; }

// How many items of each kind the plan has, for tests and traces: whole, prefix, suffix, part, merge.
void skv_plan_kinds(const skv::Plan* plan, int32_t* counts) {
  for (const auto* list : {&plan->first, &plan->second})
    for (const auto& item : *list) counts[item.kind]++;
}

void skv_attend(skv::Plan* plan, const skv::Call* call) {
#pragma omp parallel
  skv::attend_team(*plan, *call);
}
}
