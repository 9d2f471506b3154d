"""``python -m bench step``: whole training steps of real models, and which share of them is not forward and backward.

ERM (SGD with momentum), SAM and TSAM by tsam_ext, and TSAM in plain torch (loops, torch._foreach, torch.compile), on
random batches, in turns. Share = 1 - time inside the closure / time of the step, the base optimizer's step included.
The job fails (exit 1) if tsam_ext's share with the sampler ascent, s = 3, is above 2% for a model but the small MLP.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from tsam_ext import _C, TSAM

from . import baselines
from .nets import NETS
from .overhead_report import BUSY
from .record import environment, write_json

BATCH, BUDGET, ROUNDS = 64, 120.0, 10
RHO, TILT, SAMPLES, LEARNING_RATE = 0.05, 2.0, 3, 0.01
ALLOWED = 0.02
WAYS = {
    "erm": "ERM",
    "sam": "SAM, tsam_ext",
    "tsam": "TSAM s=3, tsam_ext",
    "loop": "TSAM s=3, loops over tensors",
    "foreach": "TSAM s=3, torch._foreach",
    "compiled": "TSAM s=3, torch.compile",
}
Closure = Callable[[], Tensor]


@dataclass
class Row:
    """One way on one model: seconds of each step, and those of them spent in forward and backward."""

    model: str
    way: str
    gradients: int
    batch: int
    seconds: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The median over the steps of what is not forward and backward."""
        return median(1 - inside / seconds for inside, seconds in zip(self.inside, self.seconds, strict=True))


class Timed:
    """A closure around a model and a batch; ``seconds`` is the time inside it."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.seconds = 0.0

    def __call__(self) -> Tensor:
        """Forward and backward."""
        start = time.perf_counter()
        loss = cross_entropy(self.model(self.x), self.y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.seconds += time.perf_counter() - start
        return loss.detach()


def stepper(way: str, model: nn.Module) -> tuple[Callable[[Closure], Any], int]:
    """One training step as a function of the closure, and how many gradients it takes."""
    params = list(model.parameters())
    base: dict[str, Any] = {"lr": LEARNING_RATE, "momentum": 0.9}
    if way in ("sam", "tsam"):
        options: dict[str, Any] = {"num_samples": 1, "radius": 0.0} if way == "sam" else {"num_samples": SAMPLES}
        ours = TSAM(params, rho=RHO, tilt=TILT, seed=1, model=model, **options, **base)

        def ours_step(closure: Closure) -> None:
            ours.zero_grad()
            ours.step(closure)

        return ours_step, 2 * options["num_samples"]
    sgd = torch.optim.SGD(params, **base)
    if way == "erm":

        def erm(closure: Closure) -> None:
            sgd.zero_grad()
            closure()
            sgd.step()

        return erm, 1
    settings: dict[str, Any] = {"rho": RHO, "radius": RHO, "tilt": TILT, "num_samples": SAMPLES}
    tensors: list[Tensor] = list(params)
    estimator: baselines.Estimator = (
        baselines.LoopTSAM(tensors, **settings) if way == "loop" else baselines.ForeachTSAM(tensors, **settings)
    )
    if way == "compiled" and isinstance(estimator, baselines.ForeachTSAM):
        baselines.compiled(estimator)

    def step(closure: Closure) -> None:
        estimator.estimate_gradient(closure)
        sgd.step()

    return step, 2 * SAMPLES


def measure(name: str, ways: list[str], batch: int, rounds: int, budget: float, bar: Any) -> list[Row]:
    """Steps of all ways in turns: one to warm up, then rounds while the budget lasts, at least one."""
    x, y = NETS[name].batch(batch)
    rows, steps = [], []
    for way in ways:
        torch.manual_seed(0)
        model = NETS[name].build()
        run, gradients = stepper(way, model)
        rows.append(Row(name, way, gradients, batch))
        steps.append((run, Timed(model, x, y)))
    began = time.perf_counter()
    for turn in range(-1, rounds):
        if turn > 0 and (time.perf_counter() - began) * (1 + 1 / (turn + 1)) > budget:
            break
        for row, (run, closure) in zip(rows, steps, strict=True):
            bar.set_description(f"{name}, {WAYS[row.way]}")
            closure.seconds = 0.0
            start = time.perf_counter()
            run(closure)
            if turn >= 0:
                row.seconds.append(time.perf_counter() - start)
                row.inside.append(closure.seconds)
    return rows


def add_parser(commands: Any) -> None:
    """Adds the command to ``python -m bench``."""
    parser = commands.add_parser(
        "step",
        help="time whole training steps of real models, and what share of them is not forward and backward",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=NETS, default=["mlp", "wrn16-8", "distilbert"],
                        help="models (mlp wrn16-8 distilbert; the others take minutes a step)")  # fmt: skip
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways (all)")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"rows of a batch ({BATCH})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"steps of each way at most ({ROUNDS})")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds a model, about ({BUDGET:.0f})")
    parser.add_argument("--quick", action="store_true", help="the MLP, 2 rounds, no torch.compile, no verdict")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for JSON, Markdown and PNG")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    if options.batch < 1 or options.rounds < 1:
        print("python -m bench step: --batch and --rounds are numbers above 0")
        return 2
    names, rounds = (["mlp"], 2) if options.quick else (options.models, options.rounds)
    ways = [way for way in options.ways if not (options.quick and way == "compiled")]
    load, rows = os.getloadavg()[0], []
    with tqdm(names, unit="model") as bar:
        for name in bar:
            torch._dynamo.reset()
            rows += measure(name, ways, options.batch, rounds, options.budget, bar)
    settings: dict[str, Any] = {"isa": _C.__isa__, "threads": torch.get_num_threads(), "load": load}
    settings |= {"command": command_of(options), "batch": options.batch}
    text = markdown(rows, environment(settings))
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / ("step-quick" if options.quick else "step")
    write_json(stem.with_suffix(".json"), rows, settings)
    stem.with_suffix(".md").write_text(text)
    picture(rows, stem.with_suffix(".png"))
    print(f"\n{text}\nfiles: {stem}.json, .md, .png")
    if options.quick:
        print("no verdict with --quick")
        return 0
    missing = verdict(rows)
    for line in missing:
        print(f"NOT SHOWN: {line}")
    return 1 if missing else 0


def command_of(options: argparse.Namespace) -> str:
    """The command line that does this again."""
    words = ["python -m bench step", f"--models {' '.join(options.models)}", f"--batch {options.batch}"]
    words += [f"--ways {' '.join(options.ways)}"] if options.ways != list(WAYS) else []
    words += [f"--rounds {options.rounds}"] if options.rounds != ROUNDS else []
    return " ".join([*words, "--quick"] if options.quick else words)


def verdict(rows: list[Row]) -> list[str]:
    """Models on which tsam_ext's TSAM spends more than it may outside forward and backward."""
    judged = [row for row in rows if row.way == "tsam" and row.model != "mlp" and row.batch >= BATCH]
    return [
        f"{row.model}: {row.share:.1%} of a step is not forward and backward, more than {ALLOWED:.0%}"
        for row in judged
        if not row.share <= ALLOWED
    ]


