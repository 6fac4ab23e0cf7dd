// The checked build: which loads and stores of a kernel are wrong, and what they cost. Part of emulator.cpp.
//
// Shared memory has a shadow that says who touched it last; accesses need a barrier of their warp or block between them, or the
// same thread. Everything else must lie in the tensors that the launch was given.
#pragma once
#include "emulator_machine.h"

extern "C" const char __ehdr_start[], _end[];   // of the library

namespace emu {
namespace {
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

// ADDS, atomically, needs no order among its like, but a barrier between it and everything else.
enum Access { READS, WRITES, ADDS };

void touch_shared(const void* where, size_t first, size_t bytes, Access access) {
  const char* verb = access == READS ? "reads" : access == WRITES ? "writes" : "atomically changes";
  const Touch now{M->current, M->warps[M->current / 32].epoch, M->block_epoch, access == ADDS ? ANYBODY : ONE, where};
  if (access != READS && bytes == 1) fail_at(where, nullptr, "it writes a single byte of shared memory, which is watched in pairs");
  for (size_t i = first / 2; i <= (first + bytes - 1) / 2; i++) {
    Shadow& s = M->shadow[i];
    if (s.copying != NOBODY) fail_at(where, s.write.where, "race: it %s shared byte %zu while a cp.async of thread %d is in flight to it", verb, 2 * i, s.copying);
    const bool both_add = access == ADDS && s.write.who == ANYBODY;
    if (!both_add && !ordered(s.write)) fail_at(where, s.write.where, "race: it %s shared byte %zu, which thread %d wrote without a barrier since", verb, 2 * i, s.write.thread);
    if (access == READS) {
      note_reader(s.read, now);
      continue;
    }
    if (!ordered(s.read)) fail_at(where, s.read.where, "race: it %s shared byte %zu, which was read (thread %d) without a barrier since", verb, 2 * i, s.read.thread);
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

void touch(const void* where, const void* pointer, size_t bytes, Access access) {
  if (!(++M->ticks & 0xfffff)) check_time(where);
  const uintptr_t address = (uintptr_t)pointer, shared = (uintptr_t)M->shared;
  const char* verb = access == READS ? "read" : "write";
  if (address - (uintptr_t)M->stacks < STACK * M->num_threads) return;
  if ((bytes & (bytes - 1)) == 0 && address % std::min(bytes, size_t(16))) fail_at(where, nullptr, "misaligned %s of %zu bytes", verb, bytes);
  const bool is_shared = address - shared < MOST_SHARED;
  if (M->launch.record_traffic) record(where, address, (unsigned)bytes, is_shared);
  if (is_shared) {
    if (address + bytes > shared + M->launch.shared_bytes) fail_at(where, nullptr, "%s of %zu bytes past the %u bytes of shared memory", verb, bytes, M->launch.shared_bytes);
    touch_shared(where, address - shared, bytes, access);
    return;
  }
  for (u64 i = 0; i < M->launch.num_extents; i++)
    if (address >= M->launch.extents[i].begin && address + bytes <= M->launch.extents[i].end) return;
  if (access == READS && address >= (uintptr_t)__ehdr_start && address + bytes <= (uintptr_t)_end) return;   // a table of the kernel's own
  fail_at(where, nullptr, "%s of %zu bytes that belong to none of its tensors", verb, bytes);
}

void set_copying(const unsigned char* shared, int thread) {
  for (int i = 0; i < 8; i++) M->shadow[(shared - M->shared) / 2 + i].copying = thread;
}

void finish_copy(const Lane& lane, const Copy& copy) {
  if (EMU_CHECKED) {
    set_copying(copy.shared, NOBODY);
    touch_shared(lane.where, copy.shared - M->shared, 16, WRITES);
  }
  if (copy.filled) memcpy(copy.shared, copy.global, 16);
  else memset(copy.shared, 0, 16);
}
}  // namespace
}  // namespace emu
