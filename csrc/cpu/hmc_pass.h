// A pass of HMC over one run: core/hmc.h's functors on lanes that stay in registers from the loads to the stores.
//
// Layout: blocks of 128 elements, the width of a draw, in Lanes of 16. A block of whole elements of the compute type is
// read and written in place; any other goes through room on the stack, filled up with zeros, so that lanes beyond the
// run add nothing to a sum. Invariant: a sum is 16 lanes in float64, whatever the instruction set.
#pragma once

#include <type_traits>

#include "apply.h"
#include "copy.h"

namespace tsam {
inline namespace TSAM_ISA {
namespace cpu_apply {

// The elements of one block as the compute type: where they lie, or, converted and filled up with zeros, in `room`.
template <typename T, typename C, int W, typename Count>
static const C* block_of(const T* from, Count count, C (&room)[W]) {
  if constexpr (std::is_same_v<T, C> && std::is_same_v<Count, std::integral_constant<int, W>>) {
    return from;
  } else {
    load(from, count, room);
    return room;
  }
}

// A block's results: the place itself, or room that store_block() takes them from.
template <typename T, typename C, int W, typename Count>
static C* block_to(T* to, Count, C (&room)[W]) {
  if constexpr (std::is_same_v<T, C> && std::is_same_v<Count, std::integral_constant<int, W>>) {
    return to;
  } else {
    return room;
  }
}
template <typename T, typename C, int W, typename Count>
static void store_block(const C (&room)[W], Count count, T* to) {
  if constexpr (!(std::is_same_v<T, C> && std::is_same_v<Count, std::integral_constant<int, W>>))
    store(room, count, to);
}

// body(offset, count, p): the momenta of the run, drawn or loaded, zero beyond it.
template <typename C, typename Body>
static void for_momenta(const cpu::HmcPass& pass, const C* momentum, int64_t n, const Body& body) {
  constexpr int W = 4 * kQuads;
  C room[W];
  if (pass.draw) {
    for_noise(n, pass.element, pass.stream, [&](int64_t i, auto count, const float (&z)[W]) {
      for (int k = 0; k < W; ++k) room[k] = k < count ? static_cast<C>(z[k]) : C(0);
      body(i, count, room);
    });
  } else {
    for_blocks<W>(n, [&](int64_t i, auto count) { body(i, count, block_of(momentum + i, count, room)); });
  }
}

// What a pass does to an element; only the sums that it needs take registers.
enum class HmcKind : int { kLastKick, kKick, kWhole, kWholeMeasured, kDrift, kDriftMeasured };
template <HmcKind kind>
constexpr bool kKicks = kind != HmcKind::kDrift && kind != HmcKind::kDriftMeasured;
template <HmcKind kind>
constexpr bool kMoves = kind != HmcKind::kLastKick && kind != HmcKind::kKick;

// A pass's sums in lanes, and those of a block while it runs.
struct HmcLanes {
  Lanes<double> pq{0.0}, qq{0.0}, uu{0.0}, uv{0.0}, vv{0.0}, moved{0.0};
};

// One block of W elements; pointers may be equal, as every element is read before it is written.
template <typename C>
struct HmcBlock {
  const C *origin, *grad, *from, *start, *momentum;
  C *momentum_out, *to, *position;
};

template <HmcKind kind, int W, typename C>
TSAM_HD void hmc_block(const HmcBlock<C>& block, const HmcScale<C>& scale, const HmcKick<C>& kick,
                       const DriftMap<C>& drift, HmcLanes& sums) {
  using V = Lanes<C>;
  constexpr bool kicks = kKicks<kind>, moves = kMoves<kind>, products = kind == HmcKind::kKick,
                 measured = kind == HmcKind::kWholeMeasured || kind == HmcKind::kDriftMeasured;
  HmcLanes in = sums;
  for (int k = 0; k < W; k += V::kCount) {
    V p(block.momentum + k);
    const V o = block.origin != nullptr ? V(block.origin + k) : V(C(0)), t = scale(o);
    if constexpr (kicks) kick(t, V(block.grad + k), p, in.pq, in.qq);
    if constexpr (products) {
      const V x(block.from + k);
      add_product(x, x, in.uu);
      add_product(x, p, in.uv);
      add_product(p, p, in.vv);
    }
    if constexpr (moves) {
      V x(block.from + k);
      drift(x, p);
      if constexpr (measured) {
        const V change = x - V(block.start + k);
        add_product(change, change, in.moved);
      }
      x.store(block.to + k);
      hmc_move(o, t, x).store(block.position + k);
    }
    if constexpr (kind != HmcKind::kLastKick) p.store(block.momentum_out + k);
  }
  if constexpr (kicks) sums.pq = in.pq, sums.qq = in.qq;
  if constexpr (products) sums.uu = in.uu, sums.uv = in.uv, sums.vv = in.vv;
  if constexpr (measured) sums.moved = in.moved;
}

// `write`: how positions that need room on the stack get to their place.
template <HmcKind kind, typename T, typename Write>
static HmcSums hmc_run(const cpu::HmcRun& run, const cpu::HmcPass& pass, int64_t n, const Write& write) {
  using C = compute_t<T>;
  constexpr int W = 4 * kQuads;
  constexpr bool kicks = kKicks<kind>, moves = kMoves<kind>, keeps = kind != HmcKind::kLastKick;
  const HmcScale<C> scale{static_cast<C>(pass.scale), pass.adaptive};
  const HmcKick<C> kick{static_cast<C>(pass.a)};
  const DriftMap<C> drift(pass.drift);
  const T *const origin = static_cast<const T*>(run.origin), *const grad = static_cast<const T*>(run.grad);
  const C *const from = static_cast<const C*>(run.from), *const start = static_cast<const C*>(run.start);
  C *const momentum = static_cast<C*>(run.momentum), *const to = static_cast<C*>(run.to);
  T* const position = static_cast<T*>(run.position);
  HmcLanes sums;
  for_momenta(pass, momentum, n, [&](int64_t i, auto count, const C* p) {
    C room[7][W];
    HmcBlock<C> block{};
    block.momentum = p;
    if (pass.adaptive || moves) block.origin = block_of(origin + i, count, room[0]);
    if (kicks) block.grad = block_of(grad + i, count, room[1]);
    if (keeps) block.from = block_of(from + i, count, room[2]);
    if (start != nullptr) block.start = block_of(start + i, count, room[3]);
    if (keeps) block.momentum_out = block_to(momentum + i, count, room[4]);
    if (moves) block.to = block_to(to + i, count, room[5]), block.position = block_to(position + i, count, room[6]);
    hmc_block<kind, W>(block, scale, kick, drift, sums);
    if (keeps) store_block(room[4], count, momentum + i);
    if constexpr (moves) {
      store_block(room[5], count, to + i);
      if constexpr (kRounds<T>) {
        write(room[6], pass.element + static_cast<uint64_t>(i), count, position + i);
      } else {
        store_block(room[6], count, position + i);
      }
    }
  });
  return HmcSums{sums.pq.total(), sums.qq.total(), sums.uu.total(),
                 sums.uv.total(), sums.vv.total(), sums.moved.total()};
}

// Saves the position and moves it by T x, x being drawn or what is there.
template <typename T, typename Write>
static void place_run(T* position, T* saved, compute_t<T>* x, double scale, bool adaptive, bool draw, double draw_scale,
                      const Stream& stream, uint64_t element, int64_t n, bool past_caches, const Write& write) {
  using C = compute_t<T>;
  constexpr int W = 4 * kQuads;
  const HmcScale<C> functor{static_cast<C>(scale), adaptive};
  const auto block = [&](int64_t i, auto count, const C(&at)[W]) {
    C o[W], theta[W];
    T* const from = position + i;
    save_block<W>(from, count, saved + i, past_caches);
    load(from, count, o);
    for (int k = 0; k < W; ++k) theta[k] = hmc_move(o[k], functor(o[k]), at[k]);
    write(theta, element + static_cast<uint64_t>(i), count, from);
  };
  if (draw) {
    for_noise(n, element, stream, [&](int64_t i, auto count, const float (&z)[W]) {
      C at[W];
      for (int k = 0; k < W; ++k) at[k] = static_cast<C>(draw_scale) * static_cast<C>(z[k]);
      store(at, count, x + i);
      block(i, count, at);
    });
  } else {
    for_blocks<W>(n, [&](int64_t i, auto count) {
      C at[W];
      load(x + i, count, at);
      block(i, count, at);
    });
  }
  if (past_caches) streamed();
}

}  // namespace cpu_apply
}  // namespace TSAM_ISA
}  // namespace tsam
