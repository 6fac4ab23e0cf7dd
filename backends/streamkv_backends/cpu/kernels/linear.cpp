// y[m, n] = x[m, k] W^T (+ bias) for any m, n, k: x in bf16, sums in float, the weight in bf16, int8 or int4.
//
// A weight is cut into panels of 64 output channels, zero beyond n; k is rounded up to 32. Inside a panel one vector holds the
// same two inputs of W channels, so that nothing is summed across lanes. All of it is one stream that is read in order:
//
//     bf16    [k / 32] steps of [4][16][16][2]: a matrix tile for 16 channels each; in every second step the last two come first, so
//             that half of a panel lies in all sets of a first-level cache
//     int8    [k / 4][64] words: 4 inputs, value + 128, of 8 bits each, the word rotated left by 7
//     int4    [k / 32] groups of { scale[64], zero[64], [4][64] words: 8 inputs of 4 bits each, rotated left by 7 }
//             weight = (value - zero) * scale; a scale is 5 bits of exponent and 3 of mantissa, 1.mmm * 2^(e - 31)
//
// A quantised weight is never multiplied as such: a chunk of it is turned into bf16 in the first-level cache and then is what any
// other weight is. That loses nothing: |int8| needs 8 significant bits, (value - zero) * scale needs 4 + 4, and bf16 has 8. What
// remains, one scale per output channel, is applied to the sums. The rotation puts every value where a mask and an exponent turn
// it into a float: bits 15..22 below the exponent of 2^8 read as 2^8 + value.
//
// Two cores multiply a chunk: AMX tiles where the build and the machine have them, for every m, else vectors. In both, one result is
// the same sequence of operations whatever m is, whichever thread computes it and wherever its row stands: a row's result depends
// on nothing but that row. (The two cores differ in the last bits: AMX sums even and odd inputs apart, 16 pairs at a time.)
//
// Sources: Intel SDM (TDPBF16PS, VDPBF16PS), Goto and van de Geijn, Anatomy of high-performance matrix multiplication (2008).
#include <omp.h>

#include <algorithm>
#include <cstdlib>

#include "team.h"
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace skv {
namespace {

constexpr int PANEL = 64, V = PANEL / W;
constexpr int STEP = 32;         // inputs of one AMX tile, and of one int4 group
constexpr int TILE = 16;         // rows and columns of one AMX tile
constexpr int ROWS = 256;        // most rows of a block
constexpr int64_t CACHE = 1 << 20;  // bytes of a block's x: half of a second-level cache
// Inputs between two visits to the sums in memory. Half a panel of them, as many of two tiles of rows, and the sums fit into a
// first-level cache; a single pair of tiles has nothing to share there.
constexpr int CHUNK = 256, LONG_CHUNK = 512, SHORT_CHUNK = 128;
constexpr int64_t AHEAD = 1 << 16;  // bytes between what is multiplied and what is fetched
constexpr int AT_ONCE = 2048;    // rows of x packed at a time

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Bytes of a step of a panel: 32 inputs of 64 channels.
inline int64_t step_bytes(int format) { return format == BF16 ? 4096 : format == INT8 ? 2048 : 1152; }

// The stream of weights: what is asked for now will be multiplied AHEAD bytes later. Asked for all through the work on a chunk,
// a few lines at a time: memory never waits for arithmetic, nor a load behind a burst of prefetches.
struct Stream {
  const char *at, *until, *end;
  int lines;  // per call
  void fetch() {
    for (int i = 0; i < lines && at < until; i++, at += 64) prefetch_far(at);
  }
  void next_chunk(const char* chunk, int64_t bytes, int calls) {
    until = std::min(chunk + bytes + AHEAD, end);
    lines = (int)((until - at + 64 * calls - 1) / (64 * calls));
  }
};

// ---- quantised weights to bf16 ------------------------------------------------------------------------------------

inline vf number(vu word, int bit, int bits) {  // the field at `bit`, plus 2^(23 - bit)
  return (vf)((word & (uint32_t)(((1 << bits) - 1) << bit)) | (uint32_t)(150 - bit) << 23);
}
inline vu pair(vf even, vf odd) { return (vu)even >> 16 | (vu)odd; }
inline vu rotated(vu x) { return x << 16 | x >> 16; }

// What a step of a panel holds, as floats: f(p, v, even, odd) is told of inputs 2p and 2p + 1 of the W channels at v; of any one
// channel in the order of p. Every value is one that bf16 has.
template <class F> inline void values_of_int8(const char* words, F f) {
  for (int i = 0; i < STEP / 4; i++, words += 4 * PANEL)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const vu low = *(const vu_any*)(words + 4 * W * v), high = rotated(low);
      f(2 * i, v, number(low, 7, 8) - 65664.f, number(low, 15, 8) - 384.f);
      f(2 * i + 1, v, number(high, 7, 8) - 65664.f, number(high, 15, 8) - 384.f);
    }
}

inline vu widened(const char* p) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  vb bytes;
  memcpy(&bytes, p, W);
  return __builtin_convertvector(bytes, vu);
}

