// Blocks of the KV pool as bytes: copied within it, gathered from it, scattered into it, filled.
//
//   layout   piece p of block b begins at base + b · block_stride + p · piece_stride, in bytes, and is `piece_bytes` long. Block
//            first: one piece, the whole block. Layer first: a piece a layer. All a multiple of 16.
//   ids      of blocks, on either side; null = 0, 1, 2 ..., which is how gathering and scattering name the contiguous side
//   order    none between blocks: no destination of a launch may be a source of the same launch (`BlockMover.copy` sees to it)
//   launch   blockIdx.x a piece of a block, blockIdx.y CHUNK bytes of it
//
// compile-time: CHUNK, bytes that a thread block moves
#include "device.cuh"

SKV_DEV i64 first_byte(const i64* ids, i64 index, i64 piece, i64 block_stride, i64 piece_stride) {
  return (ids ? ids[index] : index) * block_stride + piece * piece_stride;
}

SKV_KERNEL(copy_blocks)(unsigned char* to, const i64* to_ids, i64 to_block_stride, i64 to_piece_stride,
                        const unsigned char* from, const i64* from_ids, i64 from_block_stride, i64 from_piece_stride,
                        i64 pieces, i64 piece_bytes) {
  const i64 index = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  to += first_byte(to_ids, index, piece, to_block_stride, to_piece_stride);
  from += first_byte(from_ids, index, piece, from_block_stride, from_piece_stride);
  const i64 begin = (i64)blockIdx.y * CHUNK, end = min(begin + CHUNK, piece_bytes);
#pragma unroll 4
  for (i64 i = begin + threadIdx.x * 16; i < end; i += blockDim.x * 16) store16(to + i, load16(from + i));
}

// `word`: four bytes, over and over.
SKV_KERNEL(fill_blocks)(unsigned char* to, const i64* ids, i64 block_stride, i64 piece_stride, i64 pieces, i64 piece_bytes,
                        i64 word) {
  to += first_byte(ids, blockIdx.x / pieces, blockIdx.x % pieces, block_stride, piece_stride);
  const i64 begin = (i64)blockIdx.y * CHUNK, end = min(begin + CHUNK, piece_bytes);
  const u32 w = (u32)word;
  for (i64 i = begin + threadIdx.x * 16; i < end; i += blockDim.x * 16) store16(to + i, u32x4{{w, w, w, w}});
}
SKV_EXPORT(copy_blocks)
SKV_EXPORT(fill_blocks)
