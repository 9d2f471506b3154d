"""What `sweep` varies: panels of settings around one base, each panel one question.

Base: the main job's data and net, learning rate 0.05. A panel varies one or two things and keeps the rest. Invariant:
the settings of a panel spend the same gradients, or where the panel says so have the same epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .methods import SAM, Method, Options

RATE = 0.05
EPOCHS = 40  # of two gradients per step


@dataclass(frozen=True)
class Setting:
    """One line of a panel: what is shown, and the method with all its settings."""

    label: str
    method: Method

    @property
    def epochs(self) -> int:
        """Epochs in which it spends the gradients of SAM in `EPOCHS`."""
        return max(1, round(EPOCHS * 2 / self.method.gradients))


def _tsam(label: str, gradients: float, **options: Any) -> Setting:
    return Setting(label, Method(label, "tsam", gradients, {"lr": RATE, **options}))


def whole(**options: Any) -> Options:
    """Three samples of whole batches."""
    return {"num_samples": 3, "rho": 0.2, "radius": 1.0, **options}


def parts(samples: int = 16, **options: Any) -> Options:
    """A batch of 64 rows in parts."""
    return {"num_samples": samples, "batch": "split", "rho": 0.05, "radius": 0.0, **options}


def hmc(num_leapfrog_steps: int = 1, burn_in: int = 0, **options: Any) -> Options:
    """Three samples of a chain: N trajectories' steps for each, and one gradient at its start."""
    chain = {"num_leapfrog_steps": num_leapfrog_steps, "burn_in": burn_in, **options}
    return {"num_samples": 3, "rho": 1.0, "tilt": 100.0, "hmc": chain}


def _price(options: Options) -> float:
    chain = options["hmc"]
    return float(1 + chain["num_leapfrog_steps"] * (3 + chain["burn_in"]))


def _hmc(label: str, **options: Any) -> Setting:
    tilt = options.pop("tilt", None)
    rho = options.pop("rho", 1.0)
    made = {**hmc(**options), "rho": rho}
    if tilt is not None:
        made["tilt"] = tilt
    return _tsam(label, _price(made), **made)


SAM_LINE = _tsam("SAM, rho 0.2", 2, **SAM, rho=0.2)  # at this learning rate the best rho of the main job's search
PANELS: dict[str, tuple[str, tuple[Setting, ...]]] = {
    "tilt": (
        "Whole batches, s = 3, rho 0.2: which tilt does anything? (the same epochs for all)",
        (
            SAM_LINE,
            *(
                _tsam(f"radius {radius:g}, t = {tilt:g}", 6, **whole(radius=radius, tilt=tilt))
                for radius in (0.3, 1.0, 3.0)
                for tilt in (-20.0, 0.0, 20.0, 100.0, 400.0)
            ),
        ),
    ),
    "samples": (
        "Whole batches, radius 1, t = 20, rho 0.2: how many samples? (the same epochs for all)",
        tuple(_tsam(f"s = {s}", 2 * s, **whole(num_samples=s, tilt=20.0)) for s in (1, 2, 3, 5)),
    ),
    "parts": (
        "Split batches, radius 0, rho 0.05: how many rows per part, which tilt?",
        tuple(
            _tsam(f"{64 // s} rows, t = {tilt:g}", 2, **parts(s, tilt=tilt))
            for s in (2, 4, 8, 16)
            for tilt in (-4.0, -2.0, -1.0, 0.0, 2.0)
        ),
    ),
    "radius": (
        "Parts of 4 rows: noise before the ascent, and the ascent's length",
        tuple(
            _tsam(f"rho {rho:g}, radius {radius:g}, t = {tilt:g}", 2, **parts(rho=rho, radius=radius, tilt=tilt))
            for rho, radius in ((0.05, 0.0), (0.05, 0.3), (0.05, 1.0), (0.1, 0.0))
            for tilt in (0.0, -2.0)
        ),
    ),
    "schedule": (
        "Parts of 4 rows: a tilt that changes over the run, or that an effective sample size steers",
        (
            _tsam("t = -2", 2, **parts(tilt=-2.0)),
            _tsam("t from 0 to -2", 2, **parts(tilt_from=0.0, tilt_to=-2.0)),
            _tsam("t from -2 to 0", 2, **parts(tilt_from=-2.0, tilt_to=0.0)),
            *(_tsam(f"ESS steered to {share:g} s", 2, **parts(ess_target=share)) for share in (0.3, 0.5, 0.7)),
        ),
    ),
    "every": (
        "SAM, rho 0.2, on each k-th step alone (the same epochs for all)",
        (
            SAM_LINE,
            *(
                _tsam(f"k = {k}, {between}", 1 + 1 / k, **SAM, rho=0.2, every=k, between=between)
                for k in (2, 3, 5)
                for between in ("carry", "plain")
            ),
        ),
    ),
    "hmc": (
        "When hmc pays: three samples, rho 1, t = delta = 100 unless said; SAM and noise at the same gradients",
        (
            SAM_LINE,
            _tsam("noise, radius 1, t = 0", 3, num_samples=3, sampler="noise", radius=1.0, tilt=0.0),
            _tsam("noise, radius 3, t = 0", 3, num_samples=3, sampler="noise", radius=3.0, tilt=0.0),
            _hmc("t = delta = 100"),
            _hmc("t = delta = 0", tilt=0.0),
            _hmc("t = delta = 1000", tilt=1000.0),
            _hmc("t = 100, delta auto", delta="auto"),
            _hmc("t = 400, delta 100", delta=100.0, tilt=400.0),
            _hmc("t = 0, delta 100", delta=100.0, tilt=0.0),
            _hmc("t = delta = 100, rho 3", rho=3.0),
            _hmc("t = delta = -100", tilt=-100.0),
            _hmc("N = 3", num_leapfrog_steps=3),
            _hmc("N = 3, recycled", num_leapfrog_steps=3, recycle=True),
            _hmc("half step size", step_size=0.785),
            _hmc("ball prior", prior="ball"),
            _hmc("fresh chain", chain="fresh"),
            _hmc("fresh chain, burn-in 2", chain="fresh", burn_in=2),
            _hmc("no accept test", metropolis=False),
        ),
    ),
}
SAME_EPOCHS = ("tilt", "samples", "every")


def setting_epochs(panel: str, setting: Setting) -> int:
    """Epochs of one line: the same gradients, or in three panels the same epochs."""
    return EPOCHS if panel in SAME_EPOCHS else setting.epochs
