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
  template <int W>
  TSAM_HD void operator()(const C (&grad)[W], const C (&a)[W], C (&momentum)[W]) const {
    for (int i = 0; i < W; ++i) momentum[i] = fused(a[i], grad[i], momentum[i]);
  }
};

template <typename C>
struct Leapfrog {
  template <int W>
  TSAM_HD void operator()(const C (&grad)[W], const C (&step)[W], const C (&inverse_mass)[W], C (&position)[W],
                          C (&momentum)[W]) const {
    for (int i = 0; i < W; ++i) {
      momentum[i] = fused(C(0.5) * step[i], grad[i], momentum[i]);
      position[i] = fused(step[i] * inverse_mass[i], momentum[i], position[i]);
    }
  }
};

TSAM_CORE_END
