// The kernels of the differentiable ops: one dense tensor, out of place. Words moved per float32 element stand beside
// each; they are those of csrc/cpu/kernels.h.
//
// Layout: block b covers elements b kDeviceChunk on; the losses of a batch tilt are one block's work, from whatever
// type they are in (row_kernels.cuh has their weighted mean of rows). Invariant: a number that came as a tensor is read
// here and nowhere else; results are rounded once.
#pragma once

#include "../core/leapfrog.h"
#include "../core/perturb.h"
#include "row_kernels.cuh"

namespace tsam {
namespace cuda {

TSAM_DEVICE Chunk chunk_of(int64_t n) {
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * kDeviceChunk;
  return Chunk{0, offset, n - offset < kDeviceChunk ? n - offset : kDeviceChunk};
}

__global__ void TSAM_LAUNCH_BOUNDS(kFinishThreads)
    tilted_value_of(Numbers64 losses, int64_t s, double tilt, Numbers64 out) {
  const double value = tilted_value(losses, EvenShares{1.0 / static_cast<double>(s)}, s, tilt, ByBlock{});
  if (threadIdx.x == 0) out.store(0, value);
}

// A factor of a formula: one number, of any type, or (each not null) one per element.
template <typename T>
struct Factor {
  Scalar all;
  const T* each;

  // What the block has to know of it: read once.
  TSAM_DEVICE compute_t<T> number() const {
    return all.data != nullptr ? static_cast<compute_t<T>>(scalar_value(all)) : compute_t<T>(0);
  }
  template <int W, typename Lanes>
  TSAM_DEVICE void operator()(int64_t i, Lanes lanes, compute_t<T> number, compute_t<T> (&x)[W]) const {
    if (each != nullptr) {
      load(each + i, lanes, x);
    } else {
      for (int k = 0; k < W; ++k) x[k] = number;
    }
  }
};

template <typename T>
struct LeapfrogRun {
  const T *position, *momentum, *grad;
  Factor<T> step, inverse_mass;
  T *position_out, *momentum_out;
  int64_t n;
};

// Words: read 3, write 2, and 1 for each factor that has a value per element.
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads) leapfrog_chunks(TSAM_PARAMETER(LeapfrogRun<T>) run) {
  using C = compute_t<T>;
  constexpr int W = 4;
  const Chunk chunk = chunk_of(run.n);
  const C step_number = run.step.number(), mass_number = run.inverse_mass.number();
  const Lay lay = lay_by_memory<W>(run.position, run.momentum, run.grad, run.step.each, run.inverse_mass.each,
                                   run.position_out, run.momentum_out);
  for_lanes<W, false>(chunk.length, lay, [&](int begin, auto lanes) {
    const int64_t i = chunk.offset + begin;
    C x[W], p[W], g[W], step[W], inverse[W];
    load(run.position + i, lanes, x);
    load(run.momentum + i, lanes, p);
    load(run.grad + i, lanes, g);
    run.step(i, lanes, step_number, step);
    run.inverse_mass(i, lanes, mass_number, inverse);
    Leapfrog<C>{}(g, step, inverse, x, p);
    store(x, lanes, run.position_out + i);
    store(p, lanes, run.momentum_out + i);
  });
}

template <typename T>
struct KickRun {
  const T *momentum, *grad;
  Factor<T> a;
  T* out;
  int64_t n;
};

// Words: read 2, write 1, and 1 if a has a value per element.
template <typename T>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads) kick_chunks(TSAM_PARAMETER(KickRun<T>) run) {
  using C = compute_t<T>;
  constexpr int W = kLanes<T>;
  const Chunk chunk = chunk_of(run.n);
  const C number = run.a.number();
  for_lanes<W, true>(chunk.length, lay_by_memory<W>(run.momentum, run.grad, run.a.each, run.out),
                     [&](int begin, auto lanes) {
                       const int64_t i = chunk.offset + begin;
                       C p[W], g[W], a[W];
                       load(run.momentum + i, lanes, p);
                       load(run.grad + i, lanes, g);
                       run.a(i, lanes, number, a);
                       Kick<C>{}(g, a, p);
                       store(p, lanes, run.out + i);
                     });
}

// The scale of a draw of one tensor, where perturb_chunks looks for it.
struct FinishDraw {
  double* state;
  Noise noise;
  int64_t dimension;
  Stream radius_stream;
  Scalar radius;

  TSAM_DEVICE void operator()(const double* sums) const {
    state[kNoiseScale] = noise_scale(noise, dimension, sums[0], radius_stream) * scalar_value(radius);
  }
};

}  // namespace cuda
}  // namespace tsam
