// The device layer on a processor: the names of device.cuh, so that g++ compiles a .cu as it is and the result runs without a GPU.
//
// One block at a time; each CUDA thread is a fiber. A barrier or collective parks the fiber; the last one to arrive does the work
// for all, reading and writing the operands that lie on the stacks of the others. Shared memory starts as NaN in every block, and
// a cp.async copies as late as it may (at its wait) or as early, as the launch asks: whoever relies on one of them is found out.
//
// Compiled with -fsanitize=thread but linked without its library, every load and store of the kernel calls a hook below:
// the checked build. It knows races in shared memory, bytes that a cp.async has in flight, what is outside the launch's tensors.
//
// A failure never ends the process: `fail` writes down what and where, leaves all fibers as they stand and returns to the host.
// Kernels therefore hold nothing that needs a destructor.
#pragma once
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>
#include <pthread.h>
#include <ucontext.h>

#ifdef __SANITIZE_THREAD__
#define EMU_CHECKED 1
#else
#define EMU_CHECKED 0
#endif
#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_OWN_SWITCH 1
#else
#define EMU_OWN_SWITCH 0
#endif

// The emulator's own functions: not watched by the hooks, and never inlined, so that a return address lies in the kernel.
#define EMU_FN [[maybe_unused]] __attribute__((no_sanitize_thread, noinline)) static
#define EMU_CALLER __builtin_return_address(0)
#define SKV_DEV [[maybe_unused]] static inline
#define SKV_KERNEL(name) [[maybe_unused]] static void name
#define SKV_BOUNDED_KERNEL(name, threads, blocks) SKV_KERNEL(name)
#define SKV_SHARED(name) unsigned char* const name = emu::shared_memory()
#define NEG_INF (-INFINITY)

struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace emu {
namespace {
// ---------------------------------------------------------------- what Python gives and gets (emulated.py has the same structs)

struct Extent { uintptr_t begin, end; };
struct Counters {
  u64 mma, ldmatrix, ldmatrix_wavefronts, copies, copy_wavefronts, copy_sectors, shuffles, exponentials, block_barriers, warp_barriers, switches;
};
struct Failure { unsigned block[3]; int thread, other; u64 where, other_where; char what[240]; };
struct Launch {
  unsigned grid[3], block[3], shared_bytes;
  int order, early_copies;   // order: OLDEST, NEWEST, RANDOM
  u64 seed;
  double time_limit_s;
  u64 num_extents;
  const Extent* extents;     // memory that the kernel may use; looked at in the checked build only
  Counters* counters;
  Failure* failure;
};

// ---------------------------------------------------------------- state of a launch

enum Order { OLDEST, NEWEST, RANDOM };   // which of the threads that can go on does
enum State { READY, IN_WARP, IN_BLOCK, DONE };
constexpr size_t STACK = 64 << 10;
constexpr unsigned MOST_SHARED = 227 << 10;   // of the largest device
constexpr u64 STACK_MARK = 0x5ac7e00f5ac7e00full;

struct Copy { unsigned char* shared; const void* global; bool filled; };

struct Lane {
  State state = READY;
  dim3 index;
  const char* op = "";          // the collective or barrier it is in, or was in last
  const void* where = nullptr;  // the return address of that
  void* operands = nullptr;
  std::vector<Copy> copies;     // in flight, oldest first
  std::vector<size_t> groups;   // how many of them each committed group has
  void* stack_pointer = nullptr;
  ucontext_t context;
};

struct Warp { int arrived = 0; const char* op = ""; int epoch = 0; };

// Who touched two bytes of shared memory last. A thread of -1 is nobody; MANY are readers of several warps.
struct Touch { int thread, warp_epoch, block_epoch; };
constexpr int NOBODY = -1, MANY = -2;
struct Shadow { Touch write{NOBODY, 0, 0}, read{NOBODY, 0, 0}; int copying = NOBODY; };

struct Machine {
  const Launch& launch;
  int num_threads, num_warps;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<int> ready;       // a ring of threads that can go on
  size_t head = 0, num_ready = 0;
  int current = 0, alive = 0, in_barrier = 0, block_epoch = 0;
  dim3 block_index;
  unsigned char *shared, *stacks;
  std::vector<Shadow> shadow;
  Counters counters{};
  Lane host;
  sigjmp_buf failed;
  pthread_t owner = pthread_self();
  bool inside = true;           // in the emulator, whose own loads and stores are not looked at
  u64 random, ticks = 0;
  timespec begun{};
  void (*entry)(void*) = nullptr;
  void* entry_argument = nullptr;

  explicit Machine(const Launch& l);
  ~Machine();
};
static Machine* M = nullptr;
static std::mutex one_launch_at_a_time;

[[noreturn]] EMU_FN void fail_at(const void* where, int other, const char* format, ...) {
  Failure& failure = *M->launch.failure;
  const uintptr_t base = reinterpret_cast<uintptr_t>(&fail_at);   // Python knows where this function lies in the file
  failure.block[0] = M->block_index.x, failure.block[1] = M->block_index.y, failure.block[2] = M->block_index.z;
  failure.thread = M->current, failure.other = other;
  failure.where = (uintptr_t)where - base;
  failure.other_where = other < 0 ? 0 : (uintptr_t)M->lanes[other].where - base;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(failure.what, sizeof failure.what, format, arguments);
  va_end(arguments);
  siglongjmp(M->failed, 1);
}

EMU_FN void check_time(const void* where) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  const double seconds = double(now.tv_sec - M->begun.tv_sec) + 1e-9 * double(now.tv_nsec - M->begun.tv_nsec);
  if (M->launch.time_limit_s > 0 && seconds > M->launch.time_limit_s) fail_at(where, -1, "it runs longer than %g s", M->launch.time_limit_s);
}

// ---------------------------------------------------------------- fibers

#if EMU_OWN_SWITCH
// The registers that a called function must keep, and the stack pointer: the whole state of a fiber that has called this.
__attribute__((naked, noinline, no_sanitize_thread)) static void swap_stacks(void**, void*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

EMU_FN void switch_to(Lane& from, Lane& to) {
  M->counters.switches++;
#if EMU_OWN_SWITCH
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

EMU_FN void make_ready(int thread) {
  M->lanes[thread].state = READY;
  M->ready[(M->head + M->num_ready++) % M->ready.size()] = thread;
}

EMU_FN int take_ready() {
  auto at = [](size_t i) -> int& { return M->ready[(M->head + i) % M->ready.size()]; };
  if (M->launch.order == RANDOM) {
    M->random = M->random * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(at(0), at((M->random >> 33) % M->num_ready));
  }
  const int thread = M->launch.order == NEWEST ? at(M->num_ready - 1) : at(0);
  if (M->launch.order != NEWEST) M->head = (M->head + 1) % M->ready.size();
  M->num_ready--;
  return thread;
}

// Leave the current thread, which waits, has ended or is in the ring itself, for another.
EMU_FN void run_another() {
  Lane& from = M->lanes[M->current];
  if (!(++M->ticks & 0xffff)) check_time(from.where);
  if (!M->num_ready) {
    if (!M->alive) { switch_to(from, M->host); return; }
    const int waits = int(std::find_if(M->lanes.begin(), M->lanes.end(), [](Lane& l) { return l.state == IN_WARP || l.state == IN_BLOCK; }) - M->lanes.begin());
    int other = NOBODY;   // one that waits for something else: the other side of the divergence
    for (int i = 0; i < M->num_threads; i++)
      if (M->lanes[i].state != DONE && M->lanes[i].where != M->lanes[waits].where) other = i;
    M->current = waits;
    if (other >= 0) fail_at(M->lanes[waits].where, other, "divergence: thread %d waits in %s, thread %d in %s", waits, M->lanes[waits].op, other, M->lanes[other].op);
    fail_at(M->lanes[waits].where, -1, "divergence: thread %d waits in %s, %d threads have ended", waits, M->lanes[waits].op, M->num_threads - M->alive);
  }
  const int next = take_ready();
  if (next == M->current) return;
  M->current = next;
  switch_to(from, M->lanes[next]);
}

EMU_FN void run_thread() {
  M->inside = false;
  M->entry(M->entry_argument);
  M->inside = true;
  Lane& lane = M->lanes[M->current];
  lane.state = DONE;
  M->alive--;
  run_another();
  abort();   // nobody goes on with a thread that has ended
}

EMU_FN void prepare_fiber(int thread) {
  Lane& lane = M->lanes[thread];
  unsigned char* stack = M->stacks + STACK * thread;
  memcpy(stack, &STACK_MARK, sizeof STACK_MARK);
#if EMU_OWN_SWITCH
  void** top = reinterpret_cast<void**>(stack + STACK - 64);
  *--top = nullptr;   // where run_thread would return to; also makes its stack aligned as after a call
  *--top = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  lane.stack_pointer = top;
#else
  getcontext(&lane.context);
  lane.context.uc_stack.ss_sp = stack, lane.context.uc_stack.ss_size = STACK, lane.context.uc_link = nullptr;
  makecontext(&lane.context, run_thread, 0);
#endif
}

// What every function of the device layer that can wait or fail stands in.
struct Inside {
  __attribute__((no_sanitize_thread, noinline)) Inside(const char* op, const void* where) {
    M->inside = true;
    Lane& lane = M->lanes[M->current];
    lane.op = op, lane.where = where;
  }
  __attribute__((no_sanitize_thread, noinline)) ~Inside() { M->inside = false; }
};

// ---------------------------------------------------------------- the checked build: who may touch what

// Ordered before the current thread: by itself, by a barrier of the block, or of its warp since then.
EMU_FN bool ordered(const Touch& touch) {
  const int me = M->current;
  if (touch.thread == NOBODY || touch.thread == me || touch.block_epoch != M->block_epoch) return true;
  return touch.thread >= 0 && touch.thread / 32 == me / 32 && touch.warp_epoch != M->warps[me / 32].epoch;
}

EMU_FN void touch_shared(const void* where, size_t first, size_t bytes, bool writes) {
  const char* verb = writes ? "writes" : "reads";
  const int me = M->current;
  const Touch now{me, M->warps[me / 32].epoch, M->block_epoch};
  if (writes && bytes == 1) fail_at(where, -1, "it writes a single byte of shared memory, which is watched in pairs");
  for (size_t i = first / 2; i <= (first + bytes - 1) / 2; i++) {
    Shadow& s = M->shadow[i];
    if (s.copying != NOBODY) fail_at(where, s.copying, "race: it %s shared byte %zu, to which a cp.async of thread %d is in flight", verb, 2 * i, s.copying);
    if (!ordered(s.write)) fail_at(where, s.write.thread, "race: it %s shared byte %zu, which thread %d wrote without a barrier since", verb, 2 * i, s.write.thread);
    if (writes) {
      if (!ordered(s.read)) fail_at(where, s.read.thread, "race: it writes shared byte %zu, which another thread (%d) read without a barrier since", 2 * i, s.read.thread);
      s.write = now, s.read.thread = NOBODY;
    } else if (s.read.thread == NOBODY || s.read.block_epoch != M->block_epoch || (s.read.thread >= 0 && s.read.thread / 32 == me / 32)) {
      // Within a warp the newest epoch decides; of two readers in one, neither may be forgotten: keep a thread that is not the writer to come.
      if (s.read.thread >= 0 && s.read.thread != me && s.read.block_epoch == M->block_epoch && s.read.warp_epoch == now.warp_epoch) continue;
      s.read = now;
    } else {
      s.read = {MANY, 0, M->block_epoch};
    }
  }
}

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

EMU_FN void touch(const void* where, const void* pointer, size_t bytes, bool writes) {
  if (!(++M->ticks & 0xfffff)) check_time(where);
  const uintptr_t address = (uintptr_t)pointer, shared = (uintptr_t)M->shared;
  const char* verb = writes ? "write" : "read";
  if (address - (uintptr_t)M->stacks < STACK * M->num_threads) return;
  if ((bytes & (bytes - 1)) == 0 && address % bytes) fail_at(where, -1, "misaligned %s of %zu bytes", verb, bytes);
  if (address - shared < MOST_SHARED) {
    if (address + bytes > shared + M->launch.shared_bytes) fail_at(where, -1, "%s of %zu bytes past the %u bytes of shared memory", verb, bytes, M->launch.shared_bytes);
    touch_shared(where, address - shared, bytes, writes);
    return;
  }
  for (u64 i = 0; i < M->launch.num_extents; i++)
    if (address >= M->launch.extents[i].begin && address + bytes <= M->launch.extents[i].end) return;
  if (!writes && address >= (uintptr_t)__ehdr_start && address + bytes <= (uintptr_t)_end) return;   // a table of the kernel's own
  fail_at(where, -1, "%s of %zu bytes that belong to none of its tensors", verb, bytes);
}

EMU_FN void set_copying(const unsigned char* shared, int thread) {
  for (int i = 0; i < 8; i++) M->shadow[(shared - M->shared) / 2 + i].copying = thread;
}

// ---------------------------------------------------------------- barriers and collectives

// `work` runs once, given the 32 lanes, when all have come; `orders`: what a lane did before is seen by the others after.
template <class Work> EMU_FN void collective(const char* op, void* operands, bool orders, Work work) {
  const int me = M->current, first = me / 32 * 32;
  Lane& lane = M->lanes[me];
  Warp& warp = M->warps[me / 32];
  if (warp.arrived && warp.op != op) {
    int other = first;
    while (M->lanes[other].state != IN_WARP) other++;
    fail_at(lane.where, other, "divergence: thread %d is in %s while thread %d of its warp is in %s", me, op, other, warp.op);
  }
  warp.op = op, lane.operands = operands;
  if (++warp.arrived < 32) {
    lane.state = IN_WARP;
    run_another();
    return;
  }
  warp.arrived = 0;
  if (orders) warp.epoch++;
  work(&M->lanes[first]);
  for (int i = 0; i < 32; i++) make_ready(first + i);
  run_another();
}

EMU_FN void block_barrier() {
  const int me = M->current;
  M->counters.block_barriers++;
  if (M->alive < M->num_threads) fail_at(M->lanes[me].where, -1, "divergence: %d threads have ended, thread %d is in sync_block", M->num_threads - M->alive, me);
  M->lanes[me].state = IN_BLOCK;
  if (++M->in_barrier == M->num_threads) {
    M->in_barrier = 0;
    M->block_epoch++;
    for (int i = 0; i < M->num_threads; i++) make_ready(i);
  }
  run_another();
}

// How often shared memory is accessed for 8 rows of 16 bytes: lanes whose rows lie in the same banks take turns.
EMU_FN int wavefronts(const void* const* rows) {
  int most = 0, of_bank[8] = {};
  for (int i = 0; i < 8; i++) {
    if (std::find(rows, rows + i, rows[i]) != rows + i) continue;
    most = std::max(most, ++of_bank[(uintptr_t)rows[i] / 16 % 8]);
  }
  return most;
}

EMU_FN void finish_copy(const Lane& lane, const Copy& copy) {
  if (EMU_CHECKED) {
    set_copying(copy.shared, NOBODY);
    touch_shared(lane.where, copy.shared - M->shared, 16, true);
  }
  if (copy.filled) memcpy(copy.shared, copy.global, 16);
  else memset(copy.shared, 0, 16);
}

EMU_FN unsigned char* shared_memory() { return M->shared; }
EMU_FN dim3 thread_index() { return M->lanes[M->current].index; }
EMU_FN dim3 block_index() { return M->block_index; }
EMU_FN dim3 block_size() { return {M->launch.block[0], M->launch.block[1], M->launch.block[2]}; }
EMU_FN dim3 grid_size() { return {M->launch.grid[0], M->launch.grid[1], M->launch.grid[2]}; }

template <bool TRANSPOSED> EMU_FN void load_matrices(const char* op, const void* where, u32 (&result)[4], const void* row) {
  struct Operands { u32* result; const u16* row; } mine{result, static_cast<const u16*>(row)};
  Inside inside(op, where);
  if ((uintptr_t)row % 16) fail_at(where, -1, "misaligned row address of %s", op);
  if ((uintptr_t)row - (uintptr_t)M->shared + 16 > M->launch.shared_bytes) fail_at(where, -1, "%s reads outside of the %u bytes of shared memory", op, M->launch.shared_bytes);
  if (EMU_CHECKED) touch(where, row, 16, false);
  collective(op, &mine, false, [](Lane* lanes) {
    M->counters.ldmatrix++;
    auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane].operands); };
    for (int matrix = 0; matrix < 4; matrix++) {
      const void* rows[8];
      for (int i = 0; i < 8; i++) rows[i] = of(8 * matrix + i)->row;
      M->counters.ldmatrix_wavefronts += wavefronts(rows);
      for (int lane = 0; lane < 32; lane++) {
        const int a = lane / 4, b = lane % 4 * 2;
        auto at = [&](int r, int column) { return (u32)of(8 * matrix + r)->row[column]; };
        of(lane)->result[matrix] = TRANSPOSED ? at(b, a) | at(b + 1, a) << 16 : at(a, b) | at(a, b + 1) << 16;
      }
    }
  });
}

