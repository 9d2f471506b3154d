"""The methods of `compare`: SAM's family as others have it, and TSAM's samplers, each with six settings to search.

Two learning rates times three values of what is the method's own, as many for all. Where a paper has a value for it,
that lies among the three: ASAM rho 0.5 to 2 (Kwon et al., ICML 2021), LookSAM alpha 0.7 (Liu et al., CVPR 2022),
WSAM gamma 0.9 (Yue et al., KDD 2023), MomentumSAM rho 0.3 to 3 (Becker et al., 2024), Friendly-SAM sigma 1, lambda 0.9
(Li et al., CVPR 2024), SAM on normalisation layers alone with a larger rho (Mueller et al., NeurIPS 2023).
"""

from __future__ import annotations

from dataclasses import replace

from .methods import PARTS, SAM, WHOLE, Method, carried, grid

RATES = (0.05, 0.15)
RHOS = grid(rho=(0.05, 0.15, 0.4))
EVERY = 3

_ALL: tuple[Method, ...] = (
    Method("ERM", "sgd", 1, own=grid(weight_decay=(0.0, 0.001, 0.01))),
    Method("SAM", "tsam", 2, SAM, RHOS),
    Method("ASAM", "asam", 2, own=grid(rho=(0.5, 1.0, 2.0))),
    Method("LookSAM", "looksam", 1 + 1 / EVERY, {"k": EVERY, "alpha": 0.7}, RHOS),
    Method("MomentumSAM", "momentum-sam", 1, own=grid(rho=(0.3, 1.0, 3.0))),
    Method("Friendly-SAM", "friendly-sam", 2, own=RHOS),
    Method("WSAM", "wsam", 2, {"gamma": 0.9}, RHOS),
    Method("SAM, norm layers", "tsam", 2, {**SAM, "norm_only": True}, grid(rho=(0.2, 0.6, 1.8))),
    carried("SAM", SAM, EVERY, RHOS),
    Method("TSAM noise", "tsam", 3, {**WHOLE, "sampler": "noise", "tilt": 20.0}, grid(radius=(0.3, 1.0, 3.0))),
    Method("TSAM whole", "tsam", 6, {**WHOLE, "radius": 1.0, "tilt": 20.0}, RHOS),
    Method("TSAM hmc", "tsam", 4, {**WHOLE, "hmc": {"delta": "auto"}}, grid(rho=(0.3, 1.0, 3.0))),
    Method("TSAM split", "tsam", 2, {**PARTS, "rho": 0.05}, grid(tilt=(0.0, -1.0, -2.0))),
)
CONTENDERS = tuple(replace(method, rates=RATES) for method in _ALL)
