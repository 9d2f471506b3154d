// The kernels of the list ops: core functors over the chunks of a TensorTable. Words moved per float32 element stand
// beside each kernel; they are those of csrc/cpu/kernels.h.
//
// Layout: a kernel serves one storage type and one size of table; scalars of the step (noise scale, norm, coefficients)
// are read from `state` in device memory, written there by a finish kernel earlier on the same stream. Invariant: an
// element's bits are those of the CPU back end; sums agree to rounding.
#pragma once

#include "../core/direction.h"
#include "../core/perturb.h"
#include "../core/weights.h"
#include "apply.cuh"
#include "reduce.cuh"

namespace tsam {
namespace cuda {

// partial[b] = sum of z^2 over the chunk, z normal: signs need no norm. Words: 0.
template <int L, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    noise_sum_squares(TSAM_PARAMETER(TensorTable<L, few>) table, CountedStream counted, double* partial) {
  const Stream stream = stream_now(counted);
  const Chunk chunk = chunk_of(table);
  const uint64_t element = table[chunk].element + static_cast<uint64_t>(chunk.offset);
  PairSum sums[1] = {};  // a normal is 0 or of a size that float32 squares without loss (core/philox.h)
  for_lanes<4, false>(chunk.length, Lay{static_cast<int>(element % 4), true, false}, [&](int i, auto lanes) {
    float z[4];
    normals<1>(stream, (element + static_cast<uint64_t>(static_cast<int64_t>(i))) / 4, z);
    TSAM_UNROLL
    for (int k = 0; k < 4; ++k)
      if (lanes[k]) sums[0].add_product(z[k], z[k]);
  });
  store_sums<kThreads>(sums, partial, 1, [](int) { return 1.0; });
}

// Lists: position, saved. As the CPU's perturb (save: read 1, write 2; otherwise read 1, write 1). The scale is the
// state's noise scale times the tensor's.
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    perturb_chunks(TSAM_PARAMETER(TensorTable<2, few>) table, CountedStream counted, const double* state, bool negate,
                   bool save, CountedStream rounding) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const Chunk chunk = chunk_of(table);
  const uint64_t element = table[chunk].element + static_cast<uint64_t>(chunk.offset);
  const Stream stream = stream_now(counted), words = kStochastic<T> ? stream_now(rounding) : Stream{};
  const double scale = state[kNoiseScale];
  const Perturb<C> functor{static_cast<C>((negate ? -scale : scale) * table[chunk].scale), table[chunk].adaptive};
  T *const position = table.template at<T>(0, chunk), *const saved = table.template at<T>(1, chunk);
  const T* const from = save ? position : saved;
  for_lanes<W, false, !kStochastic<T>>(chunk.length, lay_by_quads<W>(element, position, saved), [&](int i, auto lanes) {
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
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    grad_sum_squares(TSAM_PARAMETER(TensorTable<2, few>) table, double* partial) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const Chunk chunk = chunk_of(table);
  const bool adaptive = table[chunk].adaptive;
  const T *const grad = table.template at<T>(0, chunk), *const origin = table.template at<T>(1, chunk);
  any_sum_t<C> sums[1] = {};
  for_lanes<W, true>(chunk.length, lay_by_memory<W>(grad, adaptive ? origin : grad), [&](int i, auto lanes) {
    C x[W];
    load(grad + i, lanes, x);
    if (adaptive) {
      C d[W];
      load(origin + i, lanes, d);
      for (int k = 0; k < W; ++k) x[k] *= magnitude(d[k]);
    }
    sums[0].add_products(x, x);
  });
  store_sums<kThreads>(sums, partial, 1, [&](int) { return table[chunk].scale * table[chunk].scale; });
}

// Lists: position, saved, grads. Words: read 2 (adaptive 3), write 1; save: read 2, write 2. The scale is the tensor's
// rho over the state's norm.
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    ascend_chunks(TSAM_PARAMETER(TensorTable<3, few>) table, const double* state, bool save, CountedStream rounding) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const Chunk chunk = chunk_of(table);
  const bool adaptive = table[chunk].adaptive;
  const Ascend<C> functor{static_cast<C>(ascent_scale(table[chunk].scale, state[kGradNorm])), adaptive};
  T *const position = table.template at<T>(0, chunk), *const saved = table.template at<T>(1, chunk);
  const T* const grad = table.template at<T>(2, chunk);
  const uint64_t element = kStochastic<T> ? table[chunk].element + static_cast<uint64_t>(chunk.offset) : 0;
  const Stream words = kStochastic<T> ? stream_now(rounding) : Stream{};
  const Lay lay =
      kStochastic<T> ? lay_by_quads<W>(element, position, saved, grad) : lay_by_memory<W>(position, saved, grad);
  for_lanes<W, !kStochastic<T>>(chunk.length, lay, [&](int i, auto lanes) {
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
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    displacement_chunks(TSAM_PARAMETER(TensorTable<3, few>) table, bool along, double* partial, int64_t n) {
  using C = compute_t<T>;
  // The sums take the other registers, and one more loop would have float64's division spill.
  constexpr int W = 16 / sizeof(C);
  const Chunk chunk = chunk_of(table);
  const bool adaptive = table[chunk].adaptive;
  const T *const position = table.template at<T>(0, chunk), *const saved = table.template at<T>(1, chunk);
  const T* const grad = along ? table.template at<T>(2, chunk) : position;
  any_sum_t<C> sums[3] = {};
  for_lanes<W, false>(chunk.length, lay_by_memory<W>(position, saved, grad), [&](int i, auto lanes) {
    C x[W], o[W], g[W];
    load(position + i, lanes, x);
    load(saved + i, lanes, o);
    if (along) {
      load(grad + i, lanes, g);
    } else {
      for (int k = 0; k < W; ++k) g[k] = C(0);
    }
    add_displacements(x, o, g, adaptive, sums[0], sums[1], sums[2]);
  });
  store_sums<kThreads>(sums, partial, n, [&](int k) { return k == 2 ? table[chunk].scale : 1.0; });
}

// Lists: accumulator (of the compute type), grads. Words: what state's action says: blend read 2, write 1; assign read
// 1, write 1; poison and zero write 1; skip 0. An adopted accumulator holds the gradient of the first sample already:
// there is nothing to blend with it, and the device cannot refuse, so that such a mistake comes out as NaN.
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    accumulate_chunks(TSAM_PARAMETER(TensorTable<2, few>) table, const double* state, bool adopted) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const int asked = tilt_action(state);
  const int action = !adopted || asked == kPoison ? asked : asked == kBlend ? kPoison : kSkip;
  if (action == kSkip) return;
  const Chunk chunk = chunk_of(table);
  const Accumulate<C> functor{static_cast<C>(state[kKeep]), static_cast<C>(state[kAdd])};
  C* const accumulator = table.template at<C>(0, chunk);
  const T* const grad = table.template at<T>(1, chunk);
  for_lanes<W, true>(chunk.length, lay_by_memory<W>(grad, accumulator), [&](int i, auto lanes) {
    C x[W];
    if (action == kPoison || action == kZero) {
      for (int k = 0; k < W; ++k) x[k] = static_cast<C>(action == kPoison ? kNaN : 0.0);
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
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    direction_sums(TSAM_PARAMETER(TensorTable<2, few>) table, double* partial, int64_t n) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const Chunk chunk = chunk_of(table);
  const C* const plain = table.template at<C>(0, chunk);
  const T* const tilted = table.template at<T>(1, chunk);
  any_sum_t<C> sums[kDirectionSums] = {};
  for_lanes<W, true>(chunk.length, lay_by_memory<W>(tilted, plain), [&](int i, auto lanes) {
    C g[W], a[W];
    load(plain + i, lanes, g);
    load(tilted + i, lanes, a);
    sums[kTiltedSquares].add_products(a, a);
    sums[kProduct].add_products(a, g);
    sums[kPlainSquares].add_products(g, g);
  });
  store_sums<kThreads>(sums, partial, n, [](int) { return 1.0; });
}

// Lists: to, from. Bit for bit. Words: read 1, write 1.
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads) copy_chunks(TSAM_PARAMETER(TensorTable<2, few>) table) {
  constexpr int W = 16 / sizeof(T);
  const Chunk chunk = chunk_of(table);
  T* const to = table.template at<T>(0, chunk);
  const T* const from = table.template at<T>(1, chunk);
  for_lanes<W, true>(chunk.length, lay_by_memory<W>(to, from), [&](int i, auto lanes) {
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