template <class F> inline void values_of_int4(const char* group, F f) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const vf scale = (vf)((widened(group + W * v) << 20) + (96u << 23));
    const vf zero = __builtin_convertvector(widened(group + PANEL + W * v), vf);
    for (int i = 0; i < STEP / 8; i++) {
      const vu word = *(const vu_any*)(group + 128 + 4 * (PANEL * i + W * v));
      for (int half = 0; half < 2; half++) {
        const vu x = half ? rotated(word) : word;
        vf y[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)  // exact with and without a fused multiply-add: at most 17 + 4 bits
          y[j] = number(x, 7 + 4 * j, 4) * scale - (zero + (float)(1 << (16 - 4 * j))) * scale;
        f(4 * i + 2 * half, v, y[0], y[1]);
        f(4 * i + 2 * half + 1, v, y[2], y[3]);
      }
    }
  }
}

template <int FORMAT, class F> inline void values(const char* step, F f) {
  if constexpr (FORMAT == INT8) values_of_int8(step, f);
  else values_of_int4(step, f);
}

// Where a step has pair p of the W channels at v, in vectors.
inline int place(int s, int p, int v) { return (v * W / TILE ^ s % 2 * 2) * (STEP / 2 * TILE / W) + p * (TILE / W) + v % (TILE / W); }

// A chunk of a panel as bf16, where it lies or in `room`. at(s) is step s.
struct Ready {
  const bf16* chunk;
  const bf16* at(int s) const { return chunk + s * STEP * PANEL; }
};
template <int FORMAT> struct Unpacking {  // one step ahead of the one that is asked for, so that one is unpacked while the other is multiplied
  const char* packed;
  bf16* room;
  int steps;
  Unpacking(const char* packed, bf16* room, int steps) : packed(packed), room(room), steps(steps) { unpack(0); }
  void unpack(int s) const {
    vu_any* out = (vu_any*)(room + s * STEP * PANEL);
    values<FORMAT>(packed + s * step_bytes(FORMAT), [&](int p, int v, vf even, vf odd) __attribute__((always_inline)) { out[place(s, p, v)] = pair(even, odd); });
    asm volatile("" ::: "memory");  // GCC's tile intrinsics do not say which memory they read
  }
  const bf16* at(int s) const {
    if (s + 1 < steps) unpack(s + 1);
    return room + s * STEP * PANEL;
  }
};
template <int FORMAT> struct Packed {
  const char* at;
  bf16* room;
  int steps;
  auto unpacked() const {
    if constexpr (FORMAT == BF16) return Ready{(const bf16*)at};
    else return Unpacking<FORMAT>(at, room, steps);
  }
};

// ---- sums to results ----------------------------------------------------------------------------------------------

