"""The methods: what each is, what a step of it costs, and the settings that are searched for it.

A method is a way to take one step: SGD with momentum alone (ERM), TSAM with options, or a peer (peers.py). Its grid has
the same number of settings for all methods: three learning rates times three values of what is its own. `chosen` are
the settings of the main job, found once by `python -m bench train --tune` on seeds that the job does not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tsam_ext import HMC, TSAM

from . import peers

MOMENTUM = 0.9
Closure = Callable[[], Tensor]
Options = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """``kind`` is "sgd", "tsam" or a peer's name; ``options`` are fixed, ``own`` are the values that a search tries.

    ``gradients``: whole-batch gradients per step, on average.
    """

    name: str
    kind: str
    gradients: float
    options: Options = field(default_factory=dict)
    own: tuple[Options, ...] = ({},)
    rates: tuple[float, ...] = (0.025, 0.05, 0.1)
    chosen: Options = field(default_factory=dict)  # of the main job: lr and its own

    def optimizer(self, model: nn.Module, settings: Options, seed: int, steps: int) -> Optimizer:
        """A fresh optimizer for ``model`` and a run of ``steps`` steps."""
        options = {"momentum": MOMENTUM, **self.options, **settings}
        if self.kind == "sgd":
            return SGD(model.parameters(), **options)
        if self.kind == "tsam":
            return _tsam(model, options, seed, steps)
        return peers.PEERS[self.kind].optimizer(model, options)

    def step(self, optimizer: Optimizer, closure: Closure) -> Tensor:
        """One step; ``closure`` makes the loss and its gradients, on the rows of the current pass."""
        if self.kind in ("sgd", "tsam"):
            optimizer.zero_grad()
            take: Any = optimizer.step  # torch annotates closures as returning float
            loss: Tensor = take(closure)
            return loss.detach()
        return peers.PEERS[self.kind].step(optimizer, closure)

    @property
    def price(self) -> float:
        """Relative time of a step by its passes: those over parts of the batch are bound by overhead."""
        parts = self.options.get("num_samples", 1) if self.options.get("batch") == "split" else 1
        return float(self.gradients * parts**0.75)


def _groups(model: nn.Module, options: Options) -> Any:
    """All parameters; with norm_only those of normalisation layers, and the rest in a group whose rho is 0."""
    if not options.pop("norm_only", False):
        return model.parameters()
    inside = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [{"params": [p for p in model.parameters() if id(p) in inside]}, {"params": rest, "rho": 0.0}]


NORMS = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


def _tsam(model: nn.Module, options: Options, seed: int, steps: int) -> TSAM:
    """TSAM from options of JSON: "hmc" is a sampler's, a tilt may run between two values or follow the ESS."""
    if "hmc" in options:
        options["sampler"] = HMC(**options.pop("hmc"))
    steered = Steered(options.pop("ess_target")) if "ess_target" in options else None
    if steered is not None:
        options["tilt"] = steered
    elif "tilt_from" in options:
        first, last = options.pop("tilt_from"), options.pop("tilt_to")
        options["tilt"] = lambda step: first + (last - first) * min(1.0, step / steps)
    made = TSAM(_groups(model, options), SGD, seed=seed, **options)
    if steered is not None:
        steered.optimizer = made
    return made


class Steered:
    """A negative tilt that grows while the last step's ESS is above ``share`` of the samples, and falls while below."""

    def __init__(self, share: float) -> None:
        self.share, self.tilt = share, -0.5
        self.optimizer: TSAM | None = None

    def __call__(self, step: int) -> float:
        """The tilt of this step."""
        if step > 0 and self.optimizer is not None:
            told = self.optimizer.diagnostics
            gap = float(told.ess) / len(told.weights) - self.share
            self.tilt = -min(8.0, max(0.01, -self.tilt * math.exp(0.1 * gap)))
        return self.tilt


SAM: Options = {"num_samples": 1, "radius": 0.0}
WHOLE: Options = {"num_samples": 3}
PARTS: Options = {"num_samples": 16, "batch": "split", "radius": 0.0}


def carried(name: str, options: Options, every: int, own: tuple[Options, ...], **more: Any) -> Method:
    """A method of two gradients a step that samples each ``every``-th step alone."""
    return Method(f"{name} every {every}", "tsam", 1 + 1 / every, {**options, "every": every}, own, **more)


def grid(**values: tuple[float, ...]) -> tuple[Options, ...]:
    """All combinations of the values of some options."""
    return tuple(dict(zip(values, one, strict=True)) for one in product(*values.values()))


RHOS = grid(rho=(0.2, 0.4, 0.8))
LOW, HIGH = (0.025, 0.05, 0.1), (0.05, 0.1, 0.2)
METHODS: tuple[Method, ...] = (
    Method(
        "ERM", "sgd", 1, {}, grid(weight_decay=(0.004, 0.01, 0.02)), (0.1, 0.2, 0.4), {"lr": 0.2, "weight_decay": 0.01}
    ),
    Method("SAM", "tsam", 2, SAM, RHOS, HIGH, {"lr": 0.1, "rho": 0.4}),
    carried("SAM", SAM, 3, grid(rho=(0.1, 0.2, 0.4)), rates=LOW, chosen={"lr": 0.05, "rho": 0.2}),
    Method("TSAM whole", "tsam", 6, {**WHOLE, "radius": 1.0, "tilt": 20.0}, RHOS, HIGH, {"lr": 0.1, "rho": 0.4}),
    Method(
        "TSAM split", "tsam", 2, {**PARTS, "rho": 0.05}, grid(tilt=(-1.0, -2.0, -3.0)), LOW, {"lr": 0.05, "tilt": -2.0}
    ),
    Method(
        "tilt alone",
        "tsam",
        1,
        {**PARTS, "sampler": "noise"},
        grid(tilt=(-1.0, -2.0, -4.0)),
        HIGH,
        {"lr": 0.1, "tilt": -2.0},
    ),
    Method(
        "ascent alone", "tsam", 2, {**PARTS, "tilt": 0.0}, grid(rho=(0.05, 0.1, 0.2)), LOW, {"lr": 0.05, "rho": 0.1}
    ),
)
"""Those of the main job; the last two are TSAM split without its ascent and without its tilt."""
