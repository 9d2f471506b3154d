"""Counts what the CUDA back end launches, moves and computes in a step; no GPU is needed, and nothing is measured.

An estimate runs on stand-in parameters, on the CPU, and each op call is translated into the launches of csrc/cuda
(PASSES), with the words that this way through the kernel moves; instructions come from the library's machine code
(sass.py). Floor of a launch = elements x the largest of 4 words / bandwidth, instructions / issue rate, and those of
float32, integers and float64 / their pipes' rates; launches add up.
Invariant: a test holds the launches against those of the emulated CUDA ops, call by call.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tsam_ext
from tsam_ext import _C, HMC, TSAM, Ascent

from . import sass
from .baselines import LoopTSAM
from .command import add_command, add_nets, cannot_run
from .gpus import GPUS, ISSUED, Gpu
from .meter import SYNCS, Meter
from .nets import NETS
from .record import keep

DEFAULT = "H100 SXM"
WORD = 4  # bytes
SAMPLES = 3
LISTS = ("resnet18", "vit-b16", "distilbert")
SAMPLERS: dict[str, dict[str, Any]] = {
    "noise, s=3": {"sampler": "noise", "num_samples": SAMPLES},
    "ascent, s=3": {"num_samples": SAMPLES},
    "ascent, sphere, s=3": {"num_samples": SAMPLES, "sampler": Ascent(noise="sphere")},
    "SAM (s=1, radius 0)": {"num_samples": 1, "radius": 0.0},
    "hmc gaussian, N=1, s=3": {"sampler": "hmc", "num_samples": SAMPLES},
    "hmc ball, N=1, s=3": {"sampler": HMC(prior="ball"), "num_samples": SAMPLES},
}
BALL_PRIOR = 1  # as the ops number priors


@dataclass(frozen=True)
class Pass:
    """A kernel over a list, by ``lists`` pointers per tensor; 0: one block, on the step's scalars alone.

    ``idle``: the state tells it to return at once.
    """

    kernel: str
    lists: int = 0
    reads: int = 0
    writes: int = 0
    idle: bool = False

    @property
    def words(self) -> int:
        """Words per element."""
        return self.reads + self.writes

    def launches(self, tensors: int) -> int:
        """How many tables it takes (csrc/cuda/apply.cuh), one launch each."""
        return -(-tensors // tensors_per_launch(self.lists)) if self.lists else 1

    def seconds(self, costs: dict[str, sass.Cost], gpu: Gpu) -> tuple[float, float, float, float]:
        """Per element: by the memory, the issue rate, the slower of float32's pipe and the integers', float64's."""
        if self.idle or not self.lists:
            return 0.0, 0.0, 0.0, 0.0
        if self.kernel not in costs:
            raise sass.SassError(f"the library has no loop of {self.kernel} for {gpu.architecture}")
        cost = costs[self.kernel]
        narrow = max(cost.float32 / gpu.rate(gpu.float32), cost.integers / gpu.rate(gpu.integers))
        issued, wide = cost.issued / gpu.rate(ISSUED), cost.float64 / gpu.rate(gpu.float64)
        return WORD * self.words / gpu.bandwidth, issued, narrow, wide


def tensors_per_launch(lists: int, *, few: bool = False) -> int:
    """kTensorsPerLaunch of csrc/cuda/apply.cuh."""
    return ((4096 if few else 32764) - 128 - 8) // (8 * lists + 32)


SCALARS = Pass("finish_sums")
Arguments = dict[str, Any]


def _perturb(a: Arguments) -> list[Pass]:
    sums = [Pass("noise_sum_squares<2>", 2)] if _C.__noises__[a["noise"]][1] else []
    return [*sums, SCALARS, Pass("perturb_chunks<float>", 2, 1, 1 + a["save"]), *[SCALARS] * a["save"]]


def _ascend(a: Arguments) -> list[Pass]:
    reads = 2 + (any(a["adaptive"]) and not a["save"])
    return [Pass("ascend_chunks<float>", 3, reads, 1 + a["save"]), *[SCALARS] * a["save"]]


def _norm(a: Arguments) -> list[Pass]:
    return [Pass("grad_sum_squares<float>", 2, 1 + any(a["adaptive"])), SCALARS]


def _accumulate(a: Arguments) -> list[Pass]:
    """A first gradient whose memory becomes the mean's is not touched."""
    if not a["grads"]:
        return [Pass("accumulate_chunks<float>", 2, idle=True)]
    return [Pass("accumulate_chunks<float>", 2, 1 if a["assigns"] else 2, 1)]