// Where a panel's results of a block of rows go.
struct To {
  const Weight& w;
  void* y;  // of the block's first row
  int64_t stride;
  int n0, flags;
  bool now;  // this chunk is the last one

  // sums[rows][width], from `row` and channel `column` of the panel on.
  void write(const float* sums, int64_t pitch, int row, int rows, int column, int width) const {
    if (flags & FLOAT_OUT) write_as(sums, pitch, rows, column, width, (float*)y + row * stride);
    else write_as(sums, pitch, rows, column, width, (bf16*)y + row * stride);
  }

  template <class Out> void write_as(const float* sums, int64_t pitch, int rows, int column, int width, Out* rows_of_y) const {
    const int columns = std::min(width, w.n - n0 - column);
    for (int c = 0; c < columns; c += W) {
      const int at_weight = n0 + column + c, lanes = std::min(W, columns - c);
      const vf scale = w.scale ? load(w.scale + at_weight) : vf{}, bias = w.bias ? load(w.bias + at_weight) : vf{};
      for (int r = 0; r < rows; r++) {
        vf value = load(sums + r * pitch + c);
        if (w.scale) value *= scale;
        if (w.bias) value += bias;
        Out* to = rows_of_y + r * stride + at_weight;
        Out part[W] = {};
        if (lanes < W) memcpy(part, to, flags & ADD ? lanes * sizeof(Out) : 0);
        Out* at = lanes < W ? part : to;
        if (flags & ADD) value = load(at) + rounded(at, value);
        store(at, value);
        if (lanes < W) memcpy(to, part, lanes * sizeof(Out));
      }
    }
  }

  // Rows [from, end) will be written from a channel on: half a panel of bf16 is a line.
  void expect(int from, int end, int column) const {
    if (flags & FLOAT_OUT) return;
    for (int r = from; r < end; r++) __builtin_prefetch((bf16*)y + r * stride + n0 + column, 1);
  }
};

// ---- vectors ------------------------------------------------------------------------------------------------------

// Rows and vectors of a register tile.
constexpr int R_MAX = W == 16 ? 6 : W == 8 ? 4 : 2;
template <int R> constexpr int COLUMNS = W == 8 && R > 2 ? 2 : 4;

template <int R>  // sums[R][64] += of `inputs` inputs
inline void vector_tile(const bf16* x, int64_t x_stride, const bf16* w, int inputs, float* sums, bool first, Stream& stream) {
  constexpr int C = COLUMNS<R>;
  for (int v = 0; v < V; v += C) {
    vf acc[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) acc[r][c] = first ? vf{} : load(sums + r * PANEL + (v + c) * W);
    const auto step = [&](int s, int p, auto&& pair_of) __attribute__((always_inline)) {
      vu weight[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) weight[c] = ((const vu_any*)w)[s * (STEP / 2 * V) + place(s, p, v + c)];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const uint32_t input = pair_of(x + r * x_stride + s * STEP + 2 * p);
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[r][c] = dot((const bf16*)0, acc[r][c], weight[c], input);
      }
    };
    const int pairs = inputs / 2;
    for (int s = 0; s * STEP < inputs; s++) {
      const int end = std::min(STEP / 2, pairs - s * (STEP / 2));
      for (int p = 0; p < end; p++) step(s, p, [](const bf16* at) { return *(const u32_any*)at; });
      stream.fetch();
    }
    if (inputs % 2) step(pairs / (STEP / 2), pairs % (STEP / 2), [](const bf16* at) { return (uint32_t)at->bits; });
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) store(sums + r * PANEL + (v + c) * W, acc[r][c]);
  }
}

