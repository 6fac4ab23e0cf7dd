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
#include "emulator_checks.h"
#include "emulator_machine.h"

namespace emu {
namespace {
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

// 16 bytes of shared memory, aligned to that.
static void must_be_shared(const char* op, const void* where, const void* pointer) {
  if ((uintptr_t)pointer % 16) fail_at(where, nullptr, "misaligned address of %s", op);
  if ((uintptr_t)pointer - (uintptr_t)M->shared + 16 > M->launch.shared_bytes) fail_at(where, nullptr, "%s outside of the %u bytes of shared memory", op, M->launch.shared_bytes);
}

static void access_aligned(const char* op, const void* where, const void* pointer, size_t bytes, Access access) {
  enter(op, where);
  if ((uintptr_t)pointer % bytes) fail_at(where, nullptr, "misaligned %s of %zu bytes", access == READS ? "read" : "write", bytes);
  if (EMU_CHECKED) touch(where, pointer, bytes, access);
}

void ldmatrix(const char* op, u32* result, const void* row, bool transposed) {
  const void* const where = EMU_CALLER;
  struct Operands { u32* result; const u16* row; bool transposed; } mine{result, static_cast<const u16*>(row), transposed};
  enter(op, where);
  must_be_shared(op, where, row);
  if (EMU_CHECKED) touch(where, row, 16, READS);
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
  if ((uintptr_t)global % 16) fail_at(where, nullptr, "misaligned address of cp_async16");
  must_be_shared("cp_async16", where, target);
  M->counters.copies++;
  if (EMU_CHECKED && filled) touch(where + 1, global, 16, READS);   // a place of its own in the record
  if (EMU_CHECKED) touch(where, target, 16, WRITES);
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
  access_aligned("load16", EMU_CALLER, pointer, 16, READS);
  memcpy(to, pointer, 16);
}
void store16(void* pointer, const void* from) {
  access_aligned("store16", EMU_CALLER, pointer, 16, WRITES);
  memcpy(pointer, from, 16);
}
void atomic_add(u64* pointer, u64 value) {
  access_aligned("atomic_add", EMU_CALLER, pointer, sizeof value, ADDS);
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
#define EMU_HOOK(name, bytes, access) \
  extern "C" void name(void* pointer) { if (emu::M) emu::touch(EMU_CALLER, pointer, bytes, emu::access); }
#define EMU_HOOKS(n) \
  EMU_HOOK(__tsan_read##n, n, READS) EMU_HOOK(__tsan_write##n, n, WRITES) \
  EMU_HOOK(__tsan_unaligned_read##n, n, READS) EMU_HOOK(__tsan_unaligned_write##n, n, WRITES)
EMU_HOOKS(1) EMU_HOOKS(2) EMU_HOOKS(4) EMU_HOOKS(8) EMU_HOOKS(16)
extern "C" {
void __tsan_read_range(void* pointer, unsigned long bytes) { if (emu::M) emu::touch(EMU_CALLER, pointer, bytes, emu::READS); }
void __tsan_write_range(void* pointer, unsigned long bytes) { if (emu::M) emu::touch(EMU_CALLER, pointer, bytes, emu::WRITES); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
#endif
