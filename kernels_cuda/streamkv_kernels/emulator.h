// The device layer on a processor: the names of device.cuh, so that g++ compiles a .cu as it is and the result runs without a GPU.
// Each function does what PTX's manual says of its instruction; emulator.cpp has the machine. Nothing heavy is included here:
// hundreds of kernels are compiled over this file, the machine once; math.h alone would take a third of the time of each.
#pragma once
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EMU_INLINE [[maybe_unused]] static inline __attribute__((always_inline))  // so that a return address lies in the kernel
#define SKV_DEV [[maybe_unused]] static inline
#define SKV_KERNEL(name) [[maybe_unused]] static void name
#define SKV_BOUNDED_KERNEL(name, threads, blocks) SKV_KERNEL(name)
#define SKV_SHARED(name) unsigned char* const name = emu::shared_memory()
#define NEG_INF (-__builtin_inff())

struct dim3 { unsigned x = 1, y = 1, z = 1; };
#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_size())
#define gridDim (emu::grid_size())

extern "C" {
float exp2f(float) noexcept;
float log2f(float) noexcept;
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
float nearbyintf(float) noexcept;
float ldexpf(float, int) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fmaf(float, float, float) noexcept;
}

namespace emu {
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* shared_memory();

void sync_block();
void sync_warp();
void shuffle(const char* op, void* value, int bytes, int from);
int lane_index();
void mma(bool is_bf16, float* d, const u32* a, u32 b0, u32 b1);
void ldmatrix(const char* op, u32* result, const void* row, bool transposed);
void copy(void* shared, const void* global, bool filled);
void commit_copies();
void wait_for_copies(int most);
void load16(void* to, const void* pointer);
void store16(void* pointer, const void* from);
void atomic_add(u64* pointer, u64 value);
void count_exponential();
float f16_value(u32 bits);

// ---------------------------------------------------------------- how Python launches a kernel

struct Launch;
int launch(const Launch* what, void (*entry)(void*), void* argument);

template <int... I> struct Numbers {};
template <class... A, int... I> __attribute__((no_sanitize_thread)) void call(void (*kernel)(A...), void** arguments, Numbers<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A> __attribute__((no_sanitize_thread)) void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, Numbers<__integer_pack(sizeof...(A))...>{});
}

// What a kernel takes: p<bytes> is a pointer to things of that size, l an integer, d a real number.
template <class T> struct Parameter {
  static_assert(same<T, i64> || same<T, double>, "a scalar parameter of a kernel is long long or double");
  static int describe(char* text) { return sprintf(text, same<T, i64> ? "l " : "d "); }
};
template <class T> struct Parameter<T*> {
  static int describe(char* text) { return sprintf(text, "p%zu ", sizeof(T)); }
};
template <class... A> const char* signature(void (*)(A...)) {
  static char text[8 * sizeof...(A) + 1];
  char* end = text;
  ((end += Parameter<A>::describe(end)), ...);
  return text;
}
}  // namespace emu

#define EMU_VISIBLE extern "C" __attribute__((visibility("default"), no_sanitize_thread))
#define SKV_EXPORT(name) \
  static void emu_enter_##name(void* arguments) { emu::call(name, static_cast<void**>(arguments)); } \
  EMU_VISIBLE int emu_##name(const emu::Launch* what, void** arguments) { return emu::launch(what, emu_enter_##name, arguments); } \
  EMU_VISIBLE const char* emu_signature_##name() { return emu::signature(name); }

// ---------------------------------------------------------------- the device layer

