// A recorded step: its native calls one after the other in a single parallel region. See `tape.py`.
#include "attention.h"
#include "rows.h"
#include "team.h"

#include <omp.h>

#include <algorithm>

namespace skv {

struct Attend {
  const Call* call;
  int32_t shape;  // index into the step's plans
};

struct Linear {
  const Weight* weight;
  const bf16* x;
  int64_t x_stride;
  void* y;
  int64_t y_stride;
  int32_t m, flags;
  void* scratch;
};

struct Op {
  enum Kind : int32_t { ATTEND = 0, LINEAR = 1, NORM = 2, GATE = 3, ADD = 4, ROTATE = 5 } kind;
  const void* call;
};

}  // namespace skv

extern "C" {

// Threads of a team that begins now.
int32_t skv_threads() { return omp_get_max_threads(); }

// Bytes that LINEAR needs in `scratch`, for as many threads as there are now.
int64_t skv_linear_scratch(const skv::Weight* weight, int32_t m) {
  return (int64_t)skv::linear_scratch(*weight, m, omp_get_max_threads());
}

void skv_linear_call(const skv::Linear* l) {
#pragma omp parallel
  skv::linear_team(*l->weight, l->x, l->x_stride, l->y, l->y_stride, l->m, l->flags, l->scratch);
}

// plans: one for each shape of attention layers. Every operation ends with a barrier, so the next one sees what it wrote.
// threads: at most so many; scratch was measured for them when the operations were recorded.
// seconds: null, or where the time of each kind of operation is added up.
void skv_run(const skv::Op* ops, int32_t count, skv::Plan* const* plans, int32_t threads, double* seconds) {
  using namespace skv;
#pragma omp parallel num_threads(std::min(threads, skv_threads()))
  for (int i = 0; i < count; i++) {
    const void* call = ops[i].call;
    const double began = seconds ? omp_get_wtime() : 0;
    switch (ops[i].kind) {
      case Op::ATTEND: {
        const auto& a = *(const Attend*)call;
        attend_team(*plans[a.shape], *a.call);
        break;
      }
      case Op::LINEAR: {
        const auto& l = *(const Linear*)call;
        linear_team(*l.weight, l.x, l.x_stride, l.y, l.y_stride, l.m, l.flags, l.scratch);
        break;
      }
      case Op::NORM: norm_team(*(const Norm*)call); break;
      case Op::GATE: gate_team(*(const Gate*)call); break;
      case Op::ADD: add_team(*(const Add*)call); break;
      case Op::ROTATE: rotate_team(*(const Rotate*)call); break;
    }
    if (seconds && omp_get_thread_num() == 0) seconds[ops[i].kind] += omp_get_wtime() - began;
  }
}
}
