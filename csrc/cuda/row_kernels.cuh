// tilted_reduce: the weights of the losses, and the mean of rows by them, its rows and columns spread over blocks.
//
//   out_i = sum_j w_j v_ji;  thread (x, y) of a block: columns x, rows y, y + slices, ...; a block: a tile of each
//
// Layout: `across` threads lie beside each other over a tile's columns, four lanes each; the others take other rows,
// and what they have is joined in a tree. Where columns alone make too few blocks, tiles of rows are blocks of their
// own: each leaves a partial of float64 per column, and the same kernel adds those up, with weights of 1. Invariant:
// who adds what, in which order, follows from the numbers of rows and columns alone, on every GPU.
#pragma once

#include "../core/strided.h"
#include "../core/weights.h"
#include "apply.cuh"
#include "reduce.cuh"

namespace tsam {
namespace cuda {

// Columns a thread, where words can be read; elsewhere one.
template <typename T>
constexpr int kColumnLanes = sizeof(T) == 8 ? 2 : 4;
// Rows that a thread reads at once, as many as its registers hold. Of words that is 32 bytes of float32: 4 MB on 128
// SMs of 1,024 threads.
template <int lanes>
constexpr int kDeepRows = lanes == 1 ? 4 : 2;
// Rows that a thread takes at least before those of a column are shared. So a tile of rows has 256 or more, beside
// which its partials are few words.
constexpr int kLeastRows = 8;
constexpr int kLeastAcross = 8;         // 128 bytes of float32 side by side
constexpr int64_t kEnoughBlocks = 512;  // four on each of the 128 SMs of a large GPU

// A vector of numbers of any type, as float64.
struct Numbers64 {
  char* data;
  DType dtype;
  int64_t bytes;  // of one number

  TSAM_DEVICE double operator[](int64_t j) const { return scalar_value(Scalar{data + j * bytes, dtype}); }
  TSAM_DEVICE void store(int64_t j, double value) const { store_number(value, dtype, data + j * bytes); }
};

struct EvenShares {
  double share;

  TSAM_DEVICE double operator[](int64_t) const { return share; }
};

// `weights` in float64, rounded to `out` and as pairs in float32 where these have memory.
__global__ void TSAM_LAUNCH_BOUNDS(kFinishThreads)
    tilted_weights_of(Numbers64 losses, int64_t s, double tilt, double* weights, PairSum* pairs, Numbers64 out) {
  const ByBlock terms;
  tilted_softmax(losses, EvenShares{1.0 / static_cast<double>(s)}, s, tilt, weights, terms);
  terms.each(s, [&](int64_t j) {
    if (out.data != nullptr) out.store(j, weights[j]);
    if (pairs != nullptr) pairs[j] = weight_pair(weights[j]);
  });
}

// The rows of a weighted mean, and how they are spread. torch knows no more than 64 dimensions.
struct Rows {
  static constexpr int kDims = 64;
  int64_t row, rows, n;
  bool dense;  // elements of a row lie side by side, in the order of the result
  int64_t num_dims;
  StridedDim dims[kDims];
  int across;           // threads, a power of 2
  int64_t tiles, tile;  // of columns; rows in a tile of them
};

// Sum k of the threads that share a column, in the first of them.
template <typename Sum, int W>
TSAM_DEVICE void join_slices(Sum (&sums)[W], int across) {
  constexpr int kHalf = kThreads / 2;
  TSAM_SHARED(Sum, left, W * kHalf);
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = kHalf; half >= across; half /= 2) {
    if (thread >= half && thread < 2 * half)
      for (int k = 0; k < W; ++k) left[k * kHalf + thread - half] = sums[k];
    __syncthreads();
    if (thread < half)
      for (int k = 0; k < W; ++k) sums[k].merge(left[k * kHalf + thread]);
    __syncthreads();
  }
}

TSAM_DEVICE bool any_in_block(bool x) {
  constexpr int kWarps = kThreads / 32;
  TSAM_SHARED(uint32_t, votes, kWarps);
  const uint32_t vote = __ballot_sync(0xFFFFFFFFu, x);
  if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = vote;
  __syncthreads();
  uint32_t all = 0;
  for (int k = 0; k < kWarps; ++k) all |= votes[k];
  return all != 0;
}

// To `out`, or, where that is null, to the partials. W > 1: all lanes in words, none beyond the end. Words: read rows,
// write 1; of partials 2 written and 2 read for each tile of rows.
template <typename T, typename Out, int W>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads, 4)
    weighted_sum(TSAM_PARAMETER(Rows) rows, const T* values, const double* weights, const PairSum* pairs,
                 double* partial, Out* out) {
  using C = compute_t<T>;
  using Lanes = std::conditional_t<W == 1, Some, Whole<W>>;
  constexpr int kDeep = kDeepRows<W>;
  constexpr bool in_pairs = sizeof(C) == sizeof(float);
  const int across = rows.across, slices = kThreads / across;
  const int x = static_cast<int>(threadIdx.x) % across, y = static_cast<int>(threadIdx.x) / across;
  const int64_t block = blockIdx.x, of_rows = block / rows.tiles, column = (block % rows.tiles * across + x) * W;
  const int64_t begin = of_rows * rows.tile, end = begin + rows.tile < rows.rows ? begin + rows.tile : rows.rows;
  const bool inside = column < rows.n;
  [[maybe_unused]] const double one = 1.0;
  RowMeans<C, W> means = {};
  if (inside) {
    values += rows.dense ? column : strided_offset(rows.dims, rows.num_dims, column);
    Lanes lanes;
    if constexpr (W == 1) lanes = Some{0, 1};
    TSAM_ROLLED
    for (int64_t j = begin + y; j < end; j += kDeep * slices) {
      C v[kDeep][W];
      TSAM_UNROLL
      for (int d = 0; d < kDeep; ++d)
        if (j + d * slices < end) load(values + (j + d * slices) * rows.row, lanes, v[d]);
      TSAM_UNROLL
      for (int d = 0; d < kDeep; ++d) {
        const int64_t i = j + d * slices;
        if (i >= end) break;
        if constexpr (in_pairs) {
          means.add(pairs[i], weights[i], v[d]);
        } else {
          means.add(PairSum{}, weights != nullptr ? weights[i] : one, v[d]);
        }
      }
    }
  }
  if (slices > 1) {
    join_slices(means.near, across);
    if constexpr (in_pairs) {
      means.wide = any_in_block(means.wide);
      if (means.wide) join_slices(means.rest, across);
    }
  }
  if (y > 0 || !inside) return;
  if (out == nullptr) {
    for (int k = 0; k < W; ++k) partial[of_rows * rows.n + column + k] = means.value(k);
    return;
  }
  compute_t<Out> mean[W];
  for (int k = 0; k < W; ++k) mean[k] = static_cast<compute_t<Out>>(means.mean(k));
  Lanes lanes;
  if constexpr (W == 1) lanes = Some{0, 1};
  store(mean, lanes, out + column);
}

}  // namespace cuda
}  // namespace tsam
