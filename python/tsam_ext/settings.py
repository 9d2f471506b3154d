"""What a user may set, checked once: the settings of one TSAM and the values of one parameter group.

Invariant: a Settings object and a checked group hold only values that every later layer accepts, so nothing below
checks them again. Each message names the argument, what came and what was wanted.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ._cuda import why_not
from .functional.checks import DTYPES, NOISES, is_dense

Tilt = float | torch.Tensor | Callable[[int], float]

SAMPLERS = ("ascent", "noise", "hmc")
PRIORS = ("gaussian", "ball")
CHAINS = ("persistent", "fresh")
BATCHES = ("whole", "split")
GROUP_KEYS = ("rho", "radius", "adaptive")
MAX_SAMPLES = 1 << 16


def reject(argument: str, got: object, expected: str, error: type[Exception] = ValueError) -> Exception:
    """The exception to raise for a bad argument (so that ``raise reject(...)`` reads as one sentence)."""
    return error(f"TSAM: {argument}: got {got!r}, expected {expected}")


def checked_number(argument: str, value: object, expected: str, *, low: float = -math.inf) -> float:
    """``value`` as a float that is finite and not below ``low``; TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise reject(argument, value, expected, TypeError)
    if not math.isfinite(value) or value < low:
        raise reject(argument, value, expected)
    return float(value)


def checked_int(argument: str, value: object, low: int, high: int) -> int:
    """``value`` as an int from ``low`` to ``high``; TypeError or ValueError otherwise."""
    expected = f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise reject(argument, value, expected, TypeError)
    if not low <= int(value) <= high:
        raise reject(argument, value, expected)
    return int(value)


def checked_bool(argument: str, value: object) -> bool:
    """``value`` if it is a bool; TypeError otherwise."""
    if not isinstance(value, bool):
        raise reject(argument, value, "True or False", TypeError)
    return value


