// Small kernels that each do one thing they must not, or count something; test_emulator.py runs them. 64 threads, one block.
#include "device.cuh"

#define SIN(name) SKV_KERNEL(name)(float* x, const int* index, i64 n)
#define HERE const int i = threadIdx.x; SKV_SHARED(raw); float* s = reinterpret_cast<float*>(raw); (void)i, (void)s, (void)n, (void)x, (void)index

SIN(race) { HERE; s[i] = x[i]; x[i] = s[i ^ 1]; }                                          // read after write
SIN(race_across_warps) { HERE; s[i] = x[i]; sync_warp(); x[i] = s[i ^ 32]; }
SIN(write_after_read) { HERE; s[i] = x[i]; sync_block(); x[i] = s[i ^ 1]; s[i] = 0.f; }
SIN(write_after_own_and_another_read) { HERE; if (i == 0) s[0] = 1.f; sync_block(); x[i] = s[0]; if (i == 0) s[0] = 2.f; }
SIN(two_writers) { HERE; s[0] = (float)i; }
SIN(shuffle_is_no_barrier) { HERE; s[i] = x[i]; shfl_xor(i, 1); x[i] = s[i ^ 1]; }
SIN(ordered) {                                                                              // nothing wrong
  HERE;
  s[i] = x[i];
  sync_warp();
  const float pair = s[i ^ 1];
  sync_block();
  s[i] = pair;
  sync_block();
  x[i] = s[i ^ 32];
}
SIN(reused_too_early) { HERE; s[i] = x[i]; sync_warp(); const float pair = s[i ^ 1]; s[i] = pair; sync_warp(); x[i] = s[i ^ 1]; }

SIN(in_flight) { HERE; cp_async16(s + 4 * i, x, true); cp_async_commit(); x[i] = s[4 * i]; cp_async_wait<0>(); }
SIN(waits_for_too_few) {
  HERE;
  cp_async16(s + 4 * i, x, true);
  cp_async_commit();
  cp_async_wait<1>();
  x[i] = s[4 * i];
  cp_async_wait<0>();
}
SIN(copy_without_barrier) { HERE; cp_async16(s + 4 * i, x, true); cp_async_commit(); cp_async_wait<0>(); x[i] = s[4 * (i ^ 1)]; }
SIN(overwrites_a_copy) { HERE; cp_async16(s + 4 * i, x, true); cp_async_commit(); s[4 * i] = 0.f; cp_async_wait<0>(); }
SIN(adds_to_a_copy) { HERE; cp_async16(s + 4 * i, x, true); cp_async_commit(); atomic_add(reinterpret_cast<u64*>(s + 4 * i), 1); cp_async_wait<0>(); }
SIN(ends_in_flight) { HERE; cp_async16(s + 4 * i, x, true); cp_async_commit(); }
SIN(copies) {                                                                               // nothing wrong
  HERE;
  cp_async16(s + 4 * i, x + 4 * (i & 15), i < 32);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  x[i] = s[4 * (63 - i)];
}

SIN(reads_past_the_end) { HERE; s[i] = x[i + 1]; }
SIN(writes_past_the_end) { HERE; x[i + 1] = 0.f; }
SIN(index_out_of_range) { HERE; x[i] = x[index[i]]; }
SIN(copies_past_the_end) { HERE; cp_async16(s + 4 * i, x + 4 * i, true); cp_async_commit(); cp_async_wait<0>(); }
SIN(past_shared_memory) { HERE; s[i + 1000] = 0.f; }
SIN(null_pointer) { HERE; x[i] = reinterpret_cast<const float*>(index)[n]; }
SIN(misaligned) { HERE; x[i] = (float)*reinterpret_cast<const i64*>(x + 1); }
SIN(misaligned_16) { HERE; store16(x, load16(x + 1)); }
SIN(misaligned_copy) { HERE; cp_async16(s + 4 * i, x + 1, true); }
SIN(misaligned_matrix) { HERE; u32 r[4]; ldmatrix_x4(r, s + 1); }
SIN(single_byte) { HERE; raw[i] = 1; }

SIN(divergent_barrier) { HERE; if (i < 32) sync_block(); }
SIN(divergent_within_a_warp) { HERE; if (i & 1) sync_block(); else sync_warp(); }
SIN(divergent_collective) { HERE; if (i & 1) x[i] = shfl_xor(x[i], 2); }
SIN(unlike_collectives) { HERE; if (i & 1) x[i] = shfl_xor(x[i], 2); else x[i] = shfl(x[i], 0); }
SIN(barrier_after_exit) { HERE; if (i == 5) return; sync_block(); }
SIN(endless) { HERE; while (n) sync_warp(); }
SIN(endless_reading) { HERE; while (*const_cast<const volatile int*>(index + i) >= 0) {} }
SIN(divides_by_zero) { HERE; x[i] = (float)((int)n / index[i]); }
SIN(overflows_its_stack) { HERE; volatile float large[20000]; for (int k = 0; k < 20000; k += 16) large[k] = x[i]; x[i] = large[0]; }

