// What tokens weigh, for tests: the whole definition of sampling can then be followed in Python's integers.
#include "logits.cuh"

SKV_KERNEL(weights)(const float* below, i64 count, i64* weights) {
  for (i64 i = threadIdx.x; i < count; i += blockDim.x) weights[i] = (i64)weight_of(below[i]);
}
SKV_EXPORT(weights)
