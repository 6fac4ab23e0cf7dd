// Matrix tiles of Intel's AMX: 16 rows of 64 bytes each; one instruction multiplies 16 rows by 16 columns over 32 bf16.
// Tiles: 0..3 sums, 4 and 5 left factors (rows), 6 and 7 right ones (columns).
#pragma once
#include "simd.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

namespace skv {

constexpr int TILE_ROWS = 16, TILE_DEPTH = 32;

// Linux lends the tiles on request, once per process; false = it does not.
inline bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
}

// GCC's tile intrinsics do not say which memory they read: what was written before must be there by now.
inline void written() { asm volatile("" ::: "memory"); }

// Left factors and sums have `rows` rows, 1 to 16; fewer rows cost less time.
inline void tiles_begin(int rows) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } config;
  for (int t = 0; t < 8; t++) config.rows[t] = t < 6 ? rows : TILE_ROWS;
  written();
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}
inline void tiles_end() { _tile_release(); }

// sums[rows][2 * 16] = left[rows][depth] times right, whose pairs of rows lie as [depth / 2][columns][2]: `b0` and `b1` are its
// two blocks of 16 columns. Two groups of 16 rows if `two`. Pitches in bytes; `fetch(step)` may ask for what is read next.
template <class F>
inline void tiles_multiply(const bf16* a, int64_t a_pitch, bool two, const bf16* b0, const bf16* b1, int64_t b_pitch, int depth,
                           float* sums, int64_t sum_pitch, F fetch) {
  const int64_t group = TILE_ROWS * a_pitch;
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int d = 0; d < depth; d += TILE_DEPTH) {
    const auto* left = (const char*)a + d * 2;
    _tile_loadd(4, left, a_pitch);
    _tile_loadd(6, (const char*)b0 + d / 2 * b_pitch, b_pitch);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, (const char*)b1 + d / 2 * b_pitch, b_pitch);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, left + group, a_pitch);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    fetch(d / TILE_DEPTH);
  }
  _tile_stored(0, sums, sum_pitch);
  _tile_stored(1, sums + 16, sum_pitch);
  if (two) {
    auto* below = (float*)((char*)sums + TILE_ROWS * sum_pitch);
    _tile_stored(2, below, sum_pitch);
    _tile_stored(3, below + 16, sum_pitch);
  }
}

}  // namespace skv
#endif