def markdown(rows: list[Row], where: dict[str, Any]) -> str:
    """The table and what it has to be quoted with."""
    busy = " (others use this machine: do not quote)" if where["load"] > BUSY else ""
    lines = [
        f"{where['date']}, {where['processor']}, {where['threads']} threads, {where['isa']} kernels, torch "
        f"{where['torch']}, `{where['command']}`, load average {where['load']:.1f} at the start{busy}. Medians.",
        "",
        "| model | way | gradients a step | steps | s a step | steps/s | not forward and backward, ms | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = median(row.seconds)
        outside = median(t - i for t, i in zip(row.seconds, row.inside, strict=True))
        lines.append(
            f"| {row.model} | {WAYS[row.way]} | {row.gradients} | {len(row.seconds)} | {seconds:.3g} | "
            f"{1 / seconds:.3g} | {outside * 1e3:.2f} | {row.share:.2%} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], path: Path) -> None:
    """Bars of a step's time, the share outside forward and backward on top, a panel a model."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.model for row in rows))
    figure, panels = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.4), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        shown = [row for row in rows if row.model == name]
        inside = [median(row.inside) for row in shown]
        outside = [median(t - i for t, i in zip(row.seconds, row.inside, strict=True)) for row in shown]
        places = range(len(shown))
        axes.barh(places, inside, label="forward and backward")
        bars = axes.barh(places, outside, left=inside, label="everything else")
        axes.bar_label(bars, [f"{row.share:.1%}" for row in shown], fontsize=7, padding=2)
        axes.set(title=name, xlabel="seconds a step", yticks=places)
        axes.set_yticklabels([WAYS[row.way] for row in shown], fontsize=7)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
