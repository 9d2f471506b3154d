// The kernels of Hamiltonian Monte Carlo: core/hmc.h's functors over the chunks of a TensorTable. Words moved per
// float32 element stand beside each kernel.
//
// Layout: x0, x1 and x2 are lists of the table side by side, and each block asks `chain` which of them it reads and
// writes. What a substep needs of the chain (its kick, its drift) is worked out once, into PassScalars. Lanes are
// 16 bytes of the compute type: sums take the other registers. Invariant: as list_kernels.cuh; a
// gradient's sums in units that keep them in float32's range (energy_unit).
#pragma once

#include "../core/trajectory.h"
#include "apply.cuh"
#include "reduce.cuh"

namespace tsam {
namespace cuda {

// Lists of the tables below, from the first x on as many as there are buffers.
enum PlaceList : int { kPlacePosition = 0, kPlaceSaved = 1, kPlaceX = 2, kPlaceLists = 5 };
enum LeapfrogList : int { kPosition = 0, kSaved = 1, kMomentumList = 2, kGrads = 3, kX = 4, kLeapfrogLists = 7 };
static_assert(kTensorsPerLaunch<kPlaceLists> >= 400);

// In a workspace of the op. `narrow`: the map as float32 lanes take it, which every thread would else work out anew.
struct PassScalars {
  double kick;
  Drift map;
  DriftMap<float> narrow;
  float unit;  // of the kick's sums in float32 pairs (energy_unit)