struct Vectors {
  const bf16* x;
  int64_t stride;
  static int fetches(int rows) { return (rows + R_MAX - 1) / R_MAX * (W == 16 ? 1 : V / 4); }
  template <int FORMAT>
  void multiply(int row, int rows, int k0, int inputs, Packed<FORMAT> packed, float* sums, Stream& stream, const To& to) const {
    const auto chunk = packed.unpacked();
    for (int s = 1; s < (inputs + STEP - 1) / STEP; s++) chunk.at(s - 1);
    const bf16* w = chunk.at((inputs - 1) / STEP) - (inputs - 1) / STEP * STEP * PANEL;
    for (int r = 0; r < rows; r += R_MAX) {
      const bf16* at = x + (row + r) * stride + k0;
      float* c = sums + r * PANEL;
      switch (std::min(R_MAX, rows - r)) {
        case 1: vector_tile<1>(at, stride, w, inputs, c, !k0, stream); break;
        case 2: vector_tile<2>(at, stride, w, inputs, c, !k0, stream); break;
#if defined(__AVX2__)
        case 3: vector_tile<3>(at, stride, w, inputs, c, !k0, stream); break;
        case 4: vector_tile<4>(at, stride, w, inputs, c, !k0, stream); break;
#endif
#if defined(__AVX512F__)
        case 5: vector_tile<5>(at, stride, w, inputs, c, !k0, stream); break;
        case 6: vector_tile<6>(at, stride, w, inputs, c, !k0, stream); break;
#endif
      }
    }
    if (to.now) to.write(sums, PANEL, 0, rows, 0, PANEL);
  }
};

// ---- AMX ----------------------------------------------------------------------------------------------------------
#ifdef __AMX_BF16__

bool amx_allowed() {  // Linux lends the tiles on request, once per process
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}

void amx_begin() {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" : : "r"(&config) : "memory");  // GCC's tile intrinsics do not say which memory they read
  _tile_loadconfig(&config);
}

// Rows in tiles: [rows / 16][k / 32][16][32]. Whatever stands in the rows beyond the last one is multiplied and never stored.
struct Tiles {
  const bf16* x;
  int steps;  // of a row
  static constexpr int FEW_PAIRS = 4;
  static int fetches(int rows) { return rows <= TILE ? 4 : 2 * ((rows + TILE - 1) / (2 * TILE)); }  // a step
  static int64_t size(int rows, int k) { return round_up(rows, TILE) * round_up(k, STEP); }

  static void pack(const bf16* x, int64_t stride, int k, int row, bf16* out) {
    const int steps = (k + STEP - 1) / STEP;
    out += ((int64_t)(row / TILE) * steps * TILE + row % TILE) * STEP;
    x += row * stride;
    for (int s = 0; s < k / STEP; s++) memcpy(out + s * TILE * STEP, x + s * STEP, 2 * STEP);
    if (k % STEP) {
      bf16 last[STEP] = {};
      memcpy(last, x + k / STEP * STEP, 2 * (k % STEP));
      memcpy(out + k / STEP * TILE * STEP, last, 2 * STEP);
    }
  }

  // Sums lie tile by tile: [half of the panel][rows / 16][2][16][16].
  static float* sums_of(float* sums, int half, int row) { return sums + (half * ROWS + row) * (PANEL / 2); }

  template <int FORMAT>
  void multiply(int row, int rows, int k0, int inputs, Packed<FORMAT> packed, float* sums, Stream& stream, const To& to) const {
    const auto chunk = packed.unpacked();
    asm volatile("" ::: "memory");
    const int n = (inputs + STEP - 1) / STEP, pairs = rows > TILE ? (rows + TILE - 1) / (2 * TILE) : 0, last = pairs * 2 * TILE;
    const bf16* a = x + ((int64_t)(row / TILE) * steps + k0 / STEP) * TILE * STEP;
    const int64_t next = (int64_t)steps * TILE * STEP;
    if (!pairs) return one_by_four(a, chunk, n, sums, 0, rows, !k0, stream, to);
    two_by_two(a, next, chunk, 0, n, sums, 0, rows, !k0, stream, to);
    const Ready ready = {chunk.at(n - 1) - (n - 1) * STEP * PANEL};
    const auto other = [&](int p, int half) {
      two_by_two(a + 2 * p * next, next, ready, half, n, sums, p * 2 * TILE, rows, !k0, stream, to);
    };
    if (pairs <= FEW_PAIRS) {  // memory's lines and those of the second-level cache wait for each other: rows are loaded once for both halves
      other(0, 1);
      for (int p = 1; p < pairs; p++)
        for (int half = 0; half < 2; half++) other(p, half);
    } else {
      for (int half = 0; half < 2; half++)
        for (int p = !half; p < pairs; p++) other(p, half);
    }
    if (last < rows) one_by_four(a + 2 * pairs * next, ready, n, sums, last, rows, !k0, stream, to);
  }

