"""TSAM from options that stand side by side, as the reference takes them and as tables of settings are easiest to read.

``tsam(params, sampler="hmc", delta=2.0)`` is ``TSAM(params, sampler=HMC(delta=2.0), num_samples=3)``: three samples
where a test does not say how many, so that there is something to weigh.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tsam_ext import HMC, TSAM, Ascent, Noise

SAMPLERS = {"ascent": Ascent, "noise": Noise, "hmc": HMC}
# One setting for each way to sample, as flat options.
WAYS: dict[str, dict[str, Any]] = {
    "ascent": {},
    "noise": {"sampler": "noise"},
    "hmc": {"sampler": "hmc", "delta": 4.0},
    "sam": {"num_samples": 1, "radius": 0.0},
}


def nested(options: dict[str, Any]) -> dict[str, Any]:
    """The options with those of a sampler moved into its object."""
    name = options.get("sampler", "ascent")
    if name not in SAMPLERS:
        return options
    kind = SAMPLERS[name]
    own = {field.name for field in fields(kind)}
    rest = {key: value for key, value in options.items() if key not in own}
    return rest | {"sampler": kind(**{key: value for key, value in options.items() if key in own})}


def tsam(params: Any, *base: Any, num_samples: int = 3, **options: Any) -> TSAM:
    """A TSAM from flat options."""
    return TSAM(params, *base, num_samples=num_samples, **nested(options))
