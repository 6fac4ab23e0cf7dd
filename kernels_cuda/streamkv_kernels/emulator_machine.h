// The emulator's machine: what a launch is, fibers, barriers and collectives. Part of emulator.cpp.
#pragma once
#include "device.cuh"

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <vector>
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#if defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_OWN_SWITCH 1
#else
#define EMU_OWN_SWITCH 0
#endif
#define EMU_CALLER __builtin_return_address(0)

namespace emu {
// ---------------------------------------------------------------- what Python gives and gets (emulated.py has the same structs)

struct Extent { uintptr_t begin, end; };
// A wavefront is one turn of the 32 banks of shared memory, a sector 32 bytes of global memory; `least_` as if accesses were perfect.
struct Counters {
  u64 mma, ldmatrix, ldmatrix_wavefronts, copies, shuffles, exponentials, block_barriers, warp_barriers, switches;
  u64 shared_wavefronts, least_shared_wavefronts, global_sectors, least_global_sectors;   // where traffic is recorded
};
struct Failure { unsigned block[3]; int thread; u64 where, other_where; char what[240]; };
struct Launch {
  unsigned grid[3], block[3], shared_bytes;
  int order, early_copies;   // order: OLDEST, NEWEST, RANDOM
  int record_traffic;        // in the checked build
  u64 seed;
  double time_limit_s;
  u64 num_extents;
  const Extent* extents;     // memory that the kernel may use; looked at in the checked build only
  Counters* counters;
  Failure* failure;
};

namespace {
// ---------------------------------------------------------------- state of a launch

enum Order { OLDEST, NEWEST, RANDOM };   // which of the threads that can go on does
enum State { READY, IN_WARP, IN_BLOCK, DONE };
constexpr size_t STACK = 64 << 10;
constexpr unsigned MOST_SHARED = 227 << 10;   // of the largest device
constexpr size_t GUARD = 4096;             // the lowest bytes of a stack, which nobody may touch

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

// The nth access of each lane of a warp at one place in the kernel, taken for one instruction of the warp.
struct Row { uintptr_t address[32]; u32 present; };
struct Traffic { unsigned bytes; bool shared; u64 dropped; u64 next[32]; std::deque<Row> rows; };

struct Warp {
  int arrived = 0;
  const char* op = "";   // of those that have arrived
  int epoch = 0;         // how many barriers of the warp there have been
  std::unordered_map<const void*, Traffic> traffic;
};

constexpr int NOBODY = -1;
enum Who { ONE, OF_A_WARP, ANYBODY };
// Who wrote two bytes of shared memory last (ANYBODY: atomically), and who has read them since.
struct Touch { int thread = NOBODY, warp_epoch = 0, block_epoch = 0; Who who = ONE; const void* where = nullptr; };
struct Shadow { Touch write, read; int copying = NOBODY; };

struct Machine {
  const Launch& launch;
  int num_threads, num_warps;
  Lane* lanes;
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
  u64 random, ticks = 0;
  timespec begun{};
  void (*entry)(void*) = nullptr;
  void* entry_argument = nullptr;

  explicit Machine(const Launch& l);
  ~Machine();
};
Machine* M = nullptr;
std::mutex one_launch_at_a_time;

[[noreturn]] void fail_at(const void* where, const void* other_where, const char* format, ...) {
  Failure& failure = *M->launch.failure;
  const uintptr_t base = reinterpret_cast<uintptr_t>(&fail_at);   // Python knows where this function lies in the file
  failure.block[0] = M->block_index.x, failure.block[1] = M->block_index.y, failure.block[2] = M->block_index.z;
  failure.thread = M->current;
  failure.where = (uintptr_t)where - base;
  failure.other_where = other_where ? (uintptr_t)other_where - base : 0;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(failure.what, sizeof failure.what, format, arguments);
  va_end(arguments);
  siglongjmp(M->failed, 1);
}

void check_time(const void* where) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  const double seconds = double(now.tv_sec - M->begun.tv_sec) + 1e-9 * double(now.tv_nsec - M->begun.tv_nsec);
  if (M->launch.time_limit_s > 0 && seconds > M->launch.time_limit_s) fail_at(where, nullptr, "it runs longer than %g s", M->launch.time_limit_s);
}

// ---------------------------------------------------------------- fibers

#if EMU_OWN_SWITCH
// The registers that a called function must keep, and the stack pointer: the whole state of a fiber that has called this.
__attribute__((naked, noinline)) void swap_stacks(void**, void*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

void switch_to(Lane& from, Lane& to) {
  M->counters.switches++;
#if EMU_OWN_SWITCH
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

void make_ready(int thread) {
  M->lanes[thread].state = READY;
  M->ready[(M->head + M->num_ready++) % M->ready.size()] = thread;
}

int take_ready() {
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
void run_another() {
  Lane& from = M->lanes[M->current];
  if (!(++M->ticks & 0xffff)) check_time(from.where);
  if (!M->num_ready) {
    if (!M->alive) { switch_to(from, M->host); return; }
    int waits = 0;
    while (M->lanes[waits].state == DONE) waits++;
    int other = NOBODY;   // one that waits for something else: the other side of the divergence
    for (int i = 0; i < M->num_threads; i++)
      if (M->lanes[i].state != DONE && M->lanes[i].where != M->lanes[waits].where) other = i;
    M->current = waits;
    if (other >= 0) fail_at(M->lanes[waits].where, M->lanes[other].where, "divergence: thread %d waits in %s, thread %d in %s", waits, M->lanes[waits].op, other, M->lanes[other].op);
    fail_at(M->lanes[waits].where, nullptr, "divergence: thread %d waits in %s, %d threads have ended", waits, M->lanes[waits].op, M->num_threads - M->alive);
  }
  const int next = take_ready();
  if (next == M->current) return;
  M->current = next;
  switch_to(from, M->lanes[next]);
}

void run_thread() {
  M->entry(M->entry_argument);
  Lane& lane = M->lanes[M->current];
  lane.state = DONE;
  M->alive--;
  run_another();
  abort();   // nobody goes on with a thread that has ended
}

void prepare_fiber(int thread) {
  Lane& lane = M->lanes[thread];
  unsigned char* stack = M->stacks + STACK * thread;
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

// What every function of the device layer that can wait or fail begins with.
Lane& enter(const char* op, const void* where) {
  Lane& lane = M->lanes[M->current];
  lane.op = op, lane.where = where;
  return lane;
}

// ---------------------------------------------------------------- barriers and collectives

// `work` runs once, given the 32 lanes, when all have come; `orders`: what a lane did before is seen by the others after.
void collective(const char* op, void* operands, bool orders, void (*work)(Lane*)) {
  const int me = M->current, first = me / 32 * 32;
  Lane& lane = M->lanes[me];
  Warp& warp = M->warps[me / 32];
  if (warp.arrived && warp.op != op) {
    int other = first;
    while (M->lanes[other].state != IN_WARP) other++;
    fail_at(lane.where, M->lanes[other].where, "divergence: thread %d is in %s while thread %d of its warp is in %s", me, op, other, warp.op);
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

void block_barrier() {
  const int me = M->current;
  M->counters.block_barriers++;
  if (M->alive < M->num_threads) fail_at(M->lanes[me].where, nullptr, "divergence: %d threads have ended, thread %d is in sync_block", M->num_threads - M->alive, me);
  M->lanes[me].state = IN_BLOCK;
  if (++M->in_barrier == M->num_threads) {
    M->in_barrier = 0;
    M->block_epoch++;
    for (int i = 0; i < M->num_threads; i++) make_ready(i);
  }
  run_another();
}
}  // namespace
}  // namespace emu