// ---------------------------------------------------------------- numbers

EMU_FN float f16_value(u32 bits) {
  const u32 exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 0    ? ldexpf((float)mantissa, -24)
                          : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                           : ldexpf((float)(1024 + mantissa), (int)exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
static const float* f16_table() {
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (u32 i = 0; i < 65536; i++) all[i] = f16_value(i);
    return all;
  }();
  return table.data();
}
static const float* const F16 = f16_table();
}  // namespace
}  // namespace emu

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())
#define EMU_ENTER(name) const void* const where = EMU_CALLER; emu::Inside inside(name, where)

SKV_DEV int min(int a, int b) { return a < b ? a : b; }
SKV_DEV int max(int a, int b) { return a > b ? a : b; }
SKV_DEV i64 min(i64 a, i64 b) { return a < b ? a : b; }
SKV_DEV i64 max(i64 a, i64 b) { return a > b ? a : b; }
EMU_FN u32 bits_of(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
EMU_FN float float_of(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }

EMU_FN void sync_block() { EMU_ENTER("sync_block"); emu::block_barrier(); }
EMU_FN void sync_warp() { EMU_ENTER("sync_warp"); emu::M->counters.warp_barriers++; emu::collective("sync_warp", nullptr, true, [](emu::Lane*) {}); }
template <class T> EMU_FN T shfl_xor(T value, int mask) {
  struct Operands { T value, result; int mask; } mine{value, value, mask};
  EMU_ENTER("shfl_xor");
  emu::collective("shfl_xor", &mine, false, [](emu::Lane* lanes) {
    emu::M->counters.shuffles++;
    auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane].operands); };
    for (int lane = 0; lane < 32; lane++) of(lane)->result = of((lane ^ of(lane)->mask) & 31)->value;
  });
  return mine.result;
}
template <class T> EMU_FN T shfl(T value, int lane) {
  struct Operands { T value, result; int lane; } mine{value, value, lane};
  EMU_ENTER("shfl");
  emu::collective("shfl", &mine, false, [](emu::Lane* lanes) {
    emu::M->counters.shuffles++;
    auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane].operands); };
    for (int lane = 0; lane < 32; lane++) of(lane)->result = of(of(lane)->lane & 31)->value;
  });
  return mine.result;
}