  template <class Chunk>
  static void two_by_two(const bf16* a, int64_t next, const Chunk& chunk, int half, int n, float* sums, int row, int rows, bool first,
                         Stream& stream, const To& to) {
    constexpr int SIZE = TILE * TILE;
    float* c = sums_of(sums, half, row);
    if (first) {
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
      _tile_loadd(0, c, 64); _tile_loadd(1, c + SIZE, 64); _tile_loadd(2, c + 2 * SIZE, 64); _tile_loadd(3, c + 3 * SIZE, 64);
    }
    const int lines = to.now ? (2 * TILE + n - 1) / n : 0;
    for (int s = 0; s < n; s++, a += TILE * STEP) {
      const bf16* w = chunk.at(s) + (half ^ s % 2) * (PANEL / 2 * STEP);
      _tile_loadd(6, w, 64);
      _tile_loadd(4, a, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, w + TILE * STEP, 64);
      stream.fetch();
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + next, 64);
      to.expect(row + s * lines, std::min(row + (s + 1) * lines, rows), half * (PANEL / 2));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64); _tile_stored(1, c + SIZE, 64); _tile_stored(2, c + 2 * SIZE, 64); _tile_stored(3, c + 3 * SIZE, 64);
    if (to.now) {
      asm volatile("" ::: "memory");
      for (int i = 0; i < 4; i++)
        to.write(c + i * SIZE, TILE, row + i / 2 * TILE, std::min(rows - row - i / 2 * TILE, TILE), half * (PANEL / 2) + i % 2 * TILE,
                 TILE);
    }
  }

  template <class Chunk>
  static void one_by_four(const bf16* a, const Chunk& chunk, int n, float* sums, int row, int rows, bool first, Stream& stream,
                          const To& to) {
    constexpr int SIZE = TILE * TILE;
    float *c = sums_of(sums, 0, row), *d = sums_of(sums, 1, row);
    if (first) {
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
      _tile_loadd(0, c, 64); _tile_loadd(1, c + SIZE, 64); _tile_loadd(2, d, 64); _tile_loadd(3, d + SIZE, 64);
    }
    for (int s = 0; s < n; s++, a += TILE * STEP) {
      const bf16 *left = chunk.at(s) + s % 2 * (PANEL / 2 * STEP), *right = chunk.at(s) + !(s % 2) * (PANEL / 2 * STEP);
      _tile_loadd(4, a, 64);
      _tile_loadd(5, left, 64);
      stream.fetch();
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, left + TILE * STEP, 64);
      stream.fetch();
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, right, 64);
      stream.fetch();
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, right + TILE * STEP, 64);
      _tile_dpbf16ps(3, 4, 5);
      stream.fetch();
    }
    _tile_stored(0, c, 64); _tile_stored(1, c + SIZE, 64); _tile_stored(2, d, 64); _tile_stored(3, d + SIZE, 64);
    if (to.now) {
      asm volatile("" ::: "memory");
      for (int i = 0; i < 4; i++) to.write((i < 2 ? c : d) + i % 2 * SIZE, TILE, row, rows - row, i * TILE, TILE);
    }
  }
};

