// How the CUDA correlation is cut into blocks, and its scalar maths; for host and device, to be tested without a GPU.
#pragma once

#include "../common/attention_tiles.h"

namespace lpmflow {

// Work of a block of the summing kernel: a tile of corr[batch] from (row, column) on. Tiles begin behind the prefix, so
// a power-of-two grid with a cls token is cut without a remainder: query is row + prefix, key is column + prefix.
struct SumWork {
  int64_t batch, row, column;
};

LPMFLOW_HOST_DEVICE int64_t sum_blocks(int64_t batch, int64_t corr_rows, int64_t corr_columns, int rows, int keys) {
  return batch * ceil_div(corr_rows, rows) * ceil_div(corr_columns, keys);
}
LPMFLOW_HOST_DEVICE SumWork sum_work(int64_t block, int64_t corr_rows, int64_t corr_columns, int rows, int keys) {
  const int64_t across = ceil_div(corr_columns, keys), down = ceil_div(corr_rows, rows);
  return {block / (across * down), block / across % down * rows, block % across * keys};
}

// A logit from q . k. The product is rounded by itself: contracted with the subtraction that follows, it would differ
// from the maximum it is compared with by the rounding of that maximum, which for logits of 10^4 is 10^-3.
LPMFLOW_HOST_DEVICE float logit(float dot, float scale) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(dot, scale);
#else
  return dot * scale;
#endif
}

// Of the first kernel: log of the sum of e^x.
LPMFLOW_HOST_DEVICE float log_sum_exp(float max, float sum) { return max + logf(sum); }

// x - lse is formed before anything is multiplied by log2(e): where one logit outweighs the rest, lse is that logit and
// its probability exactly 1 however large it is.
LPMFLOW_HOST_DEVICE float probability_exponent(float x, float lse) { return x - lse; }

}  // namespace lpmflow
