// The emulator's machine: fibers, barriers, memory and its checks, launches. emulator.h is what kernels see of it.
//
// One block at a time; each CUDA thread is a fiber. A barrier or collective parks the fiber; the last one to arrive does the work
// for all, reading and writing the operands that lie on the stacks of the others. Shared memory starts as NaN in every block, and
// a cp.async copies as late as it may (at its wait) or as early, as the launch asks: whoever relies on one of them is found out.
//
// In the checked build kernels are compiled with -fsanitize=thread, but linked with the hooks below and not with its library:
// every load and store passes here. Known are races in shared memory, bytes that a cp.async has in flight, and what is outside of
// the launch's tensors. This file itself is compiled without.
//
// A failure never ends the process: `fail_at` writes down what and where, leaves all fibers as they stand and returns to the
// host. Kernels therefore hold nothing that needs a destructor.
#include "device.cuh"

#include <algorithm>
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

extern "C" const char __ehdr_start[], _end[];   // of the library

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

// ---------------------------------------------------------------- the checked build: who may touch what

// Ordered before the current thread: by itself, by a barrier of the block, or of its warp since then.
bool ordered(const Touch& touch) {
  const int me = M->current;
  if (touch.thread == NOBODY || touch.block_epoch != M->block_epoch) return true;
  if (touch.thread == me && touch.who == ONE) return true;
  return touch.thread / 32 == me / 32 && touch.who != ANYBODY && touch.warp_epoch != M->warps[me / 32].epoch;
}

void note_reader(Touch& read, const Touch& now) {
  const bool first = read.thread == NOBODY || read.block_epoch != now.block_epoch;
  if (first) read = now;
  else if (read.thread / 32 != now.thread / 32) read.who = ANYBODY;
  else if (read.who == ANYBODY) return;
  else if (read.warp_epoch != now.warp_epoch) read = now;   // what comes after the newest comes after the older ones too
  else if (read.thread != now.thread) read.who = OF_A_WARP;
}

void touch_shared(const void* where, size_t first, size_t bytes, bool writes) {
  const char* verb = writes ? "writes" : "reads";
  const Touch now{M->current, M->warps[M->current / 32].epoch, M->block_epoch, ONE, where};
  if (writes && bytes == 1) fail_at(where, nullptr, "it writes a single byte of shared memory, which is watched in pairs");
  for (size_t i = first / 2; i <= (first + bytes - 1) / 2; i++) {
    Shadow& s = M->shadow[i];
    if (s.copying != NOBODY) fail_at(where, s.write.where, "race: it %s shared byte %zu while a cp.async of thread %d is in flight to it", verb, 2 * i, s.copying);
    if (!ordered(s.write)) fail_at(where, s.write.where, "race: it %s shared byte %zu, which thread %d wrote without a barrier since", verb, 2 * i, s.write.thread);
    if (!writes) {
      note_reader(s.read, now);
      continue;
    }
    if (!ordered(s.read)) fail_at(where, s.read.where, "race: it writes shared byte %zu, which was read (thread %d) without a barrier since", 2 * i, s.read.thread);
    s.write = now, s.read = Touch{};
  }
}

// How often shared memory is accessed for `count` lanes: those whose words lie in one bank take turns, unless the word is the same.
int wavefronts(const uintptr_t* addresses, int count, unsigned bytes) {
  uintptr_t words[32];
  int num_words = 0, of_bank[32] = {}, most = 0;
  for (int i = 0; i < count; i++)
    for (uintptr_t word = addresses[i] / 4; word <= (addresses[i] + bytes - 1) / 4; word++) {
      if (std::find(words, words + num_words, word) != words + num_words) continue;
      words[num_words++] = word;
      most = std::max(most, ++of_bank[word % 32]);
    }
  return most;
}