def _place(a: Arguments) -> list[Pass]:
    draw = a["draw"]
    sums = [Pass("noise_sum_squares<5>", 5)] if draw and a["prior"] == BALL_PRIOR else []
    move = Pass("hmc_place_chunks<float>", 5, 1 if draw else 2, 3 if draw else 2)
    return [*sums, *[SCALARS] * draw, move, SCALARS]


def _leapfrog(a: Arguments) -> list[Pass]:
    first, adaptive = a["first"], any(a["adaptive"])
    measure = a["measure"] and not first  # a first substep has the start at hand

    def a_pass(kind: int, reads: int, writes: int) -> Pass:
        return Pass(f"hmc_pass<float, (tsam::cuda::HmcPassKind){kind}, {str(first).lower()}>", 7, reads, writes)

    if a["prior"] != BALL_PRIOR:
        return [SCALARS, a_pass(0, 4 - first + measure, 3), SCALARS]
    kick, drift = a_pass(1, 3 - first + adaptive, 1), a_pass(2, 3 + measure, 3)
    return [SCALARS, kick, SCALARS, drift, *[SCALARS] * a["measure"]]


def _carry(a: Arguments) -> list[Pass]:
    """Of an accepted trajectory, whose gradient is kept; of a rejected one a word less is written.

    Without ``grads`` their own memory becomes the mean, and the other way costs the same two words.
    """
    if not a["grads"]:
        return [Pass("hmc_carry_chunks<float>", 3, 1, 1)]
    return [Pass("hmc_carry_chunks<float>", 3, 1 if a["assigns"] else 2, 2)]


