// The kernels of the list ops: core functors over the chunks of a TensorTable. Words moved per float32 element stand
// beside each kernel; they are those of csrc/cpu/kernels.h.
//
// Layout: a kernel serves one storage type; scalars of the step (noise scale, norm, coefficients) are read from `state`
// in device memory, written there by a finish kernel earlier on the same stream.
// Invariant: an element's bits are those of the CPU back end; sums agree to rounding.
#pragma once

#include "../core/direction.h"
#include "../core/perturb.h"
#include "../core/weights.h"
#include "apply.cuh"
#include "reduce.cuh"

namespace tsam {
namespace cuda {

using TablePair = TensorTable<2>;
using TableTriple = TensorTable<3>;

// partial[b] = sum of z^2 over the chunk, z normal: signs need no norm. Words: 0.
template <typename Table>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    noise_sum_squares(TSAM_PARAMETER(Table) table, CountedStream counted, double* partial) {
  const Stream stream = stream_now(counted);
  const Chunk chunk = chunk_of(table);
  const uint64_t element = table.element[chunk.tensor] + static_cast<uint64_t>(chunk.offset);
  double sum = 0.0;
  for_lanes<4>(chunk.length, static_cast<int>(element % 4), true, [&](int i, auto lanes) {
    float z[4];
    normals<1>(stream, (element + static_cast<uint64_t>(static_cast<int64_t>(i))) / 4, z);
    TSAM_UNROLL
    for (int k = 0; k < 4; ++k)
      if (lanes[k]) sum = fma(static_cast<double>(z[k]), static_cast<double>(z[k]), sum);
  });
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Lists: position, saved. As the CPU's perturb (save: read 1, write 2; otherwise read 1, write 1). The scale is the
// state's noise scale times the tensor's.
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    perturb_chunks(TSAM_PARAMETER(TablePair) table, CountedStream counted, const double* state, bool negate, bool save,
                   CountedStream rounding) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const Chunk chunk = chunk_of(table);
  const uint64_t element = table.element[chunk.tensor] + static_cast<uint64_t>(chunk.offset);
  const Stream stream = stream_now(counted), words = kStochastic<T> ? stream_now(rounding) : Stream{};
  const double scale = state[kNoiseScale];
  const Perturb<C> functor{static_cast<C>((negate ? -scale : scale) * table.scale[chunk.tensor]),
                           table.adaptive[chunk.tensor]};
  T *const position = table.template at<T>(0, chunk), *const saved = table.template at<T>(1, chunk);
  const T* const from = save ? position : saved;
  for_lanes<W>(chunk.length, static_cast<int>(element % 4), aligned(position, saved), [&](int i, auto lanes) {
    float z[W];
    const uint64_t first = element + static_cast<uint64_t>(static_cast<int64_t>(i));
    normals_or_signs<W / 4>(stream, first, z);
    T raw[W];
    C origin[W], moved[W];
    load_raw(from + i, lanes, raw);
    if (save) store_raw(raw, lanes, saved + i);
    widen(raw, origin);
    functor(origin, z, moved);
    store_position(moved, lanes, words, first, position + i);
  });
}

// Lists: grads, origin. partial[b] = scale^2 sum of (D g)^2 over the chunk. Words: read 1 (2 adaptive).
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads) grad_sum_squares(TSAM_PARAMETER(TablePair) table, double* partial) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const Chunk chunk = chunk_of(table);
  const bool adaptive = table.adaptive[chunk.tensor];
  const T *const grad = table.template at<T>(0, chunk), *const origin = table.template at<T>(1, chunk);
  double sum = 0.0;
  for_lanes<W>(chunk.length, 0, aligned(grad, origin), [&](int i, auto lanes) {
    C x[W];
    load(grad + i, lanes, x);
    if (adaptive) {
      C d[W];
      load(origin + i, lanes, d);
      for (int k = 0; k < W; ++k) x[k] *= magnitude(d[k]);
    }
    for (int k = 0; k < W; ++k) sum = fma(static_cast<double>(x[k]), static_cast<double>(x[k]), sum);
  });
  sum = block_sum<kThreads>(sum);
  const double scale = table.scale[chunk.tensor];
  if (threadIdx.x == 0) partial[blockIdx.x] = scale * scale * sum;
}

