"""Tilted Sharpness-Aware Minimization as fused kernels: the optimizer TSAM and the ops it is made of.

    opt = tsam_ext.TSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    loss = opt.step(closure)

Needs PyTorch 2.10 or newer; importing checks that before the compiled part is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from ._version import __version__

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
    raise ImportError(f"tsam_ext {__version__} needs torch >= 2.10, found torch {torch.__version__}.")

from . import _compile, _cuda, functional, hmc, metrics  # noqa: F401  (the first two: their import is all they are for)
from .diagnostics import Diagnostics
from .estimates import Sample
from .functional import kick, leapfrog, perturb, tilted_loss, tilted_reduce, tilted_weights
from .optim import TSAM
from .samplers import HMC, Ascent, Noise
from .settings import Tilt

if TYPE_CHECKING:
    from . import reference as reference

__all__ = [
    "HMC",
    "TSAM",
    "Ascent",
    "Diagnostics",
    "Noise",
    "Sample",
    "Tilt",
    "__version__",
    "functional",
    "hmc",
    "kick",
    "leapfrog",
    "metrics",
    "perturb",
    "reference",
    "tilted_loss",
    "tilted_reduce",
    "tilted_weights",
]


def __getattr__(name: str) -> Any:
    """``tsam_ext.reference``, which training does not need, is imported when it is first asked for."""
    if name == "reference":
        return importlib.import_module(".reference", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names alone."""
    return sorted(__all__)
