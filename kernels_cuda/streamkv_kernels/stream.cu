// Reads memory and does nothing with it: the ceiling that kernels are measured against (benchmarks.gpu).
//
// Each block reads pieces of piece_bytes, a multiple of 16, in the order of a list: pieces of one block of the KV pool, in a row or
// shuffled, cost what the pool's layout costs in address translation. Every thread leaves the exclusive or of what it has read.
#include "device.cuh"

SKV_KERNEL(read_pieces)(const unsigned char* __restrict__ from, const i64* __restrict__ order, int* __restrict__ out, i64 pieces,
                        i64 piece_bytes) {
  u32 all = 0;
  for (i64 piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const unsigned char* here = from + order[piece] * piece_bytes;
#pragma unroll 8
    for (i64 i = threadIdx.x * 16; i < piece_bytes; i += blockDim.x * 16) {
      const u32x4 words = load16(here + i);
      all ^= words.word[0] ^ words.word[1] ^ words.word[2] ^ words.word[3];
    }
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = (int)all;
}

SKV_EXPORT(read_pieces)