// Lists: position, saved, grads. Words: read 2 (adaptive 3), write 1; save: read 2, write 2. The scale is the tensor's
// rho over the state's norm.
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    ascend_chunks(TSAM_PARAMETER(TableTriple) table, const double* state, bool save, CountedStream rounding) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const Chunk chunk = chunk_of(table);
  const bool adaptive = table.adaptive[chunk.tensor];
  const Ascend<C> functor{static_cast<C>(ascent_scale(table.scale[chunk.tensor], state[kGradNorm])), adaptive};
  T *const position = table.template at<T>(0, chunk), *const saved = table.template at<T>(1, chunk);
  const T* const grad = table.template at<T>(2, chunk);
  const uint64_t element = kStochastic<T> ? table.element[chunk.tensor] + static_cast<uint64_t>(chunk.offset) : 0;
  const Stream words = kStochastic<T> ? stream_now(rounding) : Stream{};
  for_lanes<W>(chunk.length, static_cast<int>(element % 4), aligned(position, saved, grad), [&](int i, auto lanes) {
    T raw[W];
    C x[W], d[W], g[W];
    load_raw(position + i, lanes, raw);
    widen(raw, x);
    load(grad + i, lanes, g);
    if (save) {
      store_raw(raw, lanes, saved + i);
      for (int k = 0; k < W; ++k) d[k] = x[k];
    } else if (adaptive) {
      load(saved + i, lanes, d);
    } else {
      for (int k = 0; k < W; ++k) d[k] = C(0);
    }
    functor(d, g, x);
    store_position(x, lanes, words, element + static_cast<uint64_t>(static_cast<int64_t>(i)), position + i);
  });
}

// Lists: position, saved, grads (read where there are any). Row k of the partials is sum k of the block, the last times
// the tensor's rho. Words: read 3 (2).
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    displacement_chunks(TSAM_PARAMETER(TableTriple) table, bool along, double* partial, int64_t n) {
  using C = compute_t<T>;
  constexpr int W = 16 / sizeof(C);  // the sums take the other registers
  const Chunk chunk = chunk_of(table);
  const bool adaptive = table.adaptive[chunk.tensor];
  const T *const position = table.template at<T>(0, chunk), *const saved = table.template at<T>(1, chunk);
  const T* const grad = along ? table.template at<T>(2, chunk) : position;
  double sums[3] = {};
  for_lanes<W>(chunk.length, 0, aligned(position, saved, grad), [&](int i, auto lanes) {
    C x[W], o[W], g[W];
    load(position + i, lanes, x);
    load(saved + i, lanes, o);
    if (along) {
      load(grad + i, lanes, g);
    } else {
      for (int k = 0; k < W; ++k) g[k] = C(0);
    }
    for (int k = 0; k < W; ++k) add_displacement(x[k], o[k], g[k], adaptive, sums[0], sums[1], sums[2]);
  });
  sums[2] *= table.scale[chunk.tensor];
  store_sums<kThreads>(sums, partial, n);
}

// Lists: accumulator (of the compute type), grads. Words: what state's action says: blend read 2, write 1; assign read
// 1, write 1; poison write 1; skip 0. An adopted accumulator holds the gradient of the first sample already: there is
// nothing to blend with it, and the device cannot refuse, so that such a mistake comes out as NaN.
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    accumulate_chunks(TSAM_PARAMETER(TablePair) table, const double* state, bool adopted) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const int asked = tilt_action(state);
  const int action = !adopted || asked == kPoison ? asked : asked == kBlend ? kPoison : kSkip;
  if (action == kSkip) return;
  const Chunk chunk = chunk_of(table);
  const Accumulate<C> functor{static_cast<C>(state[kKeep]), static_cast<C>(state[kAdd])};
  C* const accumulator = table.template at<C>(0, chunk);
  const T* const grad = table.template at<T>(1, chunk);
  for_lanes<W>(chunk.length, 0, aligned(accumulator, grad), [&](int i, auto lanes) {
    C x[W];
    if (action == kPoison) {
      for (int k = 0; k < W; ++k) x[k] = static_cast<C>(kNaN);
    } else if (action == kAssign) {
      load(grad + i, lanes, x);
    } else {
      C g[W];
      load(accumulator + i, lanes, x);
      load(grad + i, lanes, g);
      functor(g, x);
    }
    store(x, lanes, accumulator + i);
  });
}