SIN(rows_in_one_bank) { HERE; u32 r[4]; s[i] = 0.f; sync_block(); ldmatrix_x4(r, raw + i % 32 * 128); x[i] = float_of(r[0]); }
SIN(rows_in_all_banks) { HERE; u32 r[4]; s[i] = 0.f; sync_block(); ldmatrix_x4(r, raw + i % 32 * 16); x[i] = float_of(r[0]); }
SIN(strided_store) { HERE; s[i * 8] = 1.f; }
SIN(strided_load) { HERE; s[i] = x[i * 8]; }

#define EXPORT_ALL(_) _(race) _(race_across_warps) _(write_after_read) _(write_after_own_and_another_read) _(two_writers) \
  _(shuffle_is_no_barrier) _(ordered) _(reused_too_early) _(in_flight) _(waits_for_too_few) _(copy_without_barrier) \
  _(overwrites_a_copy) _(adds_to_a_copy) _(ends_in_flight) _(copies) _(reads_past_the_end) _(writes_past_the_end) _(index_out_of_range) \
  _(copies_past_the_end) _(past_shared_memory) _(null_pointer) _(misaligned) _(misaligned_16) _(misaligned_copy) \
  _(misaligned_matrix) _(single_byte) _(divergent_barrier) _(divergent_within_a_warp) _(divergent_collective) \
  _(unlike_collectives) _(barrier_after_exit) _(endless) _(endless_reading) _(divides_by_zero) _(overflows_its_stack) \
  _(rows_in_one_bank) _(rows_in_all_banks) _(strided_store) _(strided_load)
EXPORT_ALL(SKV_EXPORT)

// What the device layer computes, one function each.
SKV_KERNEL(numbers)(const float* x, float* out, i64 n) {
  const i64 i = threadIdx.x + (i64)blockIdx.x * blockDim.x;
  if (i >= n) return;
  out[i] = to_f32(to<bf16>(x[i]));
  out[n + i] = to_f32(to<f16>(x[i]));
  out[2 * n + i] = to_f32(to<e4m3>(x[i]));
  out[3 * n + i] = to_f32(to<i8>(x[i]));
  out[4 * n + i] = tanh_(x[i]);
  out[5 * n + i] = unpack<f16>(pack<f16>(1.f, x[i])).y;
  out[6 * n + i] = unpack<bf16>(pack<bf16>(x[i], 1.f)).x;
}
SKV_EXPORT(numbers)

// All 256 codes of a byte, in pairs (low, high), as e4m3 and as i8.
SKV_KERNEL(codes)(float* out) {
  const int i = threadIdx.x;
  const u32 pair = (u32)i | (u32)(255 - i) << 8;
  const f32x2 a = unpack<f16>(e4m3x2_to_f16x2(pair)), b = unpack<f16>(i8x2_to_f16x2(pair));
  out[i] = a.x, out[256 + i] = a.y, out[512 + i] = b.x, out[768 + i] = b.y;
}
SKV_EXPORT(codes)

// d = c + a b by one warp: a [16, 16], b [8, 16] (the columns), c and d [16, 8]; operands by ldmatrix.
template <class T> SKV_DEV void product(const T* a, const T* b, const float* c, float* d) {
  SKV_SHARED(raw);
  T* s = reinterpret_cast<T*>(raw);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4 * 2;
  for (int i = lane; i < 256; i += 32) s[i] = a[i];
  for (int i = lane; i < 128; i += 32) s[256 + i] = b[i];
  sync_warp();
  u32 left[4], right[4];
  ldmatrix_x4(left, s + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_x4(right, s + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float sum[4] = {c[g * 8 + t], c[g * 8 + t + 1], c[(g + 8) * 8 + t], c[(g + 8) * 8 + t + 1]};
  mma_m16n8k16<T>(sum, left, right[0], right[1]);
  d[g * 8 + t] = sum[0], d[g * 8 + t + 1] = sum[1], d[(g + 8) * 8 + t] = sum[2], d[(g + 8) * 8 + t + 1] = sum[3];
}
SKV_KERNEL(product_bf16)(const bf16* a, const bf16* b, const float* c, float* d) { product(a, b, c, d); }
SKV_KERNEL(product_f16)(const f16* a, const f16* b, const float* c, float* d) { product(a, b, c, d); }
SKV_EXPORT(product_bf16) SKV_EXPORT(product_f16)

// An 8 x 8 matrix as ldmatrix gives it, transposed: lane's pair is (row t, column g), (row t + 1, column g).
SKV_KERNEL(transposed)(const f16* x, u32* out) {
  SKV_SHARED(raw);
  f16* s = reinterpret_cast<f16*>(raw);
  for (int i = threadIdx.x; i < 256; i += 32) s[i] = x[i];
  sync_warp();
  u32 r[4];
  ldmatrix_x4_trans(r, s + threadIdx.x * 8);
  for (int i = 0; i < 4; i++) out[i * 32 + threadIdx.x] = r[i];
}
SKV_EXPORT(transposed)

// In which order threads come, as a schedule decides.
SKV_KERNEL(order)(int* out, i64, double) {
  SKV_SHARED(raw);
  int* count = reinterpret_cast<int*>(raw);
  if (threadIdx.x == 0) *count = 0;
  sync_block();
  out[(*count)++] = threadIdx.x;
}
SKV_EXPORT(order)