void count_row(const Traffic& traffic, const Row& row) {
  uintptr_t addresses[32], sectors[64];
  int count = 0, num_sectors = 0;
  for (int lane = 0; lane < 32; lane++)
    if (row.present >> lane & 1) addresses[count++] = row.address[lane];
  if (traffic.shared) {   // 128 bytes at a time
    const int turn = std::max(1, (int)(128 / std::max(4u, traffic.bytes)));
    for (int i = 0; i < count; i += turn) M->counters.shared_wavefronts += wavefronts(addresses + i, std::min(turn, count - i), traffic.bytes), M->counters.least_shared_wavefronts++;
    return;
  }
  for (int i = 0; i < count; i++)
    for (uintptr_t sector = addresses[i] / 32; sector <= (addresses[i] + traffic.bytes - 1) / 32; sector++)
      if (num_sectors < 64 && std::find(sectors, sectors + num_sectors, sector) == sectors + num_sectors) sectors[num_sectors++] = sector;
  M->counters.global_sectors += num_sectors;
  std::sort(addresses, addresses + count);
  const int distinct = int(std::unique(addresses, addresses + count) - addresses);   // lanes that read one address share it
  M->counters.least_global_sectors += (distinct * traffic.bytes + 31) / 32;
}

void record(const void* where, uintptr_t address, unsigned bytes, bool shared) {
  const int lane = M->current % 32;
  Traffic& traffic = M->warps[M->current / 32].traffic[where];
  traffic.bytes = bytes, traffic.shared = shared;
  const u64 nth = traffic.next[lane]++ - traffic.dropped;
  if (nth >= traffic.rows.size()) traffic.rows.resize(nth + 1, Row{});
  traffic.rows[nth].address[lane] = address, traffic.rows[nth].present |= 1u << lane;
  while (!traffic.rows.empty() && traffic.rows.front().present == ~0u) {
    count_row(traffic, traffic.rows.front());
    traffic.rows.pop_front(), traffic.dropped++;
  }
}

void touch(const void* where, const void* pointer, size_t bytes, bool writes) {
  if (!(++M->ticks & 0xfffff)) check_time(where);
  const uintptr_t address = (uintptr_t)pointer, shared = (uintptr_t)M->shared;
  const char* verb = writes ? "write" : "read";
  if (address - (uintptr_t)M->stacks < STACK * M->num_threads) return;
  if ((bytes & (bytes - 1)) == 0 && address % std::min(bytes, size_t(16))) fail_at(where, nullptr, "misaligned %s of %zu bytes", verb, bytes);
  const bool is_shared = address - shared < MOST_SHARED;
  if (M->launch.record_traffic) record(where, address, (unsigned)bytes, is_shared);
  if (is_shared) {
    if (address + bytes > shared + M->launch.shared_bytes) fail_at(where, nullptr, "%s of %zu bytes past the %u bytes of shared memory", verb, bytes, M->launch.shared_bytes);
    touch_shared(where, address - shared, bytes, writes);
    return;
  }
  for (u64 i = 0; i < M->launch.num_extents; i++)
    if (address >= M->launch.extents[i].begin && address + bytes <= M->launch.extents[i].end) return;
  if (!writes && address >= (uintptr_t)__ehdr_start && address + bytes <= (uintptr_t)_end) return;   // a table of the kernel's own
  fail_at(where, nullptr, "%s of %zu bytes that belong to none of its tensors", verb, bytes);
}

// Atomic operations need no order among themselves, but a barrier between them and everything else.
void touch_atomically(const void* where, const void* pointer, size_t bytes) {
  const uintptr_t first = (uintptr_t)pointer - (uintptr_t)M->shared;
  if (first >= M->launch.shared_bytes) return touch(where, pointer, bytes, true);
  for (size_t i = first / 2; i <= (first + bytes - 1) / 2; i++) {
    Shadow& s = M->shadow[i];
    if (s.write.who != ANYBODY && !ordered(s.write)) fail_at(where, s.write.where, "race: it changes shared byte %zu atomically, which thread %d wrote without a barrier since", 2 * i, s.write.thread);
    if (!ordered(s.read)) fail_at(where, s.read.where, "race: it changes shared byte %zu atomically, which was read (thread %d) without a barrier since", 2 * i, s.read.thread);
    s.write = {M->current, 0, M->block_epoch, ANYBODY, where}, s.read = Touch{};
  }
}