EMU_FN float to_f32(bf16 x) { return float_of((u32)x.bits << 16); }
EMU_FN float to_f32(f16 x) { return emu::F16[x.bits]; }
EMU_FN u16 bf16_bits(float x) {
  const u32 bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
EMU_FN u16 f16_bits(float x) {
  const u32 bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return (u16)(sign | 0x7c00u);   // 65520 and more
  if (magnitude < 0x38800000u) return (u16)(sign | (u32)nearbyintf(ldexpf(float_of(magnitude), 24)));   // below 2^-14
  return (u16)(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}
EMU_FN int round_to_int(float x) { return std::isnan(x) ? 0 : (int)nearbyintf(x); }
template <class T> EMU_FN u32 pack(float lo, float hi) {
  if constexpr (same<T, bf16>) return (u32)bf16_bits(lo) | (u32)bf16_bits(hi) << 16;
  else return (u32)f16_bits(lo) | (u32)f16_bits(hi) << 16;
}
EMU_FN u32 byte_perm(u32 a, u32 b, u32 pick) {
  const u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) result |= (u32)(bytes >> 8 * (pick >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
EMU_FN u32 f16x2_mul(u32 a, u32 b) { return pack<f16>(emu::F16[a & 0xffff] * emu::F16[b & 0xffff], emu::F16[a >> 16] * emu::F16[b >> 16]); }
EMU_FN u32 f16x2_sub(u32 a, u32 b) { return pack<f16>(emu::F16[a & 0xffff] - emu::F16[b & 0xffff], emu::F16[a >> 16] - emu::F16[b >> 16]); }

EMU_FN float ex2(float x) { emu::M->counters.exponentials++; return exp2f(x); }
EMU_FN float lg2(float x) { return log2f(x); }
EMU_FN float rsqrt(float x) { return 1.f / sqrtf(x); }

template <class T> EMU_FN void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  struct Operands { float* d; const u32* a; u32 b[2]; } mine{d, a, {b0, b1}};
  EMU_ENTER("mma_m16n8k16");
  emu::collective("mma_m16n8k16", &mine, false, [](emu::Lane* lanes) __attribute__((no_sanitize_thread)) {
    emu::M->counters.mma++;
    float left[16][16], right[16][8], sum[16][8];
    for (int lane = 0; lane < 32; lane++) {   // PTX: the fragments of a lane, group `g`, place `t` in it
      const Operands& of = *static_cast<Operands*>(lanes[lane].operands);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 8; i++) left[g + (i / 2 & 1) * 8][t + (i & 1) + i / 4 * 8] = to_f32(T{(u16)(of.a[i / 2] >> (i & 1) * 16)});
      for (int i = 0; i < 4; i++) right[t + (i & 1) + i / 2 * 8][g] = to_f32(T{(u16)(of.b[i / 2] >> (i & 1) * 16)});
      for (int i = 0; i < 4; i++) sum[g + i / 2 * 8][t + (i & 1)] = of.d[i];
    }
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < 16; k++)
        for (int column = 0; column < 8; column++) sum[row][column] += left[row][k] * right[k][column];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++)
        static_cast<Operands*>(lanes[lane].operands)->d[i] = sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + (i & 1)];
  });
}
EMU_FN void ldmatrix_x4(u32 (&r)[4], const void* row) { emu::load_matrices<false>("ldmatrix_x4", EMU_CALLER, r, row); }
EMU_FN void ldmatrix_x4_trans(u32 (&r)[4], const void* row) { emu::load_matrices<true>("ldmatrix_x4_trans", EMU_CALLER, r, row); }