// Lists: plain (of the compute type), tilted. Row k of the partials is sum k of the block. Words: read 2.
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    direction_sums(TSAM_PARAMETER(TablePair) table, double* partial, int64_t n) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const Chunk chunk = chunk_of(table);
  const C* const plain = table.template at<C>(0, chunk);
  const T* const tilted = table.template at<T>(1, chunk);
  double sums[kDirectionSums] = {};
  for_lanes<W>(chunk.length, 0, aligned(plain, tilted), [&](int i, auto lanes) {
    C g[W], a[W];
    load(plain + i, lanes, g);
    load(tilted + i, lanes, a);
    for (int k = 0; k < W; ++k)
      add_products(static_cast<double>(a[k]), static_cast<double>(g[k]), sums[kTiltedSquares], sums[kProduct],
                   sums[kPlainSquares]);
  });
  store_sums<kThreads>(sums, partial, n);
}

// Lists: what the direction is taken in or added to (of the compute type), A or the direction. Words: read 2, write 1;
// nothing to carry: write 1 or nothing.
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads) blend_direction(TSAM_PARAMETER(TablePair) table, const double* direction) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  if (writes_nothing(direction)) return;
  const bool zeros = writes_zeros(direction);
  const Chunk chunk = chunk_of(table);
  const Accumulate<C> functor{static_cast<C>(direction[kDirectionKeep]), static_cast<C>(direction[kDirectionAdd])};
  C* const blended = table.template at<C>(0, chunk);
  const T* const other = table.template at<T>(1, chunk);
  for_lanes<W>(chunk.length, 0, aligned(blended, other), [&](int i, auto lanes) {
    C x[W];
    if (zeros) {
      for (int k = 0; k < W; ++k) x[k] = C(0);
    } else {
      C g[W];
      load(blended + i, lanes, x);
      load(other + i, lanes, g);
      functor(g, x);
    }
    store(x, lanes, blended + i);
  });
}

// Lists: to, from. Bit for bit. Words: read 1, write 1.
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads) copy_chunks(TSAM_PARAMETER(TablePair) table) {
  constexpr int W = 16 / sizeof(T);
  const Chunk chunk = chunk_of(table);
  T* const to = table.template at<T>(0, chunk);
  const T* const from = table.template at<T>(1, chunk);
  for_lanes<W>(chunk.length, 0, aligned(to, from), [&](int i, auto lanes) {
    T raw[W];
    load_raw(from + i, lanes, raw);
    store_raw(raw, lanes, to + i);
  });
}

// What follows a sum, or needs none: the scalar state machines of the core, by one thread.

struct FinishNoise {
  double* state;
  Noise noise;
  int64_t dimension;
  CountedStream radius_stream;

  TSAM_DEVICE void operator()(const double* sums) const {
    state[kNoiseScale] = noise_scale(noise, dimension, sums[0], stream_now(radius_stream));
  }
};

struct FinishNorm {
  double* state;
  int64_t row;

  TSAM_DEVICE void operator()(const double* sums) const {
    state[kGradNorm] = state[kHeader + kRow * row + kRowGradNorm] = sqrt(sums[0]);
  }
};

// From the sums that a device has, or all of them: the coefficients of the pass that follows.
struct TakeDirection {
  double* direction;

  TSAM_DEVICE void operator()(const double* sums) const {
    for (int k = 0; k < kDirectionSums; ++k) direction[k] = sums[k];
    take_direction(direction);
  }
};

struct AddDirection {
  double* direction;

  TSAM_DEVICE void operator()(const double* sums) const {
    direction[kTiltedSquares] = sums[0];
    add_direction(direction);
  }
};

struct TiltBegin {
  double* state;
  int64_t length;
  Scalar tilt;

  TSAM_DEVICE void operator()(const double*) const { tilt_begin(state, scalar_value(tilt), length); }
};

struct TiltUpdate {
  double* state;
  Scalar loss;
  double log_size;
  int64_t row;
  bool skip_nonfinite, last;

  TSAM_DEVICE void operator()(const double*) const {
    count_sample(state, scalar_value(loss), log_size, kNaN, row, skip_nonfinite, last);
  }
};

// By one thread: a diagnostic, over a handful of samples.
struct Summary {
  const double* state;
  int64_t num_samples;
  double *scratch, *out;

  TSAM_DEVICE void operator()(const double*) const { tilt_summary(state, num_samples, scratch, out); }
};

}  // namespace cuda
}  // namespace tsam
