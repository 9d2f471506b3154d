"""Tilted Sharpness-Aware Minimization as fused kernels: the optimizer TSAM and the ops it is made of.

    opt = tsam_ext.TSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    loss = opt.step(closure)

Needs PyTorch 2.10 or newer; importing checks that before the compiled part is loaded.
"""

from __future__ import annotations

import torch

from ._version import __version__

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise ImportError(f"tsam_ext {__version__} needs torch >= 2.10, found torch {torch.__version__}.")

from . import _compile, _cuda, functional, hmc  # noqa: F401  (the first two: their import is all they are for)
from .functional import kick, leapfrog, perturb, tilted_loss, tilted_reduce, tilted_weights
from .metrics import Diagnostics
from .optim import TSAM

__all__ = [
    "TSAM",
    "Diagnostics",
    "__version__",
    "functional",
    "hmc",
    "kick",
    "leapfrog",
    "perturb",
    "tilted_loss",
    "tilted_reduce",
    "tilted_weights",
]