EMU_FN void cp_async16(void* shared, const void* global, bool pred) {
  EMU_ENTER("cp_async16");
  emu::Machine& m = *emu::M;
  unsigned char* const target = static_cast<unsigned char*>(shared);
  if (((uintptr_t)shared | (uintptr_t)global) % 16) emu::fail_at(where, -1, "misaligned address of cp_async16");
  if ((uintptr_t)target - (uintptr_t)m.shared + 16 > m.launch.shared_bytes) emu::fail_at(where, -1, "cp_async16 writes outside of the %u bytes of shared memory", m.launch.shared_bytes);
  m.counters.copies++;
  if (EMU_CHECKED && pred) emu::touch(where, global, 16, false);
  if (EMU_CHECKED) emu::touch_shared(where, target - m.shared, 16, true);
  const emu::Copy copy{target, global, pred};
  if (m.launch.early_copies) {
    emu::finish_copy(m.lanes[m.current], copy);
  } else {
    memset(target, 0xff, 16);
    m.lanes[m.current].copies.push_back(copy);
  }
  if (EMU_CHECKED && !m.launch.early_copies) emu::set_copying(target, m.current);
}
EMU_FN void cp_async_commit() {
  EMU_ENTER("cp_async_commit");
  emu::Lane& lane = emu::M->lanes[emu::M->current];
  size_t before = 0;
  for (size_t group : lane.groups) before += group;
  lane.groups.push_back(lane.copies.size() - before);
}
template <int N> EMU_FN void cp_async_wait() {
  EMU_ENTER("cp_async_wait");
  emu::Lane& lane = emu::M->lanes[emu::M->current];
  while (lane.groups.size() > (size_t)N) {
    for (size_t i = 0; i < lane.groups[0]; i++) emu::finish_copy(lane, lane.copies[i]);
    lane.copies.erase(lane.copies.begin(), lane.copies.begin() + (long)lane.groups[0]);
    lane.groups.erase(lane.groups.begin());
  }
}