void set_copying(const unsigned char* shared, int thread) {
  for (int i = 0; i < 8; i++) M->shadow[(shared - M->shared) / 2 + i].copying = thread;
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

void finish_copy(const Lane& lane, const Copy& copy) {
  if (EMU_CHECKED) {
    set_copying(copy.shared, NOBODY);
    touch_shared(lane.where, copy.shared - M->shared, 16, true);
  }
  if (copy.filled) memcpy(copy.shared, copy.global, 16);
  else memset(copy.shared, 0, 16);
}

// ---------------------------------------------------------------- launching

void on_signal(int number, siginfo_t* info, void* context) {
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
  if (number == SIGFPE) fail_at(where, nullptr, "division by zero");
  fail_at(where, nullptr, address - stacks < STACK * M->num_threads ? "its stack overflows" : "it touches memory that is not mapped (signal %d)", number);
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

// Kept for the next launch.
unsigned char* stacks_for(int count) {
  static unsigned char* stacks = nullptr;
  static int num_stacks = 0;
  if (count <= num_stacks) return stacks;
  if (num_stacks) munmap(stacks, STACK * num_stacks);
  void* const fresh = mmap(nullptr, STACK * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fresh == MAP_FAILED) abort();
  stacks = static_cast<unsigned char*>(fresh), num_stacks = count;
  for (int i = 0; i < count; i++) mprotect(stacks + STACK * i, GUARD, PROT_NONE);
  return stacks;
}

inline Machine::Machine(const Launch& l) : launch(l), num_threads(int(l.block[0] * l.block[1] * l.block[2])), num_warps(num_threads / 32) {
  lanes = new Lane[num_threads], warps.resize(num_warps), ready.resize(num_threads);
  shared = static_cast<unsigned char*>(aligned_alloc(1024, 228 << 10));
  stacks = stacks_for(num_threads);
  shadow.resize(EMU_CHECKED ? MOST_SHARED / 2 + 8 : 0);
  random = l.seed * 2 + 1;
  clock_gettime(CLOCK_MONOTONIC, &begun);
}
inline Machine::~Machine() { delete[] lanes, free(shared); }

void run_block(Machine& m, u64 number) {
  const unsigned *grid = m.launch.grid, *block = m.launch.block;
  m.block_index = {unsigned(number % grid[0]), unsigned(number / grid[0] % grid[1]), unsigned(number / grid[0] / grid[1])};
  m.alive = m.num_threads, m.in_barrier = 0, m.head = m.num_ready = 0;
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
    for (auto& [where, traffic] : m.warps[i / 32].traffic) {   // instructions of which some lanes had no part
      for (const Row& row : traffic.rows) count_row(traffic, row);
      traffic.rows.clear();
    }
    if (!m.lanes[i].copies.empty()) fail_at(m.lanes[i].where, nullptr, "it ends while %zu of its cp.async are in flight", m.lanes[i].copies.size());
  }
}

// Blocks in an order that the schedule chooses too: by a step that has no divisor in common with their number.
void run_blocks(Machine& m) {
  const u64 count = (u64)m.launch.grid[0] * m.launch.grid[1] * m.launch.grid[2];
  for (u64 i = 0; i < count; i++) run_block(m, m.launch.order == OLDEST ? i : count - 1 - i);
}
}  // namespace

// ---------------------------------------------------------------- what kernels call

int launch(const Launch* what, void (*entry)(void*), void* argument) {
  std::lock_guard<std::mutex> alone(one_launch_at_a_time);
  Machine machine(*what);
  machine.entry = entry, machine.entry_argument = argument;
  Signals signals;
  M = &machine;
  const int failed = sigsetjmp(machine.failed, 1);
  if (!failed) run_blocks(machine);
  M = nullptr;
  *what->counters = machine.counters;
  return failed;
}

unsigned char* shared_memory() { return M->shared; }
dim3 thread_index() { return M->lanes[M->current].index; }
dim3 block_index() { return M->block_index; }
dim3 block_size() { return {M->launch.block[0], M->launch.block[1], M->launch.block[2]}; }
dim3 grid_size() { return {M->launch.grid[0], M->launch.grid[1], M->launch.grid[2]}; }

