"""Trains half-precision nets with each rounding of the perturbation, beside float32 parameters under autocast.

A small and a wide MLP, bfloat16 parameters with rounding "nearest" and "stochastic", and float32 parameters under
bfloat16 autocast, by SAM on digits with noisy labels; each seed gives all three the same data, order and initial
weights (rounded to bfloat16 for all). Beside the accuracy: what is left of the ascent, and how far parameters moved.
"""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from bench.command import add_command, command_line, conclude, positive
from bench.record import write_json
from tsam_ext import TSAM

from .data import CLASSES, load
from .report import mean_and_error
from .tasks import of_classes

WIDTHS = {"small": 256, "wide": 3072}
EPOCHS = {"small": 40, "wide": 6}
FIRST_SEED, BATCH, RATE, MOMENTUM, LABEL_NOISE = 31, 64, 0.05, 0.9, 0.3
METHODS = ("nearest", "stochastic", "float32")


@dataclass(frozen=True)
class Run:
    """One training: accuracy of the last epoch, and of its last step what is left of the ascent, and ‖ε‖ over rho."""

    net: str
    method: str
    seed: int
    accuracy: float
    ascent: float
    norm: float
    finite: bool


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    parser = add_command(
        commands, "half-precision", run, __doc__, summary="accuracy with bfloat16 parameters, by rounding of ε"
    )
    parser.add_argument("--nets", nargs="+", choices=[*WIDTHS], default=[*WIDTHS], metavar="NAME",
                        help=f"nets, of {', '.join(WIDTHS)}")  # fmt: skip
    parser.add_argument("--seeds", type=positive, default=6, help="how many seeds")
    parser.add_argument("--epochs", type=positive, help=f"epochs per run (default: {EPOCHS})")
    parser.add_argument("--rho", type=float, default=0.05, help="length of the ascent")


def train(net: str, method: str, seed: int, epochs: int, rho: float) -> Run:
    """One run, a function of its arguments alone."""
    images = load("mnist", LABEL_NOISE, seed)
    width, inputs = WIDTHS[net], images.train_x[0].numel()
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, CLASSES)).to(torch.bfloat16)
    half = method != "float32"
    if not half:
        model.float()
    kind = torch.bfloat16 if half else torch.float32
    rounding: Any = method if half else "nearest"
    optimizer = TSAM(model.parameters(), lr=RATE, momentum=MOMENTUM, rho=rho, radius=0.0, num_samples=1, seed=seed,
                     rounding=rounding)  # fmt: skip
    order = torch.Generator().manual_seed(seed + 1)
    total = torch.zeros(())
    for _ in range(epochs):
        permutation = torch.randperm(len(images.train_x), generator=order)
        for first in range(0, len(permutation), BATCH):
            rows = permutation[first : first + BATCH]
            x, y = images.train_x[rows].to(kind), images.train_y[rows]

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                with nullcontext() if half else torch.autocast("cpu", torch.bfloat16):
                    loss = cross_entropy(model(x).float(), y)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            total += optimizer.step(closure)
    with nullcontext() if half else torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        score = of_classes(model(images.test_x.to(kind)).float(), images.test_y)["accuracy"]
    seen = optimizer.diagnostics
    ascent, norm = float(seen.realised_ascent), float(seen.realised_norm) / rho
    return Run(net, method, seed, score, ascent, norm, math.isfinite(float(total)))


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    jobs = [(net, method, seed) for net in options.nets for seed in seeds for method in METHODS]
    runs = []
    for net, method, seed in tqdm(jobs, desc="training", unit="run"):
        runs.append(train(net, method, seed, options.epochs or EPOCHS[net], options.rho))
        write_json(options.out / "half_precision.json", runs, {"command": command_line(options)})
    print("test accuracy %, mean ± standard error; of the last step the ascent that is left, and ‖ε‖ over rho\n")
    print(
        "| net | elements | parameters | accuracy % | minus nearest | ascent left | norm over rho |\n"
        + "|---" * 7
        + "|"
    )
    for net in options.nets:
        print("\n".join(rows_of(net, [r for r in runs if r.net == net])))
    wrong = [f"{r.net}, {r.method}, seed {r.seed}: a loss that is not finite" for r in runs if not r.finite]
    return conclude(wrong, [], strict=False)


def rows_of(net: str, runs: list[Run]) -> list[str]:
    """A line for each method."""
    by = {method: [r for r in runs if r.method == method] for method in METHODS}
    base = [r.accuracy for r in by["nearest"]]
    width, lines = WIDTHS[net], []
    elements = 197 * width + (width + 1) * width + (width + 1) * CLASSES
    for method, found in by.items():
        mean, error = mean_and_error([r.accuracy for r in found])
        name = "float32, autocast" if method == "float32" else f"bfloat16, {method}"
        gain, spread = mean_and_error([r.accuracy - b for r, b in zip(found, base, strict=True)])
        minus = "" if method == "nearest" else f"{gain:+.2f} ± {spread:.2f}"
        left, norm = (sum(getattr(r, key) for r in found) / len(found) for key in ("ascent", "norm"))
        scores = f"{name} | {mean:.2f} ± {error:.2f} | {minus}"
        lines.append(f"| {net} | {elements / 1e6:.2f} M | {scores} | {left:.2f} | {norm:.2f} |")
    return lines