// So few rows that tiles are nearly empty: vectors multiply, and nothing is unpacked to memory. The same sums as those of the
// tiles, bit for bit: of each step even and odd inputs apart, in order, then their sum.
struct Few {
  static constexpr int MOST = 2;
  const float* x;  // [rows][stride], zero beyond k
  int64_t stride;
  static int fetches(int) { return 8; }

  template <int FORMAT>
  void multiply(int row, int rows, int k0, int inputs, Packed<FORMAT> packed, float* sums, Stream& stream, const To& to) const {
    const int n = (inputs + STEP - 1) / STEP;
    if constexpr (FORMAT != BF16) {
      if (rows == 1) steps<FORMAT, 1>(x + row * stride + k0, packed.at, n, sums, !k0, stream);
      else steps<FORMAT, 2>(x + row * stride + k0, packed.at, n, sums, !k0, stream);
      if (to.now) to.write(sums, PANEL, 0, rows, 0, PANEL);
    }
  }

  template <int FORMAT, int R> void steps(const float* at, const char* packed, int n, float* sums, bool first, Stream& stream) const {
    vf c[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) c[r][v] = first ? vf{} : load(sums + r * PANEL + v * W);
    for (int s = 0; s < n; s++, at += STEP, packed += step_bytes(FORMAT)) {
      vf even[R][V] = {}, odd[R][V] = {};
      values<FORMAT>(packed, [&](int p, int v, vf w0, vf w1) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
          even[r][v] += w0 * at[r * stride + 2 * p];
          odd[r][v] += w1 * at[r * stride + 2 * p + 1];
        }
        if (FORMAT == INT8 ? p % 2 == 0 && v == 0 : p % 4 == 0 && v % 2 == 0) stream.fetch();  // 8 times a step
      });
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) c[r][v] += even[r][v] + odd[r][v];
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store(sums + r * PANEL + v * W, c[r][v]);
  }
};
#endif

// ---- who computes what --------------------------------------------------------------------------------------------

// Blocks of rows that stay in a second-level cache, times panels. With a block for each thread, it has rows of its own, which it
// mostly wrote itself; else some panels for all rows, which reads each weight once; where panels are few, some of all pairs.
template <class Rows>
void share(const Weight& w, const Rows& x, void* y, int64_t y_stride, int m, int flags) {
  const int64_t step = step_bytes(w.format), steps = round_up(w.k, STEP) / STEP;
  const int panels = (w.n + PANEL - 1) / PANEL, threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const int most = (int)std::clamp<int64_t>(CACHE / (2 * STEP * steps) / 32 * 32, 32, ROWS);
  const int blocks = (m + most - 1) / most, block = (int)round_up((m + blocks - 1) / blocks, 32);
  const bool by_panels = blocks < threads && panels >= 4 * threads;
  const int width = by_panels ? panels * (thread + 1) / threads - panels * thread / threads : panels;
  const int offset = by_panels ? panels * thread / threads : 0;
  const int64_t tasks = (int64_t)blocks * width;
  const int64_t begin = by_panels ? 0 : tasks * thread / threads, end = by_panels ? tasks : tasks * (thread + 1) / threads;

  alignas(64) float sums[ROWS * PANEL];
  alignas(64) bf16 room[CHUNK * PANEL];
  const char* data = (const char*)w.data;
  for (int64_t t = begin; t < end; t++) {
    const int row = (int)(t / width) * block, rows = std::min(block, m - row), nth = (int)(t % width), panel = offset + nth;
    if (rows <= 0) continue;
    const int most_steps = (rows > 2 * TILE ? CHUNK : w.format == BF16 ? LONG_CHUNK : SHORT_CHUNK) / STEP;
    const char* at = data + panel * steps * step;
    Stream stream = {at, at, data + (panel + std::min<int64_t>(width - nth, end - t)) * steps * step, 0};
    if (t > begin && nth) stream.at = std::min(at + AHEAD, stream.end);
    for (int64_t s = 0; s < steps; s += most_steps) {
      const int n = (int)std::min<int64_t>(most_steps, steps - s), k0 = (int)s * STEP;
      const int inputs = std::min(n * STEP, w.k - k0);
      const To to = {w, (char*)y + row * y_stride * (flags & FLOAT_OUT ? 4 : 2), y_stride, panel * PANEL, flags, s + n == steps};
      stream.next_chunk(at, n * step, n * Rows::fetches(rows));
      if (w.format == BF16) x.multiply(row, rows, k0, inputs, Packed<BF16>{at, room, n}, sums, stream, to);
      else if (w.format == INT8) x.multiply(row, rows, k0, inputs, Packed<INT8>{at, room, n}, sums, stream, to);
      else x.multiply(row, rows, k0, inputs, Packed<INT4>{at, room, n}, sums, stream, to);
      at += n * step;
    }
  }
}

}  // namespace