void sync_block() {
  enter("sync_block", EMU_CALLER);
  block_barrier();
}
void sync_warp() {
  enter("sync_warp", EMU_CALLER);
  M->counters.warp_barriers++;
  collective("sync_warp", nullptr, true, [](Lane*) {});
}

void shuffle(const char* op, void* value, int bytes, int from) {
  struct Operands { void* value; u64 before; int bytes, from; } mine{value, 0, bytes, from};
  memcpy(&mine.before, value, bytes);
  enter(op, EMU_CALLER);
  collective(op, &mine, false, [](Lane* lanes) {
    M->counters.shuffles++;
    auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane].operands); };
    for (int lane = 0; lane < 32; lane++) memcpy(of(lane)->value, &of(of(lane)->from)->before, of(lane)->bytes);
  });
}
int lane_index() { return M->current % 32; }

static float value_of(u32 bits, bool is_bf16) { return is_bf16 ? to_f32(bf16{(u16)bits}) : f16_value(bits & 0xffffu); }

void mma(bool is_bf16, float* d, const u32* a, u32 b0, u32 b1) {
  struct Operands { bool is_bf16; float* d; const u32* a; u32 b[2]; } mine{is_bf16, d, a, {b0, b1}};
  enter("mma_m16n8k16", EMU_CALLER);
  collective("mma_m16n8k16", &mine, false, [](Lane* lanes) {
    M->counters.mma++;
    float left[16][16], right[16][8], sum[16][8];
    for (int lane = 0; lane < 32; lane++) {   // PTX: the fragments of a lane, group `g`, place `t` in it
      const Operands& of = *static_cast<Operands*>(lanes[lane].operands);
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 8; i++) left[g + (i / 2 & 1) * 8][t + (i & 1) + i / 4 * 8] = value_of(of.a[i / 2] >> (i & 1) * 16, of.is_bf16);
      for (int i = 0; i < 4; i++) right[t + (i & 1) + i / 2 * 8][g] = value_of(of.b[i / 2] >> (i & 1) * 16, of.is_bf16);
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

void ldmatrix(const char* op, u32* result, const void* row, bool transposed) {
  const void* const where = EMU_CALLER;
  struct Operands { u32* result; const u16* row; bool transposed; } mine{result, static_cast<const u16*>(row), transposed};
  enter(op, where);
  if ((uintptr_t)row % 16) fail_at(where, nullptr, "misaligned row address of %s", op);
  if ((uintptr_t)row - (uintptr_t)M->shared + 16 > M->launch.shared_bytes) fail_at(where, nullptr, "%s reads outside of the %u bytes of shared memory", op, M->launch.shared_bytes);
  if (EMU_CHECKED) touch(where, row, 16, false);
  collective(op, &mine, false, [](Lane* lanes) {
    M->counters.ldmatrix++;
    auto of = [&](int lane) { return static_cast<Operands*>(lanes[lane].operands); };
    for (int matrix = 0; matrix < 4; matrix++) {
      uintptr_t rows[8];
      for (int i = 0; i < 8; i++) rows[i] = (uintptr_t)of(8 * matrix + i)->row;
      M->counters.ldmatrix_wavefronts += wavefronts(rows, 8, 16);
      for (int lane = 0; lane < 32; lane++) {
        const int a = lane / 4, b = lane % 4 * 2;
        auto at = [&](int r, int column) { return (u32)of(8 * matrix + r)->row[column]; };
        of(lane)->result[matrix] = of(lane)->transposed ? at(b, a) | at(b + 1, a) << 16 : at(a, b) | at(a, b + 1) << 16;
      }
    }
  });
}

void copy(void* shared, const void* global, bool filled) {
  const char* const where = static_cast<const char*>(EMU_CALLER);
  Lane& lane = enter("cp_async16", where);
  unsigned char* const target = static_cast<unsigned char*>(shared);
  if (((uintptr_t)shared | (uintptr_t)global) % 16) fail_at(where, nullptr, "misaligned address of cp_async16");
  if ((uintptr_t)target - (uintptr_t)M->shared + 16 > M->launch.shared_bytes) fail_at(where, nullptr, "cp_async16 writes outside of the %u bytes of shared memory", M->launch.shared_bytes);
  M->counters.copies++;
  if (EMU_CHECKED && filled) touch(where + 1, global, 16, false);   // a place of its own in the record
  if (EMU_CHECKED) touch(where, target, 16, true);
  const Copy copy{target, global, filled};
  if (M->launch.early_copies) return finish_copy(lane, copy);
  memset(target, 0xff, 16);
  lane.copies.push_back(copy);
  if (EMU_CHECKED) set_copying(target, M->current);
}
void commit_copies() {
  Lane& lane = enter("cp_async_commit", EMU_CALLER);
  size_t before = 0;
  for (size_t group : lane.groups) before += group;
  lane.groups.push_back(lane.copies.size() - before);
}
void wait_for_copies(int most) {
  Lane& lane = enter("cp_async_wait", EMU_CALLER);
  while (lane.groups.size() > (size_t)most) {
    for (size_t i = 0; i < lane.groups[0]; i++) finish_copy(lane, lane.copies[i]);
    lane.copies.erase(lane.copies.begin(), lane.copies.begin() + (long)lane.groups[0]);
    lane.groups.erase(lane.groups.begin());
  }
}

void load16(void* to, const void* pointer) {
  const void* const where = EMU_CALLER;
  enter("load16", where);
  if ((uintptr_t)pointer % 16) fail_at(where, nullptr, "misaligned read of 16 bytes");
  if (EMU_CHECKED) touch(where, pointer, 16, false);
  memcpy(to, pointer, 16);
}
void store16(void* pointer, const void* from) {
  const void* const where = EMU_CALLER;
  enter("store16", where);
  if ((uintptr_t)pointer % 16) fail_at(where, nullptr, "misaligned write of 16 bytes");
  if (EMU_CHECKED) touch(where, pointer, 16, true);
  memcpy(pointer, from, 16);
}
void atomic_add(u64* pointer, u64 value) {
  const void* const where = EMU_CALLER;
  enter("atomic_add", where);
  if ((uintptr_t)pointer % sizeof value) fail_at(where, nullptr, "misaligned atomic_add");
  if (EMU_CHECKED) touch_atomically(where, pointer, sizeof value);
  *pointer += value;
}
void count_exponential() { M->counters.exponentials++; }

float f16_value(u32 bits) {
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (u32 i = 0; i < 65536; i++) {
      const int exponent = i >> 10 & 31, mantissa = i & 1023;
      const float magnitude = exponent == 0    ? ldexpf((float)mantissa, -24)
                              : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                               : ldexpf((float)(1024 + mantissa), exponent - 25);
      all[i] = i & 0x8000 ? -magnitude : magnitude;
    }
    return all;
  }();
  return table[bits];
}
}  // namespace emu

extern "C" __attribute__((visibility("default"))) u64 emu_base() {
  return reinterpret_cast<uintptr_t>(&emu::fail_at) - reinterpret_cast<uintptr_t>(__ehdr_start);
}

// ---------------------------------------------------------------- hooks of the checked build

#if EMU_CHECKED
#define EMU_HOOK(name, bytes, writes) \
  extern "C" void name(void* pointer) { if (emu::M) emu::touch(EMU_CALLER, pointer, bytes, writes); }
#define EMU_HOOKS(n) \
  EMU_HOOK(__tsan_read##n, n, false) EMU_HOOK(__tsan_write##n, n, true) \
  EMU_HOOK(__tsan_unaligned_read##n, n, false) EMU_HOOK(__tsan_unaligned_write##n, n, true)
EMU_HOOKS(1) EMU_HOOKS(2) EMU_HOOKS(4) EMU_HOOKS(8) EMU_HOOKS(16)
extern "C" {
void __tsan_read_range(void* pointer, unsigned long bytes) { if (emu::M) emu::touch(EMU_CALLER, pointer, bytes, false); }
void __tsan_write_range(void* pointer, unsigned long bytes) { if (emu::M) emu::touch(EMU_CALLER, pointer, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#endif
