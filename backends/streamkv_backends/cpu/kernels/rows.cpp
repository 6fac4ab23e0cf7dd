// See rows.h. Widths are multiples of 16; rows are shared out between the threads, long ones in pieces.
#include "rows.h"

#include <algorithm>

namespace skv {
namespace {

constexpr int PIECE = 512;  // numbers of a row that a thread does at once
// Below this many numbers a second thread costs more than it helps.
constexpr int64_t WORTH = 8192;

void norm_row(const Norm& call, const bf16* x, bf16* out) {
  vf squares[2] = {};
  int i = 0;
  for (; i + 2 * W <= call.width; i += 2 * W)
    for (int j = 0; j < 2; j++) {
      const vf v = load(x + i + j * W);
      squares[j] += v * v;
    }
  for (; i < call.width; i += W) {
    const vf v = load(x + i);
    squares[0] += v * v;
  }
  const float scale = 1.f / sqrtf(sum(squares[0] + squares[1]) / call.width + call.eps);
  for (i = 0; i < call.width; i += W) {
    vf v = load(x + i) * scale;
    if (call.round_first) v = rounded(x, v);
    store(out + i, v * (load(call.weight + i) + call.offset));
  }
}

vf activate(Gate::Kind kind, vf x) {
  if (kind == Gate::SILU) return x * vsigmoid(x);
  return .5f * x * (1.f + vtanh(.7978845608f * (x + .044715f * x * x * x)));
}

void rotate_row(const bf16* x, const bf16* cos, const bf16* sin, int dim, bf16* out) {
  const int half = dim / 2;
  for (int i = 0; i < half; i += W) {
    const vf a = load(x + i), b = load(x + half + i);
    store(out + i, rounded(x, a * load(cos + i)) - rounded(x, b * load(sin + i)));
    store(out + half + i, rounded(x, b * load(cos + half + i)) + rounded(x, a * load(sin + half + i)));
  }
}

}  // namespace

void norm_team(const Norm& call) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < (int64_t)call.outer * call.inner; row++)
    norm_row(call, call.x + row / call.inner * call.outer_stride + row % call.inner * call.inner_stride,
             call.out + row * call.width);
}

void gate_team(const Gate& call) {
  const int pieces = (call.width + PIECE - 1) / PIECE;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < (int64_t)call.rows * pieces; n++) {
    const int64_t row = n / pieces;
    const int first = n % pieces * PIECE, last = std::min(call.width, first + PIECE);
    const bf16 *gate = call.x + row * 2 * call.width, *up = gate + call.width;
    for (int i = first; i < last; i += W)
      store(call.out + row * call.width + i, rounded(gate, activate(call.kind, load(gate + i))) * load(up + i));
  }
}

void add_team(const Add& call) {
#pragma omp for schedule(static)
  for (int64_t n = 0; n < call.count; n += PIECE)
    for (int64_t i = n; i < std::min(call.count, n + PIECE); i += W) store(call.out + i, load(call.a + i) + load(call.b + i));
}

void rotate_team(const Rotate& call) {
#pragma omp for schedule(static)
  for (int t = 0; t < call.tokens; t++) {
    const bf16 *cos = call.cos + (int64_t)t * call.dim, *sin = call.sin + (int64_t)t * call.dim;
    for (int h = 0; h < call.query_heads; h++)
      rotate_row(call.query + t * call.query_token + h * call.query_head, cos, sin, call.dim,
                 call.query_out + ((int64_t)t * call.query_heads + h) * call.dim);
    for (int h = 0; h < call.key_heads; h++)
      rotate_row(call.key + t * call.key_token + h * call.key_head, cos, sin, call.dim,
                 call.key_out + ((int64_t)t * call.key_heads + h) * call.dim);
  }
}

void argmax_team(const Argmax& call) {
#pragma omp for schedule(static)
  for (int row = 0; row < call.rows; row++) {
    const bf16* x = call.x + row * call.stride;
    vf top = splat(-INFINITY), zero = {};
    int i = 0;
    for (; i + W <= call.width; i += W) {
      const vf v = load(x + i);
      top = vmax(v, top);
      zero += v * 0.f;  // NaN, once something is not finite
    }
    float best = largest(top), rest = sum(zero);
    for (; i < call.width; i++) {
      best = std::max(best, to_float(x[i]));
      rest += to_float(x[i]) * 0.f;
    }
    int at = 0;
    while (at < call.width - 1 && to_float(x[at]) != best) at++;
    call.index[row] = at;
    call.finite[row] = rest == 0.f;
  }
}

}  // namespace skv

extern "C" {
void skv_norm(const skv::Norm* call) {
#pragma omp parallel if ((int64_t)call->outer * call->inner * call->width > skv::WORTH)
  skv::norm_team(*call);
}
void skv_gate(const skv::Gate* call) {
#pragma omp parallel if ((int64_t)call->rows * call->width > skv::WORTH)
  skv::gate_team(*call);
}
void skv_add(const skv::Add* call) {
#pragma omp parallel if (call->count > skv::WORTH)
  skv::add_team(*call);
}
void skv_rotate(const skv::Rotate* call) {
#pragma omp parallel if ((int64_t)call->tokens * (call->query_heads + call->key_heads) * call->dim > skv::WORTH)
  skv::rotate_team(*call);
}
void skv_argmax(const skv::Argmax* call) {
#pragma omp parallel if ((int64_t)call->rows * call->width > skv::WORTH && call->rows > 1)
  skv::argmax_team(*call);
}
}
