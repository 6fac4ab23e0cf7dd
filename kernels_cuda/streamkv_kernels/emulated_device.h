// The functions of the device layer on a processor. Each says what PTX's manual says of its instruction; emulator.h does the rest.
#pragma once
#include "emulator.h"

namespace emu {
namespace {
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
template <bool TRANSPOSED> EMU_FN void load_matrices(const char* op, const void* where, u32 (&result)[4], const void* row) {
  struct Operands { u32* result; const u16* row; } mine{result, static_cast<const u16*>(row)};
  Inside inside(op, where);
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
        of(lane)->result[matrix] = TRANSPOSED ? at(b, a) | at(b + 1, a) << 16 : at(a, b) | at(a, b + 1) << 16;
      }
    }
  });
}
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
SKV_DEV int opaque(int x) { return x; }
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

SKV_DEV float add_rn(float a, float b) { return a + b; }
SKV_DEV float mul_rn(float a, float b) { return a * b; }
SKV_DEV float div_rn(float a, float b) { return a / b; }
SKV_DEV float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
EMU_FN void atomic_add(u64* pointer, u64 value) {
  EMU_ENTER("atomic_add");
  if ((uintptr_t)pointer % sizeof value) emu::fail_at(where, nullptr, "misaligned atomic_add");
  if (EMU_CHECKED) emu::touch_atomically(where, pointer, sizeof value);
  *pointer += value;
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
  if (((uintptr_t)shared | (uintptr_t)global) % 16) emu::fail_at(where, nullptr, "misaligned address of cp_async16");
  if ((uintptr_t)target - (uintptr_t)m.shared + 16 > m.launch.shared_bytes) emu::fail_at(where, nullptr, "cp_async16 writes outside of the %u bytes of shared memory", m.launch.shared_bytes);
  m.counters.copies++;
  if (EMU_CHECKED && pred) emu::touch(static_cast<const char*>(where) + 1, global, 16, false);   // a place of its own in the record
  if (EMU_CHECKED) emu::touch(where, target, 16, true);
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
  if ((uintptr_t)pointer % 16) emu::fail_at(where, nullptr, "misaligned read of 16 bytes");
  if (EMU_CHECKED) emu::touch(where, pointer, 16, false);
  return *static_cast<const u32x4*>(pointer);
}
EMU_FN void store16(void* pointer, u32x4 value) {
  EMU_ENTER("store16");
  if ((uintptr_t)pointer % 16) emu::fail_at(where, nullptr, "misaligned write of 16 bytes");
  if (EMU_CHECKED) emu::touch(where, pointer, 16, true);
  *static_cast<u32x4*>(pointer) = value;
}
