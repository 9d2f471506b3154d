"""What holds for all groups of one TSAM, checked once, and the three keys that a group may set of its own.

Invariant: a Settings object and a checked group hold only values that every later layer accepts, so that nothing below
checks them again.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from .engine.checks import (
    ROUNDINGS,
    TSAM,
    check_choice,
    check_flag,
    check_int,
    check_length,
    check_scalar_tensor,
    check_tilt,
    refuse,
    shown,
)
from .engine.notices import warn
from .samplers import MAX_SAMPLES, Sampler, owner_of, sampler_of, shown_setting

Tilt = float | Tensor | Callable[[int], float | Tensor]
Length = float | Callable[[int], float]
BATCHES, BETWEEN = ("whole", "split"), ("carry", "plain")
GROUP_KEYS = ("rho", "radius", "adaptive")
FOR_ALL = {"tilt", "num_samples", "sampler", "batch", "every", "skip_nonfinite_loss", "same_masks", "generators"}
FOR_ALL |= {"seed", "model", "scaler", "rounding", "between", "process_group", "sync", "reduction", "weigh_rows"}
TILT = "a number (inf and -inf too), a 0-dim tensor or a function of the step"


@dataclass(frozen=True, eq=False, repr=False)
class Settings:
    """The settings of one :class:`tsam_ext.TSAM`, whose docstring explains them."""

    tilt: Tilt
    num_samples: int
    sampler: Sampler
    batch: Literal["whole", "split"]
    every: int
    skip_nonfinite_loss: bool
    same_masks: bool
    generators: tuple[torch.Generator, ...]
    capturable: bool
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    between: Literal["carry", "plain"] | None = None

    def __post_init__(self) -> None:
        set_own = object.__setattr__  # Python's own numbers in place of NumPy's, objects in place of names
        set_own(self, "sampler", sampler_of(self.sampler))
        if isinstance(self.tilt, Tensor):
            check_scalar_tensor(TSAM, "tilt", self.tilt)
        elif not callable(self.tilt):
            set_own(self, "tilt", _checked_tilt("tilt", self.tilt, self.sampler))
        for name in ("skip_nonfinite_loss", "same_masks", "capturable"):
            check_flag(TSAM, name, getattr(self, name))
        for i, generator in enumerate(self.generators):
            if not isinstance(generator, torch.Generator):
                raise refuse(TSAM, f"generators[{i}]", shown(generator), "a torch.Generator", TypeError)
        set_own(self, "num_samples", check_int(TSAM, "num_samples", self.num_samples, 1, MAX_SAMPLES))
        check_choice(TSAM, "batch", self.batch, BATCHES)
        check_choice(TSAM, "rounding", self.rounding, ROUNDINGS)
        set_own(self, "every", check_int(TSAM, "every", self.every, 1, 1 << 31))
        if self.between is not None:
            check_choice(TSAM, "between", self.between, BETWEEN)
        if self.capturable:
            # What the host decides anew each step, or does to generators, a replay would not.
            if self.every != 1:
                raise refuse(TSAM, "every", self.every, "1, as capturable is True")
            if self.same_masks:
                raise refuse(TSAM, "same_masks", True, "False, as capturable is True")
            if not isinstance(self.tilt, (float, Tensor)):
                raise refuse(TSAM, "tilt", "a function", "a number or a 0-dim tensor, as capturable is True")
        self.sampler.check_settings(
            num_samples=self.num_samples, batch=self.batch, same_masks=self.same_masks, capturable=self.capturable
        )
        if self.split and self.num_samples == 1:
            raise refuse(TSAM, "num_samples", 1, "2 or more, one for each part, as batch is 'split'")

    def warn_of_idle_tilt(self) -> None:
        """Says that a tilt was asked for where one sample has nothing to weigh."""
        asked = not isinstance(self.tilt, float) or self.tilt not in (0.0, 1.0)  # 1.0 is the default
        if asked and self.num_samples == 1 and not self.sampler.tilts_one:
            warn("num_samples is 1, and one sample has nothing to weigh: the tilt does nothing. TSAM takes 2 or more.")

    def check_two_steps(self, name: str, *, draws: bool) -> None:
        """RuntimeError unless a step is one ascent and one gradient on the whole batch; ``draws``: there is noise."""
        alike = self.sampler.two_steps and self.num_samples == 1 and self.batch == "whole" and self.every == 1
        if draws or not alike:
            raise RuntimeError(
                f"TSAM: {name}() is SAM's two-step form and needs num_samples=1, radius=0, the default sampler, "
                "batch='whole' and every=1; use the samples() loop or step(closure) with these settings."
            )

    @property
    def split(self) -> bool:
        """Whether each sample sees a part of the batch."""
        return self.batch == "split"

    @property
    def default_radius(self) -> float | None:
        """The radius of groups that set none; ``None``: their rho."""
        return self.sampler.default_radius(self.num_samples)

    @property
    def carries(self) -> bool:
        """Whether the steps between those that sample add what these have left."""
        default = "carry" if self.sampler.carries else "plain"
        return self.every > 1 and (self.between or default) == "carry"

    def is_plain(self, step: int | Tensor) -> bool:
        """Whether ``every`` leaves this step to the plain gradient. With 1 a step on the device is not read."""
        return self.every > 1 and int(step) % self.every != 0

    def tilt_at(self, step: int | Tensor) -> float | Tensor:
        """The tilt of one step: a float that is not NaN, or the tensor as it was given."""
        if isinstance(self.tilt, (float, Tensor)) or not callable(self.tilt):
            return self.tilt
        value, name = self.tilt(int(step)), f"tilt({int(step)})"
        if isinstance(value, Tensor):
            return check_scalar_tensor(TSAM, name, value)
        return _checked_tilt(name, value, self.sampler)

    def shown(self) -> str:
        """The settings in a line; of tensors the form alone."""
        return ", ".join(f"{field.name}={shown_setting(getattr(self, field.name))}" for field in fields(self))

    @property
    def compared(self) -> str:
        """The settings as ranks compare them: without generators, which are objects of each."""
        names = (field.name for field in fields(self) if field.name != "generators")
        return ", ".join(f"{name}={shown_setting(getattr(self, name))}" for name in names)

    def __repr__(self) -> str:
        return f"Settings({self.shown()})"


def _checked_tilt(argument: str, tilt: object, sampler: Sampler) -> float:
    if isinstance(tilt, bool) or not isinstance(tilt, numbers.Real):
        raise refuse(TSAM, argument, shown(tilt), TILT, TypeError)
    number = check_tilt(TSAM, tilt, argument=argument, expected=TILT)
    sampler.check_tilt(argument, number)
    return number


def check_group_values(group: dict[str, Any], where: str, names: Mapping[str, str]) -> None:
    """Checks ``rho``, ``radius`` and ``adaptive`` where present; makes them Python's own numbers.

    ``names``: the keys that the three have in a group.
    """
    for key in ("rho", "radius"):
        name = names[key]
        if name in group and not callable(group[name]) and (key == "rho" or group[name] is not None):
            expected = "a finite number not below 0, or a function of the step"
            expected = expected if key == "rho" else f"None, {expected}"
            group[name] = check_length(TSAM, f"{where}{name}", group[name], expected)
    if names["adaptive"] in group:
        check_flag(TSAM, where + names["adaptive"], group[names["adaptive"]])


def check_group_options(
    group: Mapping[str, Any], where: str, names: Mapping[str, str], sampler: Sampler, base_options: Container[str]
) -> None:
    """Refuses settings of TSAM's or of a sampler's in a group, but for those that are the base optimizer's own."""
    for key in group:
        if key in base_options:
            continue
        if key in FOR_ALL:
            raise refuse(TSAM, f"{where}{key}", shown(group[key]), "one value for all groups, given to TSAM itself")
        if owner := owner_of(key, sampler):
            expected = f"no such key: it belongs to the sampler, sampler={owner}({key}=...)"
            raise refuse(TSAM, f"{where}{key}", shown(group[key]), expected)
        if key.startswith("tsam_") and key not in names.values():
            expected = f"no such key (ours are {', '.join(names.values())})"
            raise refuse(TSAM, f"{where}{key}", shown(group[key]), expected)