SKV_DEV int min(int a, int b) { return a < b ? a : b; }
SKV_DEV int max(int a, int b) { return a > b ? a : b; }
SKV_DEV i64 min(i64 a, i64 b) { return a < b ? a : b; }
SKV_DEV i64 max(i64 a, i64 b) { return a > b ? a : b; }
SKV_DEV int opaque(int x) { return x; }
EMU_INLINE u32 bits_of(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
EMU_INLINE float float_of(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }

EMU_INLINE void sync_block() { emu::sync_block(); }
EMU_INLINE void sync_warp() { emu::sync_warp(); }
template <class T> EMU_INLINE T shfl_xor(T value, int mask) {
  emu::shuffle("shfl_xor", &value, sizeof value, (emu::lane_index() ^ mask) & 31);
  return value;
}
template <class T> EMU_INLINE T shfl(T value, int lane) {
  emu::shuffle("shfl", &value, sizeof value, lane & 31);
  return value;
}

template <class T> EMU_INLINE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  static_assert(same<T, bf16> || same<T, f16>, "the multiplicands are bf16 or f16");
  emu::mma(same<T, bf16>, d, a, b0, b1);
}
EMU_INLINE void ldmatrix_x4(u32 (&r)[4], const void* row) { emu::ldmatrix("ldmatrix_x4", r, row, false); }
EMU_INLINE void ldmatrix_x4_trans(u32 (&r)[4], const void* row) { emu::ldmatrix("ldmatrix_x4_trans", r, row, true); }
EMU_INLINE void cp_async16(void* shared, const void* global, bool pred) { emu::copy(shared, global, pred); }
EMU_INLINE void cp_async_commit() { emu::commit_copies(); }
template <int N> EMU_INLINE void cp_async_wait() { emu::wait_for_copies(N); }

EMU_INLINE u32x4 load16(const void* pointer) {
  u32x4 value;
  emu::load16(&value, pointer);
  return value;
}
EMU_INLINE void store16(void* pointer, u32x4 value) { emu::store16(pointer, &value); }
EMU_INLINE void atomic_add(u64* pointer, u64 value) { emu::atomic_add(pointer, value); }

SKV_DEV float add_rn(float a, float b) { return a + b; }
SKV_DEV float mul_rn(float a, float b) { return a * b; }
SKV_DEV float div_rn(float a, float b) { return a / b; }
SKV_DEV float fma_rn(float a, float b, float c) { return fmaf(a, b, c); }
SKV_DEV float ex2(float x) { emu::count_exponential(); return exp2f(x); }
SKV_DEV float lg2(float x) { return log2f(x); }
SKV_DEV float rsqrt(float x) { return 1.f / sqrtf(x); }

SKV_DEV float to_f32(bf16 x) { return float_of((u32)x.bits << 16); }
SKV_DEV float to_f32(f16 x) { return emu::f16_value(x.bits); }
SKV_DEV u16 bf16_bits(float x) {
  const u32 bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
SKV_DEV u16 f16_bits(float x) {
  const u32 bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return (u16)(sign | 0x7c00u);   // 65520 and more
  if (magnitude < 0x38800000u) return (u16)(sign | (u32)nearbyintf(ldexpf(float_of(magnitude), 24)));   // below 2^-14
  return (u16)(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
}
SKV_DEV int round_to_int(float x) { return x != x ? 0 : (int)nearbyintf(x); }
template <class T> SKV_DEV u32 pack(float lo, float hi) {
  if constexpr (same<T, bf16>) return (u32)bf16_bits(lo) | (u32)bf16_bits(hi) << 16;
  else return (u32)f16_bits(lo) | (u32)f16_bits(hi) << 16;
}
SKV_DEV u32 byte_perm(u32 a, u32 b, u32 pick) {
  const u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) result |= (u32)(bytes >> 8 * (pick >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
SKV_DEV u32 f16x2_mul(u32 a, u32 b) { return pack<f16>(to_f32(f16{(u16)a}) * to_f32(f16{(u16)b}), to_f32(f16{(u16)(a >> 16)}) * to_f32(f16{(u16)(b >> 16)})); }
SKV_DEV u32 f16x2_fma(u32 a, u32 b, u32 c) { return pack<f16>(fmaf(to_f32(f16{(u16)a}), to_f32(f16{(u16)b}), to_f32(f16{(u16)c})), fmaf(to_f32(f16{(u16)(a >> 16)}), to_f32(f16{(u16)(b >> 16)}), to_f32(f16{(u16)(c >> 16)}))); }
SKV_DEV u32 f16x2_sub(u32 a, u32 b) { return pack<f16>(to_f32(f16{(u16)a}) - to_f32(f16{(u16)b}), to_f32(f16{(u16)(a >> 16)}) - to_f32(f16{(u16)(b >> 16)})); }
