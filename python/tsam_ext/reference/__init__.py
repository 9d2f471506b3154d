"""The algorithms in plain torch: the oracle of the tests and the pure-Python baseline.

Written from the formulas and not from the kernels, on torch alone, in float64 where it matters.
noise.py: Philox, Box-Muller, ν over a list. rounding.py: stochastic, to half precision. dynamics.py: leapfrog, kick,
perturb. drift.py: the drifts of HMC. tilt.py: tilted losses and weights, all at once and streaming. hmc.py: a chain on
any loss. direction.py: what is carried between full steps. optim.py: the ascent, and a TSAM.
Invariant: nothing is fused or cached.
"""

from .direction import add_direction, take_direction
from .drift import ball_drift, rotation_drift
from .dynamics import kick, leapfrog, perturb
from .hmc import (
    ChainState,
    HamiltonianChain,
    PhiloxDraws,
    TorchDraws,
    Trajectory,
    integrate,
    leapfrog_coefficients,
    scaled_loss,
)
from .noise import base_offsets, global_norm, normal, philox4x32, uniform, unit_noise
from .optim import ReferenceTSAM, ascend
from .rounding import round_stochastically, rounding_words
from .tilt import StreamingTilt, tilted_loss, tilted_reduce, tilted_weights

__all__ = [
    "ChainState",
    "HamiltonianChain",
    "PhiloxDraws",
    "ReferenceTSAM",
    "StreamingTilt",
    "TorchDraws",
    "Trajectory",
    "add_direction",
    "ascend",
    "ball_drift",
    "base_offsets",
    "global_norm",
    "integrate",
    "kick",
    "leapfrog",
    "leapfrog_coefficients",
    "normal",
    "perturb",
    "philox4x32",
    "rotation_drift",
    "round_stochastically",
    "rounding_words",
    "scaled_loss",
    "take_direction",
    "tilted_loss",
    "tilted_reduce",
    "tilted_weights",
    "uniform",
    "unit_noise",
]
