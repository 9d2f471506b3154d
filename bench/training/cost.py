"""Times the same run by each method, each in a fresh process, and takes its peak memory.

ERM, SAM and TSAM by this package, as Python loops, in torch._foreach and by pytorch_optimizer, carried SAM, and
Hamiltonian TSAM by this package and as Python loops, on the data of the main job with its perceptron or a wide one.
Seconds are of processor time on one thread, per step; memory is the peak over the process's memory before the first
step, in copies of the parameters (P); the processes take turns, round by round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from tqdm import tqdm

from bench import baselines, record
from bench.command import add_command, add_rounds, conclude, positive, rounds_of

from .data import CLASSES, load
from .peers import PEERS

NETS = {"mlp": 64, "wide": 3072}
STEPS = {"mlp": 320, "wide": 24}
WARM_UP, BATCH, SEED, LABEL_NOISE = 2, 64, 11, 0.3
RHO, RADIUS, TILT, SAMPLES = 0.1, 1.0, 20.0, 3
BASE: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
LARGE = 10_000_000  # bytes of parameters; of less the allocator's own habits decide what a process holds
GRADIENTS = {
    "ERM": 1.0,
    "SAM": 2.0,
    "SAM, pytorch_optimizer": 2.0,
    "SAM every 3": 4 / 3,
    "TSAM": 2.0 * SAMPLES,
    "TSAM, loops": 2.0 * SAMPLES,
    "TSAM, torch._foreach": 2.0 * SAMPLES,
    "TSAM hmc": 1.0 + SAMPLES,
    "TSAM hmc, loops": 1.0 + SAMPLES,
}
WAYS = tuple(GRADIENTS)
Closure = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One process: seconds per step, peak bytes over the start, bytes of the parameters, last loss."""

    net: str
    way: str
    seconds: float
    peak: int
    parameters: int
    loss: float


def stepper(way: str, model: nn.Module) -> Callable[[Closure], Tensor]:
    """One step of training as a function of the closure."""
    from tsam_ext import HMC, TSAM

    params: list[Tensor] = list(model.parameters())
    tsam: dict[str, Any] = {
        "SAM": {"num_samples": 1, "radius": 0.0, "rho": RHO},
        "SAM every 3": {"num_samples": 1, "radius": 0.0, "rho": RHO, "every": 3},
        "TSAM": {"num_samples": SAMPLES, "radius": RADIUS, "rho": RHO, "tilt": TILT},
        "TSAM hmc": {"num_samples": SAMPLES, "rho": RADIUS, "tilt": TILT, "sampler": HMC()},
    }
    if way in tsam:
        ours: Any = TSAM(params, SGD, seed=SEED, **tsam[way], **BASE)

        def fused(closure: Closure) -> Tensor:
            ours.zero_grad()
            loss: Tensor = ours.step(closure)
            return loss

        return fused
    if way == "SAM, pytorch_optimizer":
        library = PEERS["sam"].optimizer(model, {"rho": RHO, **BASE})
        return partial(PEERS["sam"].step, library)
    sgd = SGD(params, **BASE)
    settings: dict[str, Any] = {"rho": RHO, "radius": RADIUS, "tilt": TILT, "num_samples": SAMPLES}
    estimators: dict[str, Callable[[], baselines.Estimator]] = {
        "TSAM, loops": lambda: baselines.LoopTSAM(params, **settings),
        "TSAM, torch._foreach": lambda: baselines.ForeachTSAM(params, **settings),
        "TSAM hmc, loops": lambda: baselines.LoopHMC(params, rho=RADIUS, delta=TILT, tilt=TILT, num_samples=SAMPLES),
    }
    estimator = estimators[way]() if way in estimators else None

    def plain(closure: Closure) -> Tensor:
        sgd.zero_grad()
        loss = closure() if estimator is None else estimator.estimate_gradient(closure)
        sgd.step()
        return torch.as_tensor(loss)

    return plain


def _resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def measure(net: str, way: str, steps: int) -> Row:
    """One run in this process."""
    torch.set_num_threads(1)
    parts, width = load("mnist", LABEL_NOISE, SEED), NETS[net]
    torch.manual_seed(SEED)
    hidden = [nn.Linear(196, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, CLASSES))
    order = torch.Generator().manual_seed(SEED)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, seconds, loss = _resident("VmRSS"), 0.0, torch.zeros(())
    step = stepper(way, model)
    for i in range(WARM_UP + steps):
        rows = torch.randint(0, len(parts.train_x), (BATCH,), generator=order)
        x, y = parts.train_x[rows], parts.train_y[rows]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            found = cross_entropy(model(x), y)
            found.backward()  # type: ignore[no-untyped-call]
            return found

        begin = time.process_time()
        loss = step(closure)
        seconds += time.process_time() - begin if i >= WARM_UP else 0.0
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Row(net, way, seconds / steps, _resident("VmHWM") - start, size, float(loss.detach()))


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    parser = add_command(commands, "cost", run, __doc__, summary="seconds and memory of the same run by each method")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET", help="mlp: 17 thousand "
                        "parameters; wide: 10 million")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY",
                        help=f"of {', '.join(WAYS)} ")  # fmt: skip
    parser.add_argument("--steps", type=positive, help=f"steps per run (default: {STEPS['mlp']} and {STEPS['wide']})")
    parser.add_argument("--quick", action="store_true", help="the small net, 8 steps, 1 round")
    add_rounds(parser, 5, 1)


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    where = {**record.begin(options), "threads": 1}  # of each run
    nets = ["mlp"] if options.quick else options.nets
    jobs = [
        (net, way, options.steps or (8 if options.quick else STEPS[net]))
        for net in nets
        for _ in range(rounds_of(options))
        for way in options.ways
    ]
    context, rows = multiprocessing.get_context("spawn"), []
    for net, way, steps in tqdm(jobs, desc="runs", disable=None):
        with ProcessPoolExecutor(1, mp_context=context) as pool:  # a fresh process: memory that was freed is not reused
            rows.append(pool.submit(measure, net, way, steps).result())
    text = "\n".join(
        [record.heading(record.environment(where)), "", *(table([r for r in rows if r.net == n]) for n in nets)]
    )
    record.keep(options.out / ("cost-quick" if options.quick else "cost"), rows, where, text)
    return conclude([f"{r.net}, {r.way}: the loss is not finite" for r in rows if not np.isfinite(r.loss)])


def table(rows: list[Row]) -> str:
    """A net: a line for each way, medians and quartiles over the rounds, ratios to ERM in turns."""
    from .report import markdown

    by = {way: [r for r in rows if r.way == way] for way in dict.fromkeys(r.way for r in rows)}
    cells = []
    for way, mine in by.items():
        ms = np.array([r.seconds for r in mine]) * 1e3
        low, middle, high = np.quantile(ms, (0.25, 0.5, 0.75))
        erm = np.array([r.seconds for r in by.get("ERM", [])]) * 1e3
        ratio = f"{np.median(ms / erm):.2f}" if len(erm) == len(ms) else ""
        copies = np.median([r.peak / r.parameters for r in mine]) if mine[0].parameters > LARGE else np.nan
        gradients, memory = f"{GRADIENTS[way]:.3g}", "" if np.isnan(copies) else f"{copies:.1f}"
        cells.append([way, gradients, f"{middle:.2f} [{low:.2f}, {high:.2f}]", ratio, memory])
    size = rows[0].parameters / 4e6
    head = ["method", "gradients per step", "ms per step [quartiles]", "over ERM", "peak memory, P"]
    return f"### {rows[0].net}, {size:.2f} M parameters\n\n{markdown(head, cells)}\n"
