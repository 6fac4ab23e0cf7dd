// What runs inside a parallel region: every thread of the team calls it, it ends with a barrier.
#pragma once
#include <cstddef>

#include "simd.h"

namespace skv {

// A packed weight [n, k]; linear.cpp says how it lies, `linear.py` lays it. The mirror in Python is `linear.py`.
struct Weight {
  const void* data;
  const float* scale;  // [n rounded up to 64], or null: of each output channel
  const float* bias;   // likewise
  int32_t n, k;
  int32_t format;
};
enum Format : int32_t { BF16 = 0, INT8 = 1, INT4 = 2 };
enum LinearFlags : int32_t { FLOAT_OUT = 1, ADD = 2 };  // y is float, else bf16; y += instead of y =

// y[m, n] = x[m, k] W^T (+ bias). Strides in elements; a row's numbers lie side by side. `scratch` is shared by the team, holds
// linear_scratch bytes and may be read by nobody else until the next barrier.
size_t linear_scratch(const Weight& w, int m, int threads);
void linear_team(const Weight& w, const bf16* x, int64_t x_stride, void* y, int64_t y_stride, int m, int flags, void* scratch);

}  // namespace skv
