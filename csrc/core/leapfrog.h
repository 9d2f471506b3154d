// The leapfrog's element maps: a kick, and a half kick followed by a drift (R. Neal, "MCMC using Hamiltonian
// dynamics", 2011, section 2.3), for the Hamiltonian -log density(x) + p^2 / (2 m).
//
//   kick:     p' = p + a g                    g = grad log density
//   leapfrog: p' = p + (h / 2) g,  x' = x + (h / m) p'
//
// Invariant: one multiply-add each; x' comes from the unrounded p'. h, 1/m and a are one number or one per element.
#pragma once

#include "dtype.h"

TSAM_CORE_BEGIN

template <typename C>
struct Kick {
  // V: a number, or lanes of them.
  template <typename V>
  TSAM_HD static V moved(const V& grad, const V& a, const V& momentum) {
    return fused(a, grad, momentum);
  }
  template <int W>
  TSAM_HD void operator()(const C (&grad)[W], const C (&a)[W], C (&momentum)[W]) const {
    for (int i = 0; i < W; ++i) momentum[i] = moved(grad[i], a[i], momentum[i]);
  }
};

template <typename C>
struct Leapfrog {
  // V: a number, or lanes of them.
  template <typename V>
  TSAM_HD static void move(const V& grad, const V& step, const V& inverse_mass, V& position, V& momentum) {
    momentum = fused(V(C(0.5)) * step, grad, momentum);
    position = fused(step * inverse_mass, momentum, position);
  }
  template <int W>
  TSAM_HD void operator()(const C (&grad)[W], const C (&step)[W], const C (&inverse_mass)[W], C (&position)[W],
                          C (&momentum)[W]) const {
    for (int i = 0; i < W; ++i) move(grad[i], step[i], inverse_mass[i], position[i], momentum[i]);
  }
};

TSAM_CORE_END
