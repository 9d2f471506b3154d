// Sums of a whole list in two launches: a partial a block, then one block that adds them and does the scalar work.
//
//   partial[k * n + b] = sum k of block b;  finish(sums): noise scale, norm, drift, accept test, weight of a sample
//
// Layout: partials in a workspace of float64, one row a sum. Within a block sums are what the threads have (float32
// pairs, core/sums.h; float64 for float64 tensors), and one warp for each adds what the block's threads leave.
// Invariant: the order of every addition is fixed by the list and its alignment, so the bits are the same on each run
// and on every GPU: no atomics, and no block waits for another.
#pragma once

#include "../core/sums.h"
#include "../core/tilt.h"
#include "device.cuh"

namespace tsam {
namespace cuda {

constexpr int kFinishThreads = 512;

TSAM_DEVICE double from_below(double x, int lanes) { return __shfl_down_sync(0xFFFFFFFFu, x, lanes); }
TSAM_DEVICE PairSum from_below(const PairSum& x, int lanes) {
  return PairSum{__shfl_down_sync(0xFFFFFFFFu, x.high, lanes), __shfl_down_sync(0xFFFFFFFFu, x.low, lanes)};
}
TSAM_DEVICE WideSum from_below(const WideSum& x, int lanes) { return WideSum{from_below(x.sum, lanes)}; }

// The sum of x over the block, in every thread. All threads have to come here, in whole warps.
template <int kBlock>
TSAM_DEVICE double block_sum(double x) {
  constexpr int kWarps = kBlock / 32;
  TSAM_SHARED(double, warp, kWarps);
  TSAM_UNROLL
  for (int half = 16; half > 0; half /= 2) x += from_below(x, half);
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x < 32) {
    x = threadIdx.x < kWarps ? warp[threadIdx.x] : 0.0;
    TSAM_UNROLL
    for (int half = kWarps / 2; half > 0; half /= 2) x += from_below(x, half);
    if (threadIdx.x == 0) warp[0] = x;
  }
  __syncthreads();
  const double sum = warp[0];
  // Nobody may write the next sum before everybody has read this one.
  __syncthreads();
  return sum;
}

// Sum k of the block in the first thread of warp k; in the others a part of it. Once in a kernel.
template <int kBlock, int K, typename Sum>
TSAM_DEVICE Sum block_sums(const Sum (&sums)[K]) {
  constexpr int kLeft = kBlock / 2;  // a warp's upper half goes into its lower one without memory
  static_assert(K <= kBlock / 32, "a warp for each sum");
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  TSAM_SHARED(Sum, left, K * kLeft);
  TSAM_UNROLL
  for (int k = 0; k < K; ++k) {
    Sum sum = sums[k];
    sum.merge(from_below(sum, 16));
    if (lane < 16) left[k * kLeft + warp * 16 + lane] = sum;
  }
  __syncthreads();
  Sum total{};
  if (warp < K) {
    TSAM_UNROLL
    for (int i = 0; i < kLeft; i += 32) total.merge(left[warp * kLeft + i + lane]);
    TSAM_UNROLL
    for (int half = 16; half > 0; half /= 2) total.merge(from_below(total, half));
  }
  return total;
}

// The same of what float32 pairs could not hold: mostly nothing, which costs a vote.
template <int kBlock, int K>
TSAM_DEVICE double block_rests(const double (&rests)[K]) {
  constexpr int kWarps = kBlock / 32;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  TSAM_SHARED(double, left, K* kWarps);
  const auto sum_of = [](double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (__ballot_sync(0xFFFFFFFFu, bits != 0) == 0) return 0.0;
    for (int half = 16; half > 0; half /= 2) x += from_below(x, half);
    return x;
  };
  TSAM_UNROLL
  for (int k = 0; k < K; ++k) {
    const double sum = sum_of(rests[k]);
    if (lane == 0) left[k * kWarps + warp] = sum;
  }
  __syncthreads();
  return warp < K ? sum_of(lane < kWarps ? left[warp * kWarps + lane] : 0.0) : 0.0;
}

// scale(k) times sum k of the block to row k of the partials.
template <int kBlock, int K, typename Sum, typename Scale>
TSAM_DEVICE void store_sums(const Sum (&sums)[K], double* partial, int64_t n, const Scale& scale) {
  const int k = static_cast<int>(threadIdx.x / 32);
  const double sum = block_sums<kBlock>(sums).value();
  if (threadIdx.x % 32 == 0 && k < K) partial[k * n + blockIdx.x] = scale(k) * sum;
}

template <int kBlock, int K, typename Scale>
TSAM_DEVICE void store_sums(const RangedSum (&sums)[K], double* partial, int64_t n, const Scale& scale) {
  const int k = static_cast<int>(threadIdx.x / 32);
  PairSum pairs[K];
  double rests[K];
  TSAM_UNROLL
  for (int i = 0; i < K; ++i) {
    pairs[i] = sums[i].pair;
    rests[i] = sums[i].rest;
  }
  const PairSum pair = block_sums<kBlock>(pairs);
  const double rest = block_rests<kBlock>(rests);
  if (threadIdx.x % 32 == 0 && k < K) partial[k * n + blockIdx.x] = scale(k) * (pair.value() + rest);
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