# What each op launches (csrc/cuda/*_cuda.cu), by its arguments; `assigns`: the mean begins with this sample.
PASSES: dict[str, Callable[[Arguments], list[Pass]]] = {
    "perturb_": _perturb,
    "grad_norm_": _norm,
    "ascend_": _ascend,
    "norm_ascend_": lambda a: [*_norm(a), *_ascend(a)],
    "displacement_": lambda a: [Pass("displacement_chunks<float>", 3, 3 if a["grads"] else 2), SCALARS],
    "accumulate_": _accumulate,
    "accumulate_perturb_": lambda a: [*_accumulate(a), *_perturb({**a, "save": False})],
    "take_direction_": lambda a: [
        Pass("direction_sums<float>", 2, 2),
        SCALARS,
        Pass("accumulate_chunks<float>", 2, 2, 1),
    ],
    "add_direction_": lambda a: [*_norm({**a, "adaptive": []}), Pass("accumulate_chunks<float>", 2, 2, 1)],
    "restore_": lambda a: [Pass("copy_chunks<float>", 2, 1, 1)],
    "hmc_place_": _place,
    "hmc_begin_": lambda a: _norm(a) if a["automatic"] else [SCALARS],
    "hmc_leapfrog_": _leapfrog,
    "hmc_end_": lambda a: [Pass("hmc_last_kick<float>", 3, 2 + any(a["adaptive"])), SCALARS],
    "hmc_carry_": _carry,
    "tilt_begin_": lambda a: [SCALARS],
    "tilt_update_": lambda a: [SCALARS],
    "hmc_adapt_": lambda a: [SCALARS],
}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered: the passes of each op call, (op, passes), and how often the host reads a tensor's value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, list[Pass]]] = []
        self.syncs = self._row = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the op, and notes what it would launch."""
        space, name = func._schema.name.split("::")
        self.syncs += name in SYNCS
        if space == "tsam":
            given = {x.name: value for x, value in zip(func._schema.arguments, args, strict=False)}  # but defaults
            self._row = given["row"] if name in ("tilt_update_", "hmc_end_") else self._row
            self.calls.append((name, PASSES[name]({**given, "assigns": self._row == 0})))
        return func(*args, **(kwargs or {}))


class Gradients:
    """A closure whose gradients are made up: ones, for parameters of one element each."""

    def __init__(self, tensors: int) -> None:
        self.params: list[torch.Tensor] = [torch.nn.Parameter(torch.zeros(1)) for _ in range(tensors)]

    def __call__(self) -> torch.Tensor:
        """One gradient."""
        for p in self.params:
            p.grad = torch.ones_like(p)
        return torch.zeros(())


def record(
    options: dict[str, Any], tensors: int, mode: Recorder | None = None, *, keep: bool = False, later: bool = False
) -> Recorder:
    """One estimate's calls, after one that makes the scratch and starts the chain; ``keep``: p.grad is there.

    ``later``: of the step after the first, which with ``every`` is no full one.
    """
    closure, mode = Gradients(tensors), mode or Recorder()
    estimator = TSAM(closure.params, lr=0.0, **options)
    estimator.estimate_gradient(closure)
    if later:
        estimator.apply()
    if not keep:
        for p in closure.params:
            p.grad = None
    with mode:
        estimator.estimate_gradient(closure)
    return mode


def estimates(name: str, costs: dict[str, sass.Cost], gpu: Gpu = GPUS[DEFAULT]) -> list[dict[str, Any]]:
    """The rows of one parameter list: each sampler, and the flow of public TSAM scripts."""
    sizes = [shape.numel() for shape in NETS[name].shapes()]
    elements, rows = sum(sizes), []
    for sampler, options in SAMPLERS.items():
        seen = record(options, len(sizes))
        passes = [p for _, made in seen.calls for p in made]
        row = {
            "list": name, "tensors": len(sizes), "elements": elements, "estimate": sampler, "syncs": seen.syncs,
            "launches": sum(p.launches(len(sizes)) for p in passes), "words": sum(p.words for p in passes),
            "memory": elements * sum(p.seconds(costs, gpu)[0] for p in passes),
            "floor": elements * sum(max(p.seconds(costs, gpu)) for p in passes),
            "passes": [vars(p) for p in passes],
        }  # fmt: skip
        rows.append(row)
    closure = Gradients(len(sizes))
    loops = LoopTSAM(closure.params, rho=0.05, radius=0.05, tilt=1.0, num_samples=SAMPLES)
    with Meter() as meter:
        loops.estimate_gradient(closure)
    made = 2 * SAMPLES * (1 + len(sizes))  # by the stand-in itself
    memory = elements * WORD * loops.words / gpu.bandwidth
    rows.append(
        {"list": name, "tensors": len(sizes), "elements": elements, "estimate": "loops over tensors, s=3",
         "syncs": meter.syncs, "launches": meter.calls - made, "words": loops.words, "memory": memory, "floor": memory}
    )  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]], costs: dict[str, sass.Cost], name: str = DEFAULT) -> str:
    """Two tables: the kernels as these estimates launch them, and the estimates."""
    gpu = GPUS[name]
    used = sorted({tuple(p.items()) for row in rows for p in row.get("passes", ())})
    lines = [
        f"A model of {name}, not a measurement: {gpu.bandwidth / 1e12:g} TB/s, "
        f"{gpu.rate(ISSUED) / 1e12:.1f} T lane-instructions/s, {gpu.rate(gpu.float64) / 1e12:.2f} T of float64.",
        "",
        "| kernel | read | written | instructions per element | of float64 "
        "| ps by memory | ps by instructions | ps by pipe | ps by float64 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for given in used:
        one = Pass(**dict(given))
        if one.lists and not one.idle:
            times = " | ".join(f"{1e12 * seconds:.2f}" for seconds in one.seconds(costs, gpu))
            kernel, cost = one.kernel.replace("tsam::cuda::", ""), costs[one.kernel]
            counts = f"{cost.issued:.2f} | {cost.float64:.2f}"
            lines.append(f"| `{kernel}` | {one.reads} | {one.writes} | {counts} | {times} |")
    lines += [
        "",
        "| list | estimate | launches (loops: op calls) | host reads | words | floor µs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        title = f"{row['list']} ({row['tensors']} tensors, {row['elements'] / 1e6:.1f} M)"
        cells = (title, row["estimate"], row["launches"], row["syncs"], row["words"], f"{1e6 * row['floor']:.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def add_parser(commands: Any) -> None:
    """Adds the command to python -m bench."""
    summary = "count what the CUDA ops launch, move and compute in a step; no GPU is needed"
    parser = add_command(commands, "gpu-cost", run, __doc__, summary=summary)
    own = Path(tsam_ext.__file__).with_name(sass.LIBRARY)
    parser.add_argument("--library", type=Path, default=own, help="a wheel or libtsam_cuda.so")
    parser.add_argument("--gpu", choices=GPUS, default=DEFAULT, help="whose rates")
    add_nets(parser, "--lists", LISTS, "parameter lists")


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    try:
        gpu = GPUS[options.gpu]
        with tempfile.TemporaryDirectory() as scratch:
            costs = sass.costs(sass.library_in(options.library, Path(scratch)), gpu.architecture)
        rows = [row for name in options.lists for row in estimates(name, costs, gpu)]
    except sass.SassError as error:
        return cannot_run(options, error)
    settings = {"model": options.gpu, **vars(gpu), "instructions": {name: vars(cost) for name, cost in costs.items()}}
    keep(options.out / "gpu-cost", rows, settings, markdown(rows, costs, options.gpu))
    return 0