size_t linear_scratch(const Weight& w, int m, int threads) {
#ifdef __AMX_BF16__
  return 2 * Tiles::size(std::min(m, AT_ONCE), w.k) * (m <= TILE ? threads : 1);
#else
  return 0;
#endif
}

void linear_team(const Weight& w, const bf16* x, int64_t x_stride, void* y, int64_t y_stride, int m, int flags, void* scratch) {
#ifdef __AMX_BF16__
  if (amx_allowed()) {
    if (m <= Few::MOST && w.format != BF16) {
      const int64_t stride = round_up(w.k, STEP);
      float* wide = (float*)((char*)scratch + omp_get_thread_num() * 2 * Tiles::size(m, w.k));
      for (int r = 0; r < m; r++)
        for (int64_t i = 0; i < stride; i++) wide[r * stride + i] = i < w.k ? to_float(x[r * x_stride + i]) : 0;
      share(w, Few{wide, stride}, y, y_stride, m, flags);
#pragma omp barrier
      return;
    }
    const int64_t y_bytes = y_stride * (flags & FLOAT_OUT ? 4 : 2);
    amx_begin();
    for (int m0 = 0; m0 < m; m0 += AT_ONCE) {
      const int rows = std::min(AT_ONCE, m - m0);
      bf16* packed = (bf16*)scratch;
      if (rows <= TILE) {  // cheaper done by each thread for itself than waited for
        packed += omp_get_thread_num() * Tiles::size(rows, w.k);
        for (int r = 0; r < rows; r++) Tiles::pack(x + m0 * x_stride, x_stride, w.k, r, packed);
      } else {
#pragma omp for
        for (int r = 0; r < rows; r++) Tiles::pack(x + m0 * x_stride, x_stride, w.k, r, packed);
      }
      share(w, Tiles{packed, (w.k + STEP - 1) / STEP}, (char*)y + m0 * y_bytes, y_stride, rows, flags);
#pragma omp barrier
    }
    _tile_release();
    return;
  }
#endif
  share(w, Vectors{x, x_stride}, y, y_stride, m, flags);
#pragma omp barrier
}

}  // namespace skv

extern "C" void skv_linear(const skv::Weight* w, const skv::bf16* x, int64_t x_stride, void* y, int64_t y_stride, int32_t m, int32_t flags) {
  struct Room {
    void* at = nullptr;
    size_t size = 0;
    ~Room() { free(at); }
  };
  static thread_local Room room;
  const size_t need = skv::linear_scratch(*w, m, omp_get_max_threads());
  if (need > room.size) {
    free(room.at);
    room.size = (need + 4095) / 4096 * 4096;
    room.at = aligned_alloc(64, room.size);
  }
  void* scratch = room.at;
#pragma omp parallel
  skv::linear_team(*w, x, x_stride, y, y_stride, m, flags, scratch);
}