EMU_FN u32x4 load16(const void* pointer) {
  EMU_ENTER("load16");
  if ((uintptr_t)pointer % 16) emu::fail_at(where, -1, "misaligned read of 16 bytes");
  if (EMU_CHECKED) emu::touch(where, pointer, 16, false);
  return *static_cast<const u32x4*>(pointer);
}
EMU_FN void store16(void* pointer, u32x4 value) {
  EMU_ENTER("store16");
  if ((uintptr_t)pointer % 16) emu::fail_at(where, -1, "misaligned write of 16 bytes");
  if (EMU_CHECKED) emu::touch(where, pointer, 16, true);
  *static_cast<u32x4*>(pointer) = value;
}

// ---------------------------------------------------------------- launching

namespace emu {
namespace {
EMU_FN void on_signal(int number, siginfo_t* info, void* context) {
  if (!M || !pthread_equal(M->owner, pthread_self())) {
    signal(number, SIG_DFL);   // not ours: when the instruction is tried again, the process ends as it would have without us
    return;
  }
#if defined(__x86_64__)
  const void* where = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] + 1);
#elif defined(__aarch64__)
  const void* where = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc + 1);
#else
  const void* where = M->lanes[M->current].where;
#endif
  const uintptr_t address = (uintptr_t)info->si_addr, stacks = (uintptr_t)M->stacks;
  if (number == SIGFPE) fail_at(where, -1, "division by zero");
  fail_at(where, -1, address - stacks < STACK * M->num_threads ? "its stack overflows" : "it touches memory that is not mapped (signal %d)", number);
}

