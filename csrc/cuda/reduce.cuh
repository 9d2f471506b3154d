// Sums of a whole list in two launches: a partial a block, then one block that adds them and does the scalar work.
//
//   partial[k * n + b] = sum k of block b;  finish(sums): noise scale, norm, drift, accept test, weight of a sample
//
// Layout: partials in a workspace of float64, one row a sum. Invariant: the order of every addition is fixed by the
// list alone, so the bits are the same on each run and on every GPU: no atomics, and no block waits for another.
#pragma once

#include "../core/tilt.h"
#include "device.cuh"

namespace tsam {
namespace cuda {

constexpr int kFinishThreads = 512;

// The sum of x over the block, in every thread. All threads have to come here, in whole warps.
template <int kBlock>
TSAM_DEVICE double block_sum(double x) {
  constexpr int kWarps = kBlock / 32;
  TSAM_SHARED(double, warp, kWarps);
  TSAM_UNROLL
  for (int half = 16; half > 0; half /= 2) x += __shfl_down_sync(0xFFFFFFFFu, x, half);
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = warp[0];
  TSAM_UNROLL
  for (int w = 1; w < kWarps; ++w) sum += warp[w];
  // Nobody may write the next sum before everybody has read this one.
  __syncthreads();
  return sum;
}

// Sum k of the block to row k of the partials.
template <int kBlock, int K>
TSAM_DEVICE void store_sums(const double (&sums)[K], double* partial, int64_t n) {
  for (int k = 0; k < K; ++k) {
    const double sum = block_sum<kBlock>(sums[k]);
    if (threadIdx.x == 0) partial[k * n + blockIdx.x] = sum;
  }
}

// The terms of core/weights.h by the finishing block: every thread gets the same result, and term j is always the same
// thread's.
struct ByBlock {
  template <typename Term>
  TSAM_DEVICE double sum(int64_t n, const Term& term) const {
    double x = 0.0;
    for (int64_t j = threadIdx.x; j < n; j += kFinishThreads) x += term(j);
    return block_sum<kFinishThreads>(x);
  }

  template <typename Value, typename Combine>
  TSAM_DEVICE double fold(int64_t n, const Value& value, const Combine& combine) const {
    TSAM_SHARED(double, found, kFinishThreads);
    double x = value(0);
    for (int64_t j = threadIdx.x; j < n; j += kFinishThreads) x = combine(x, value(j));
    found[threadIdx.x] = x;
    for (unsigned half = kFinishThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) found[threadIdx.x] = combine(found[threadIdx.x], found[threadIdx.x + half]);
    }
    __syncthreads();
    const double result = found[0];
    __syncthreads();
    return result;
  }

  template <typename Body>
  TSAM_DEVICE void each(int64_t n, const Body& body) const {
    for (int64_t j = threadIdx.x; j < n; j += kFinishThreads) body(j);
  }
};

// The second launch. K = 0: scalar work alone.
template <int K, typename Finish>
__global__ void TSAM_LAUNCH_BOUNDS(kFinishThreads) finish_sums(const double* partial, int64_t n, Finish finish) {
  double sums[K > 0 ? K : 1] = {};
  for (int k = 0; k < K; ++k) {
    double x = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += kFinishThreads) x += partial[k * n + i];
    sums[k] = block_sum<kFinishThreads>(x);
  }
  if (threadIdx.x == 0) finish(sums);
}

// Instead of what follows from the sums, where other devices have a part in them.
template <int K>
struct LeaveSums {
  double* totals;
  TSAM_DEVICE void operator()(const double* sums) const {
    for (int k = 0; k < K; ++k) totals[k] = sums[k];
  }
};

// Onto what is there.
template <int K>
struct AddSums {
  double* totals;
  TSAM_DEVICE void operator()(const double* sums) const {
    for (int k = 0; k < K; ++k) totals[k] += sums[k];
  }
};

// A pass of the op has ended that saved theta_0.
struct CountSave {
  double* state;
  TSAM_DEVICE void operator()(const double*) const { state[kSaves] += 1.0; }
};

}  // namespace cuda
}  // namespace tsam