def checked_choice(argument: str, value: object, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of ``choices``; TypeError or ValueError otherwise."""
    expected = " or ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise reject(argument, value, expected, TypeError)
    if value not in choices:
        raise reject(argument, value, expected)
    return value


def check_group(group: dict[str, Any], where: str = "") -> None:
    """Checks ``rho``, ``radius`` and ``adaptive`` of one parameter group, where present; makes them Python's own."""
    if "rho" in group:
        group["rho"] = checked_number(f"{where}rho", group["rho"], "a finite number not below 0", low=0.0)
    if group.get("radius") is not None:
        expected = "None or a finite number not below 0"
        group["radius"] = checked_number(f"{where}radius", group["radius"], expected, low=0.0)
    if "adaptive" in group:
        checked_bool(f"{where}adaptive", group["adaptive"])
    for key in (*Settings.__dataclass_fields__, *HmcSettings.__dataclass_fields__):
        if key in group and key != "capturable":  # which many base optimizers have too
            raise reject(f"{where}{key}", group[key], "one value for all groups, given to TSAM itself")


def _check_tilt_tensor(argument: str, tilt: torch.Tensor) -> None:
    if tilt.numel() != 1 or not tilt.dtype.is_floating_point:
        raise reject(argument, f"a {tilt.dtype} tensor of shape {tuple(tilt.shape)}", "a float 0-dim tensor")


def _checked_tilt(tilt: object) -> Tilt:
    expected = "a number (inf and -inf too), a 0-dim tensor or a function of the step"
    if isinstance(tilt, torch.Tensor):
        _check_tilt_tensor("tilt", tilt)
        return tilt
    if callable(tilt):
        return tilt
    if isinstance(tilt, bool) or not isinstance(tilt, numbers.Real):
        raise reject("tilt", tilt, expected, TypeError)
    if math.isnan(tilt):
        raise reject("tilt", tilt, expected)
    return float(tilt)


@dataclass(frozen=True)
class HmcSettings:
    """The settings of the sampler ``hmc``; :class:`tsam_ext.TSAM`'s docstring explains them."""

    delta: float | str | torch.Tensor | None = None
    delta_scale: float = 1.0
    num_leapfrog_steps: int = 1
    step_size: float | None = None
    adapt_step_size: bool = True
    prior: str = "gaussian"
    metropolis: bool = True
    chain: str = "persistent"
    burn_in: int = 0
    recycle: bool = False

    @classmethod
    def checked(cls, sampler: str, tilt: Tilt, values: Mapping[str, Any]) -> HmcSettings:
        """The settings from the constructor's arguments; all at their defaults unless the sampler is ``hmc``."""
        if sampler != "hmc":
            for name, value in values.items():
                if value is not getattr(cls, name) and value != getattr(cls, name):
                    raise reject(name, value, f"{getattr(cls, name)!r}, as sampler is not 'hmc'")
            return cls()
        delta = values["delta"]
        if isinstance(delta, torch.Tensor):
            _check_tilt_tensor("delta", delta)
        elif delta is None:
            if isinstance(tilt, float) and math.isinf(tilt):
                raise reject("delta", None, "a finite number or 'auto', as tilt is infinite")
        elif delta != "auto":
            delta = checked_number("delta", delta, "None, a finite number, a 0-dim tensor or 'auto'")
        step_size = values["step_size"]
        positive = "None or a finite number above 0"
        if step_size is not None:
            step_size = checked_number("step_size", step_size, positive)
            if step_size <= 0.0:
                raise reject("step_size", step_size, positive)
        return cls(
            delta=delta,
            delta_scale=checked_number("delta_scale", values["delta_scale"], "a finite number"),
            num_leapfrog_steps=checked_int("num_leapfrog_steps", values["num_leapfrog_steps"], 1, 1 << 16),
            step_size=step_size,
            adapt_step_size=checked_bool("adapt_step_size", values["adapt_step_size"]),
            prior=checked_choice("prior", values["prior"], PRIORS),
            metropolis=checked_bool("metropolis", values["metropolis"]),
            chain=checked_choice("chain", values["chain"], CHAINS),
            burn_in=checked_int("burn_in", values["burn_in"], 0, MAX_SAMPLES),
            recycle=checked_bool("recycle", values["recycle"]),
        )

    @property
    def first_step_size(self) -> float:
        """The step size before any adaptation: a quarter turn over the trajectory unless the user set it."""
        return math.pi / (2 * self.num_leapfrog_steps) if self.step_size is None else self.step_size

    @property
    def highest_log_step(self) -> float:
        """Where adaptation stops: at a quarter turn a trajectory, or at the user's step size if that is larger."""
        return math.log(max(self.first_step_size, math.pi / (2 * self.num_leapfrog_steps)))


@dataclass(frozen=True)
class Settings:
    """The settings that hold for all groups of one :class:`tsam_ext.TSAM`, whose docstring explains them."""

    tilt: Tilt
    num_samples: int
    sampler: str
    noise: str
    batch: str
    every: int
    antithetic: bool
    skip_nonfinite_loss: bool
    same_masks: bool
    capturable: bool
    hmc: HmcSettings

    @classmethod
    def checked(cls, hmc: Mapping[str, Any], values: Mapping[str, Any]) -> Settings:
        """Settings from the constructor's arguments; TypeError or ValueError naming the first bad one."""
        tilt, sampler = _checked_tilt(values["tilt"]), checked_choice("sampler", values["sampler"], SAMPLERS)
        capturable = checked_bool("capturable", values["capturable"])
        if capturable:
            # What the host decides anew each step, or does to generators, a replay would not.
            if values["every"] != 1:
                raise reject("every", values["every"], "1, as capturable is True")
            if values["same_masks"] is not False:
                raise reject("same_masks", values["same_masks"], "False, as capturable is True")
            if not isinstance(tilt, (float, torch.Tensor)):
                raise reject("tilt", tilt, "a number or a 0-dim tensor, as capturable is True")
        if sampler == "hmc":
            # The accept test compares losses of one function: the same rows and the same masks at every position.
            for name, wanted in (("batch", "whole"), ("antithetic", False), ("same_masks", not capturable)):
                if values[name] != wanted:
                    raise reject(name, values[name], f"{wanted!r}, as sampler is 'hmc'")
        return cls(
            tilt=tilt,
            num_samples=checked_int("num_samples", values["num_samples"], 1, MAX_SAMPLES),
            sampler=sampler,
            hmc=HmcSettings.checked(sampler, tilt, hmc),
            noise=checked_choice("noise", values["noise"], NOISES),
            batch=checked_choice("batch", values["batch"], BATCHES),
            every=checked_int("every", values["every"], 1, 1 << 31),
            antithetic=checked_bool("antithetic", values["antithetic"]),
            skip_nonfinite_loss=checked_bool("skip_nonfinite_loss", values["skip_nonfinite_loss"]),
            same_masks=checked_bool("same_masks", values["same_masks"]),
            capturable=capturable,
        )

    @property
    def two_steps(self) -> bool:
        """Whether a step is one ascent and one gradient on the whole batch, as SAM's two-step form has it."""
        return self.num_samples == 1 and self.sampler == "ascent" and self.batch == "whole" and self.every == 1

    def is_plain(self, step: int | torch.Tensor) -> bool:
        """Whether ``every`` leaves this step to the plain gradient. With 1 a step on the device is not read."""
        return self.every > 1 and int(step) % self.every != 0

    def tilt_at(self, step: int) -> float | torch.Tensor:
        """The tilt of one step: a float that is not NaN, or the tensor as it was given."""
        if isinstance(self.tilt, torch.Tensor) or not callable(self.tilt):
            return self.tilt
        value = self.tilt(step)
        if isinstance(value, torch.Tensor):
            _check_tilt_tensor(f"tilt({step})", value)
            return value
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
            raise reject(f"tilt({step})", value, "a number from the tilt schedule")
        if self.sampler == "hmc" and self.hmc.delta is None and math.isinf(value):
            raise reject(f"tilt({step})", value, "a finite number, as delta is None")
        return float(value)

    def describe(self) -> dict[str, Any]:
        """Plain values for a checkpoint (a schedule or tensor tilt is not saved)."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "hmc"}
        plain["tilt"] = self.tilt if isinstance(self.tilt, float) else None
        if self.sampler == "hmc":
            plain |= {name: getattr(self.hmc, name) for name in self.hmc.__dataclass_fields__}
            plain["delta"] = None if isinstance(self.hmc.delta, torch.Tensor) else self.hmc.delta
        return plain


def check_parameters(named: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Refuses parameters that no kernel can perturb in place; names the first, or the first overlapping pair."""
    spans: list[tuple[int, int, str]] = []
    for name, parameter in named:
        if parameter.layout is not torch.strided:
            raise reject(name, f"a {parameter.layout} tensor", "a dense tensor")
        if parameter.dtype not in DTYPES:
            expected = "a float32, float64, bfloat16 or float16 tensor"
            raise reject(name, f"a {parameter.dtype} tensor", expected)
        if (cause := why_not(parameter.device)) is not None:
            raise reject(name, f"a tensor on {parameter.device}", f"one that kernels run on ({cause})")
        if not is_dense(parameter):
            raise reject(
                name,
                f"strides {parameter.stride()} for shape {tuple(parameter.shape)}",
                "a dense tensor",
            )
        if parameter.numel():
            begin = parameter.data_ptr()
            spans.append((begin, begin + parameter.numel() * parameter.element_size(), name))
    spans.sort()
    for (_, end, before), (begin, _, after) in itertools.pairwise(spans):
        if begin < end:
            raise reject(after, f"memory shared with {before}", "parameters that do not overlap")