  TSAM_DEVICE void set(const Drift& drift) {
    map = drift;
    narrow = DriftMap<float>(drift);
  }
  template <typename C>
  TSAM_DEVICE DriftMap<C> drift() const {
    if constexpr (sizeof(C) == sizeof(float)) {
      return narrow;
    } else {
      return DriftMap<C>(map);
    }
  }
};
constexpr int64_t kPassNumbers = sizeof(PassScalars) / sizeof(double);

// Sixteen bytes of a compute type.
template <typename T>
constexpr int kPassLanes = 16 / sizeof(compute_t<T>);

// Momentum or position of a draw; lanes beyond the chunk are zero, as those that are loaded. Two lanes are half a quad.
template <typename C, int W, typename Lanes>
TSAM_DEVICE void draw_lanes(const Stream& stream, uint64_t element, Lanes lanes, C scale, C (&x)[W]) {
  float z[4];
  normals<1>(stream, element / 4, z);
  const bool second = W == 2 && element % 4 != 0;
  for (int k = 0; k < W; ++k) x[k] = lanes[k] ? scale * static_cast<C>(second ? z[(k + 2) % 4] : z[k]) : C(0);
}

// Saves theta_0, and moves to the chain's state or (draw_scale not null) to a draw, which then is that state. Words:
// read 2, write 2; a draw read 1, write 3.
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    hmc_place_chunks(TSAM_PARAMETER(TensorTable<kPlaceLists, few>) table, CountedStream counted, const double* chain,
                     const double* draw_scale, CountedStream rounding) {
  const Stream stream = stream_now(counted), words = kStochastic<T> ? stream_now(rounding) : Stream{};
  using C = compute_t<T>;
  const Chunk chunk = chunk_of(table);
  const uint64_t element = table[chunk].element + static_cast<uint64_t>(chunk.offset);
  const HmcScale<C> scale{static_cast<C>(table[chunk].scale), table[chunk].adaptive};
  const bool draw = draw_scale != nullptr;
  const C length = draw ? static_cast<C>(*draw_scale) : C(0);
  T *const position = table.template at<T>(kPlacePosition, chunk), *const saved =
                                                                       table.template at<T>(kPlaceSaved, chunk);
  C* const x = table.template at<C>(kPlaceX + current_slot(chain), chunk);
  const Lay lay =
      draw || kStochastic<T> ? lay_by_quads<4>(element, position, saved, x) : lay_by_memory<4>(position, saved, x);
  for_lanes<4, !kStochastic<T>>(chunk.length, lay, [&](int i, auto lanes) {
    const uint64_t first = element + static_cast<uint64_t>(static_cast<int64_t>(i));
    T raw[4];
    C o[4], at[4], theta[4];
    load_raw(position + i, lanes, raw);
    store_raw(raw, lanes, saved + i);
    widen(raw, o);
    if (draw && !std::is_same_v<decltype(lanes), Beside>) {
      draw_lanes(stream, first, lanes, length, at);
      store(at, lanes, x + i);
    } else {
      load(x + i, lanes, at);
    }
    for (int k = 0; k < 4; ++k) theta[k] = hmc_move(o[k], scale(o[k]), at[k]);
    store_position(theta, lanes, words, first, position + i);
  });
}

// One pass for each way through a substep. kWhole: kick and drift; sums p.q, q.q, |x' - start|^2. The ball's drift
// needs sums over the kicked momentum first: kKick, with u.u, u.v, v.v, then kDrift, with |x' - start|^2.
enum class HmcPassKind : int { kWhole, kKick, kDrift };
template <HmcPassKind kind>
constexpr int kPassSums = kind == HmcPassKind::kWhole  ? 3
                          : kind == HmcPassKind::kKick ? 5
                                                       : 1;

// Words: kWhole first read 3, write 3, else read 4, write 3; kKick first read 2 (3 adaptive), write 1, else read 3 (4),
// write 1; kDrift read 3, write 3; `measure` read 1 more.
template <typename T, HmcPassKind kind, bool first, bool few>
__global__ void TSAM_FOUR_BLOCKS(kThreads)
    hmc_pass(TSAM_PARAMETER(TensorTable<kLeapfrogLists, few>) table, CountedStream counted, bool measure,
             const double* chain, const PassScalars* scalars, double* partial, int64_t n, CountedStream rounding) {
  using C = compute_t<T>;
  constexpr int W = kPassLanes<T>;
  constexpr bool kicks = kind != HmcPassKind::kDrift, moves = kind != HmcPassKind::kKick, draw = kicks && first;
  const Chunk chunk = chunk_of(table);
  const uint64_t element = table[chunk].element + static_cast<uint64_t>(chunk.offset);
  const bool adaptive = table[chunk].adaptive;
  const HmcScale<C> scale{static_cast<C>(table[chunk].scale), adaptive};
  T* const position = table.template at<T>(kPosition, chunk);
  const T *const origin = table.template at<T>(kSaved, chunk), *const grad = table.template at<T>(kGrads, chunk);
  C* const momentum = table.template at<C>(kMomentumList, chunk);
  const C* const start = table.template at<C>(kX + current_slot(chain), chunk);
  C* const proposal = table.template at<C>(kX + proposal_slot(chain), chunk);
  const C* const from = first ? start : proposal;
  near_sum_t<C> sums[kPassSums<kind>] = {};
  constexpr bool quads = draw || kStochastic<T>;
  const Lay lay = quads ? lay_by_quads<W>(element, position, origin, grad, momentum, start, proposal)
                        : lay_by_memory<W>(position, origin, grad, momentum, start, proposal);
  const Stream words = kStochastic<T> ? stream_now(rounding) : Stream{};
  // The registers of a draw and of a drift together are too many for one loop: a thread leaves its momenta here.
  TSAM_SHARED(uint4, drawn, draw ? kDeviceChunk / W + 1 : 1);
  if constexpr (draw) {
    const Stream stream = stream_now(counted);
    for_lanes<W, false>(chunk.length, Lay{lay.skip, false, false}, [&](int i, auto lanes) {
      C p[W];
      draw_lanes(stream, element + static_cast<uint64_t>(static_cast<int64_t>(i)), lanes, C(1), p);
      memcpy(drawn + (i + lay.skip) / W, p, sizeof p);
    });
  }
  // By what nvcc 13.0 makes of it: float32's whole pass would take 79 registers on sm_120, float64's spills without.
  constexpr bool beside = !quads && (kind != HmcPassKind::kWhole || sizeof(C) == sizeof(double));
  for_lanes<W, beside>(chunk.length, lay, [&](int i, auto lanes) {
    C p[W], o[W] = {}, x[W];
    [[maybe_unused]] C g[W], theta[W];
    if constexpr (draw) {
      memcpy(p, drawn + (i + lay.skip) / W, sizeof p);
    } else {
      load(momentum + i, lanes, p);
    }
    if (moves || adaptive) load(origin + i, lanes, o);
    if constexpr (kicks) load(grad + i, lanes, g);
    load(from + i, lanes, x);
    for (int k = 0; k < W; ++k) {
      const C t = scale(o[k]);
      if constexpr (kicks) {
        const C unit = sizeof(C) == sizeof(float) ? static_cast<C>(scalars->unit) : C(1);
        HmcKick<C>{static_cast<C>(scalars->kick)}(t, g[k], p[k], unit, sums[0], sums[1]);
      }
      if constexpr (kind == HmcPassKind::kKick) {
        sums[2].add_product(x[k], x[k]);
        sums[3].add_product(x[k], p[k]);
        sums[4].add_product(p[k], p[k]);
      }
      if constexpr (moves) {
        // Read again by each group: held in registers they would be spilled.
        scalars->template drift<C>()(x[k], p[k]);
        theta[k] = hmc_move(o[k], t, x[k]);
      }
    }
    if constexpr (moves) {
      if (measure) {
        C began[W];
        load(start + i, lanes, began);
        for (int k = 0; k < W; ++k) sums[kPassSums<kind> - 1].add_product(x[k] - began[k], x[k] - began[k]);
      }
      store(x, lanes, proposal + i);
      store_position(theta, lanes, words, element + static_cast<uint64_t>(static_cast<int64_t>(i)), position + i);
    }
    store(p, lanes, momentum + i);
  });
  const double per = kicks && sizeof(C) == sizeof(float) ? per_unit(scalars->unit) : 1.0;
  store_sums<kThreads>(sums, partial, n, [&](int k) { return !kicks || k > 1 ? 1.0 : k == 0 ? per : per * per; });
}

// Lists: saved, momentum, grads; sums p.q, q.q of the last kick, which nobody needs to see made. Words: read 2 (3
// adaptive).
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    hmc_last_kick(TSAM_PARAMETER(TensorTable<3, few>) table, const double* chain, double* partial, int64_t n) {
  using C = compute_t<T>;
  const Chunk chunk = chunk_of(table);
  const bool adaptive = table[chunk].adaptive;
  const HmcScale<C> scale{static_cast<C>(table[chunk].scale), adaptive};
  const T *const origin = table.template at<T>(0, chunk), *const grad = table.template at<T>(2, chunk);
  const C* const momentum = table.template at<C>(1, chunk);
  near_sum_t<C> sums[2] = {};
  const float unit = sizeof(C) == sizeof(float) ? last_kick_unit(chain) : 1.0f;
  for_lanes<4, true>(chunk.length, lay_by_memory<4>(grad, adaptive ? origin : grad, momentum), [&](int i, auto lanes) {
    C p[4], o[4] = {}, g[4];
    load(momentum + i, lanes, p);
    if (adaptive) load(origin + i, lanes, o);
    load(grad + i, lanes, g);
    for (int k = 0; k < 4; ++k) HmcKick<C>{C(0)}(scale(o[k]), g[k], p[k], static_cast<C>(unit), sums[0], sums[1]);
  });
  store_sums<kThreads>(sums, partial, n,
                       [&](int k) { return k == 0 ? per_unit(unit) : per_unit(unit) * per_unit(unit); });
}

// Lists: accumulator (of the compute type), carried, grads (adopted: the accumulator). Words: as the CPU's hmc_carry_,
// decided here.
template <typename T, bool few>
__global__ void TSAM_LAUNCH_BOUNDS(kThreads)
    hmc_carry_chunks(TSAM_PARAMETER(TensorTable<3, few>) table, const double* chain, const double* state, bool count,
                     bool adopted) {
  using C = compute_t<T>;
  const bool taken = chain[kTaken] != 0.0;
  int action = count ? tilt_action(state) : static_cast<int>(kSkip);
  if (adopted && action == kBlend) action = kPoison;  // the CPU's op refuses it
  if (!taken && action == kSkip) return;
  const Chunk chunk = chunk_of(table);
  const Accumulate<C> functor{static_cast<C>(state[kKeep]), static_cast<C>(state[kAdd])};
  C* const accumulator = table.template at<C>(0, chunk);
  T* const carried = table.template at<T>(1, chunk);
  const T* const source = taken ? table.template at<T>(2, chunk) : carried;
  for_lanes<4, true>(chunk.length, lay_by_memory<4>(source, carried, accumulator), [&](int i, auto lanes) {
    T raw[4];
    C x[4], g[4];
    load_raw(source + i, lanes, raw);
    if (taken) store_raw(raw, lanes, carried + i);
    if (action == kSkip || (adopted && taken && action == kAssign)) return;
    widen(raw, g);
    if (action == kPoison) {
      for (int k = 0; k < 4; ++k) x[k] = static_cast<C>(kNaN);
    } else if (action == kAssign) {
      for (int k = 0; k < 4; ++k) x[k] = g[k];
    } else {
      load(accumulator + i, lanes, x);
      functor(g, x);
    }
    store(x, lanes, accumulator + i);
  });
}

}  // namespace cuda
}  // namespace tsam
