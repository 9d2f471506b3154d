"""python -m bench train --sampler hmc: does the sampler sample, on a net that trains?

Trains TSAM with Hamiltonian Monte Carlo and prints, epoch by epoch, what its chain does; then, at the trained weights
and on one minibatch, compares the mean sampled loss at delta with that at delta = 0.
Targets: acceptance from 0.6 to 0.97 and distance moved over rho above 0.3 in the last epoch, and a lift of more than
three standard errors (of batch means, as successive samples of a chain are not independent).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bench.command import conclude
from bench.record import write_json
from tsam_ext import HMC, TSAM

from .data import load
from .methods import MOMENTUM
from .tasks import TASKS

EPOCHS, QUICK_EPOCHS, SEED, BATCH, LEARNING_RATE = 20, 6, 11, 64, 0.01
RHO, DELTA, TILT_OVER_DELTA, NUM_SAMPLES = 0.3, 300.0, 1.1, 3
LIFT_STEPS, LIFT_BURN_IN, LIFT_BATCHES = 400, 50, 20
COLUMNS = ("acceptance", "distance / rho", "ESS", "1 - ESS/s", "sampled loss", "start loss", "test accuracy %")


def _optimizer(model: nn.Module, rate: float, delta: float, seed: int = SEED) -> TSAM:
    options: dict[str, Any] = {"rho": RHO, "num_samples": NUM_SAMPLES, "seed": seed}
    options |= {"sampler": HMC(delta=delta), "tilt": TILT_OVER_DELTA * delta}
    momentum = MOMENTUM if rate else 0.0
    return TSAM(model.parameters(), torch.optim.SGD, lr=rate, momentum=momentum, **options)


def _closure(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def _lift(model: nn.Module, x: Tensor, y: Tensor, delta: float) -> tuple[float, float]:
    """Mean sampled loss at the weights as they are, and its standard error."""
    optimizer, losses = _optimizer(model, 0.0, delta), []
    for step in range(LIFT_BURN_IN + LIFT_STEPS):
        optimizer.step(_closure(model, x, y))
        if step >= LIFT_BURN_IN:
            losses.append(float(optimizer.diagnostics.losses.mean()))
    means = np.array(losses).reshape(LIFT_BATCHES, -1).mean(1)
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(LIFT_BATCHES))


def diverged(rows: list[dict[str, float]], lifted: tuple[float, float], flat: tuple[float, float]) -> list[str]:
    """Where a loss has not stayed finite."""
    found = [
        f"epoch {epoch}: the {name} is not finite"
        for epoch, row in enumerate(rows, 1)
        for name in ("sampled loss", "start loss")
        if not math.isfinite(row[name])
    ]
    ends = ((lifted, "delta"), (flat, "delta 0"))
    return found + [f"the sampled loss at {name} is not finite" for (mean, _), name in ends if not math.isfinite(mean)]


def missed(last: dict[str, float], lifted: tuple[float, float], flat: tuple[float, float]) -> list[str]:
    """The targets that the chain does not reach."""
    found = []
    if not 0.6 <= last["acceptance"] <= 0.97:
        found.append(f"acceptance {last['acceptance']:.3f} in the last epoch, expected 0.6 to 0.97")
    if not last["distance / rho"] > 0.3:
        found.append(f"distance over rho {last['distance / rho']:.3f} in the last epoch, expected above 0.3")
    gap, error = lifted[0] - flat[0], math.hypot(lifted[1], flat[1])
    if not gap > 3 * error:
        found.append(f"sampled loss {gap:+.4f} ± {error:.4f} above that at delta 0, expected more than three errors")
    return found


def run(options: argparse.Namespace, command: str) -> int:
    """The command; returns the exit code."""
    torch.set_num_threads(1)  # the net is small: a second thread would mostly wait
    epochs = options.epochs or (QUICK_EPOCHS if options.quick else EPOCHS)
    delta = DELTA if options.delta is None else options.delta
    task, images = TASKS[f"{options.data}-cnn"], load(options.data, options.label_noise, SEED)
    model = task.initial(SEED)
    optimizer = _optimizer(model, options.lr or LEARNING_RATE, delta)
    order, rows = torch.Generator().manual_seed(SEED + 1), []
    d = sum(p.numel() for p in model.parameters())
    for _ in tqdm(range(epochs), unit="epoch", desc="training"):
        seen: list[list[float]] = []
        permutation = torch.randperm(len(images.train_x), generator=order)
        for first in range(0, len(permutation), BATCH):
            part = permutation[first : first + BATCH]
            loss = optimizer.step(_closure(model, images.train_x[part], images.train_y[part]))
            told = optimizer.diagnostics
            ess = float(told.ess)
            values = [told.acceptance_rate, told.distance, ess, 1 - ess / NUM_SAMPLES, told.losses.mean(), loss]
            seen.append([float(value) for value in values])
        means = [*np.mean(seen, axis=0), task.measure(model, images.test_x, images.test_y)["accuracy"]]
        rows.append(dict(zip(COLUMNS, means, strict=True)))
    part = torch.arange(BATCH)
    lifted, flat = (_lift(model, images.train_x[part], images.train_y[part], at) for at in (delta, 0.0))

    print(
        f"\n{options.data}, {d:,} parameters, rho {RHO}, delta {delta:g}, tilt {TILT_OVER_DELTA * delta:g}, one seed\n"
    )
    print("| epoch | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for epoch, row in enumerate(rows, 1):
        print(f"| {epoch} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    print(f"\nmean sampled loss at the trained weights: {lifted[0]:.4f} ± {lifted[1]:.4f} at delta {delta:g}, ", end="")
    print(f"{flat[0]:.4f} ± {flat[1]:.4f} at delta 0")
    settings = {"command": command, "data": options.data, "delta": delta, "rho": RHO}
    write_json(options.out / "hmc.json", rows, {**settings, "lifted": lifted, "flat": flat})
    return conclude(diverged(rows, lifted, flat), missed(rows[-1], lifted, flat), strict=options.strict)