// While a launch runs, a wild pointer is a failure of the launch.
struct Signals {
  static constexpr int NUMBERS[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  struct sigaction before[4];
  stack_t stack_before;
  std::vector<char> stack;
  Signals() : stack(64 << 10) {
    stack_t own{};
    own.ss_sp = stack.data(), own.ss_size = stack.size();
    sigaltstack(&own, &stack_before);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; i++) sigaction(NUMBERS[i], &action, &before[i]);
  }
  ~Signals() {
    for (int i = 0; i < 4; i++) sigaction(NUMBERS[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

inline Machine::Machine(const Launch& l) : launch(l), num_threads(int(l.block[0] * l.block[1] * l.block[2])), num_warps(num_threads / 32) {
  lanes.resize(num_threads), warps.resize(num_warps), ready.resize(num_threads);
  shared = static_cast<unsigned char*>(aligned_alloc(1024, 228 << 10));
  stacks = static_cast<unsigned char*>(aligned_alloc(4096, STACK * num_threads));
  shadow.resize(EMU_CHECKED ? MOST_SHARED / 2 + 8 : 0);
  random = l.seed * 2 + 1;
  clock_gettime(CLOCK_MONOTONIC, &begun);
}
inline Machine::~Machine() { free(shared), free(stacks); }

EMU_FN void run_block(Machine& m, u64 number) {
  const unsigned *grid = m.launch.grid, *block = m.launch.block;
  m.block_index = {unsigned(number % grid[0]), unsigned(number / grid[0] % grid[1]), unsigned(number / grid[0] / grid[1])};
  m.alive = m.num_threads, m.in_barrier = 0, m.head = m.num_ready = 0, m.inside = true;
  memset(m.shared, 0xff, m.launch.shared_bytes);
  std::fill(m.shadow.begin(), m.shadow.begin() + (EMU_CHECKED ? m.launch.shared_bytes / 2 + 1 : 0), Shadow{});
  std::fill(m.warps.begin(), m.warps.end(), Warp{});
  for (int i = 0; i < m.num_threads; i++) {
    Lane& lane = m.lanes[i];
    lane.index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
    lane.op = "", lane.where = nullptr;
    lane.copies.clear(), lane.groups.clear();
    prepare_fiber(i);
    make_ready(i);
  }
  m.current = take_ready();
  switch_to(m.host, m.lanes[m.current]);
  for (int i = 0; i < m.num_threads; i++) {
    m.current = i;
    u64 mark;
    memcpy(&mark, m.stacks + STACK * i, sizeof mark);
    if (mark != STACK_MARK) fail_at(m.lanes[i].where, -1, "its stack overflows");
    if (!m.lanes[i].copies.empty()) fail_at(m.lanes[i].where, -1, "it ends while %zu of its cp.async are in flight", m.lanes[i].copies.size());
  }
}

// Blocks in an order that the schedule chooses too: by a step that has no divisor in common with their number.
EMU_FN void run_blocks(Machine& m) {
  const u64 count = (u64)m.launch.grid[0] * m.launch.grid[1] * m.launch.grid[2];
  for (u64 i = 0; i < count; i++) run_block(m, m.launch.order == OLDEST ? i : count - 1 - i);
}

template <class... A, size_t... I> EMU_FN void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <class... A> EMU_FN int launch(void (*kernel)(A...), const Launch* what, void** arguments) {
  std::lock_guard<std::mutex> alone(one_launch_at_a_time);
  Machine machine(*what);
  struct Entry { void (*kernel)(A...); void** arguments; } entry{kernel, arguments};
  machine.entry = [](void* e) __attribute__((no_sanitize_thread)) {
    call(static_cast<Entry*>(e)->kernel, static_cast<Entry*>(e)->arguments, std::make_index_sequence<sizeof...(A)>{});
  };
  machine.entry_argument = &entry;
  Signals signals;
  M = &machine;
  const int failed = sigsetjmp(machine.failed, 1);
  if (!failed) run_blocks(machine);
  M = nullptr;
  *what->counters = machine.counters;
  return failed;
}

// How Python knows what a kernel takes: p<bytes> is a pointer to things of that size, l an integer, d a real number.
template <class T> void describe(char*& text) {
  if constexpr (std::is_pointer_v<T>) text += sprintf(text, "p%zu ", sizeof(std::remove_pointer_t<T>));
  else if constexpr (std::is_same_v<T, i64>) text += sprintf(text, "l ");
  else {
    static_assert(std::is_same_v<T, double>, "a scalar parameter of a kernel is long long or double");
    text += sprintf(text, "d ");
  }
}
template <class... A> const char* signature(void (*)(A...)) {
  static char text[8 * sizeof...(A) + 1];
  char* end = text;
  (describe<A>(end), ...);
  return text;
}
}  // namespace
}  // namespace emu

#define EMU_VISIBLE extern "C" __attribute__((visibility("default"), no_sanitize_thread))
#define SKV_EXPORT(name) \
  EMU_VISIBLE int emu_##name(const emu::Launch* what, void** arguments) { return emu::launch(name, what, arguments); } \
  EMU_VISIBLE const char* emu_signature_##name() { return emu::signature(name); }
EMU_VISIBLE u64 emu_base() { return reinterpret_cast<uintptr_t>(&emu::fail_at) - reinterpret_cast<uintptr_t>(emu::__ehdr_start); }

// ---------------------------------------------------------------- hooks of the checked build

#if EMU_CHECKED
#define EMU_HOOK extern "C" __attribute__((no_sanitize_thread, noinline, visibility("hidden"))) void
#define EMU_TOUCH(bytes, writes) { if (emu::M && !emu::M->inside) { emu::M->inside = true; emu::touch(EMU_CALLER, pointer, bytes, writes); emu::M->inside = false; } }
#define EMU_HOOKS(n) \
  EMU_HOOK __tsan_read##n(void* pointer) EMU_TOUCH(n, false) \
  EMU_HOOK __tsan_write##n(void* pointer) EMU_TOUCH(n, true) \
  EMU_HOOK __tsan_unaligned_read##n(void* pointer) EMU_TOUCH(n, false) \
  EMU_HOOK __tsan_unaligned_write##n(void* pointer) EMU_TOUCH(n, true)
EMU_HOOKS(1) EMU_HOOKS(2) EMU_HOOKS(4) EMU_HOOKS(8) EMU_HOOKS(16)
EMU_HOOK __tsan_read_range(void* pointer, unsigned long bytes) EMU_TOUCH(bytes, false)
EMU_HOOK __tsan_write_range(void* pointer, unsigned long bytes) EMU_TOUCH(bytes, true)
EMU_HOOK __tsan_init() {}
EMU_HOOK __tsan_func_entry(void*) {}
EMU_HOOK __tsan_func_exit() {}
EMU_HOOK __tsan_vptr_update(void**, void*) {}
EMU_HOOK __tsan_vptr_read(void**) {}
#endif
