"""torch.compile over functions that take steps of TSAM: the graph breaks there, as it does at torch's optimizers.

Laws: with backend "eager" the compiled function does what it does uncompiled, bit for bit, whichever way a step is
written; what the user's model computes is compiled, and nothing of this package is; later steps compile nothing.
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tsam_ext
from tsam_ext import TSAM, Sample, tilted_loss

OURS = f"{Path(tsam_ext.__file__).parent}{os.sep}"
SAMPLERS: dict[str, dict[str, Any]] = {
    "ascent": {},
    "noise": {"sampler": "noise"},
    "hmc": {"sampler": "hmc", "delta": 3.0},
    "every": {"every": 2},
    "split": {"batch": "split"},
}


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs a graph as it is and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    @property
    def nodes(self) -> list[torch.fx.Node]:
        return [node for graph in self.graphs for node in graph.graph.nodes if node.op.startswith("call_")]

    def calls(self, name: str) -> int:
        """How many calls whose target has ``name`` in it stand in the graphs."""
        return sum(name in str(node.target) for node in self.nodes)


class Net(nn.Module):
    """Of a class of the user's: torch's own are left alone where the frame around them is not compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.last(torch.tanh(self.first(x)))
        return hidden


class Job:
    """Twelve rows for a net, and the functions that take one step on them."""

    def __init__(self, *base: Any, compiled_net: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.x, self.y, self.net = torch.randn(12, 5), torch.randint(0, 3, (12,)), Net()
        self.optimizer = tsam(self.net.parameters(), *base, **{"lr": 0.1, "seed": 3, "rho": 0.3, **options})
        self.model = self.net if compiled_net is None else torch.compile(self.net, backend=compiled_net)

    def loss(self) -> Tensor:
        x, y = self.optimizer.part(self.x, self.y)
        loss = cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def step(self) -> Tensor:
        loss: Tensor = self.optimizer.step(lambda: self.loss())
        return loss

    def clipped(self) -> Tensor:
        loss = self.optimizer.estimate_gradient(lambda: self.loss())
        nn.utils.clip_grad_norm_(self.net.parameters(), 0.1)
        self.optimizer.apply()
        return loss

    def loop(self) -> Tensor:
        for sample in self.optimizer.samples():
            with sample:
                loss = self.loss()
                sample.record(loss)
        self.optimizer.apply()
        return loss

    def moved(self) -> Tensor:
        """A step, and the loss where the next one's noise leads."""
        self.optimizer.step(self.loss)
        with self.optimizer.perturbed():
            return self.model(self.x).sum()

    def halves(self) -> Tensor:
        self.optimizer.zero_grad()
        self.loss()
        self.optimizer.first_step(zero_grad=True)
        self.loss()
        self.optimizer.second_step()
        return self.model(self.x).sum()

    def bits(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])


WAYS = ("step", "clipped", "loop", "moved")


def train(job: Job, way: str, backend: Any = None, steps: int = 3) -> tuple[Tensor, list[float]]:
    """The parameters after some steps, and what each returned."""
    run = getattr(job, way)
    run = run if backend is None else torch.compile(run, backend=backend)
    losses = [float(run().detach()) for _ in range(steps)]
    return job.bits(), losses


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_step_is_the_step(way: str, sampler: str) -> None:
    want, losses = train(Job(**SAMPLERS[sampler]), way)
    graphs = Graphs()
    got, compiled_losses = train(Job(**SAMPLERS[sampler]), way, graphs)
    assert torch.equal(got, want) and compiled_losses == losses
    assert graphs.calls("linear") >= 2
    assert not graphs.calls("tsam")
    assert not [node for node in graphs.nodes if OURS in (node.meta.get("stack_trace") or "")]


def test_both_halves_of_sam_too() -> None:
    options = {"num_samples": 1, "radius": 0.0}
    want, losses = train(Job(**options), "halves")
    got, compiled_losses = train(Job(**options), "halves", Graphs())
    assert torch.equal(got, want) and compiled_losses == losses


@pytest.mark.parametrize("way", ["step", "loop"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_later_steps_compile_nothing(base: Any, way: str) -> None:
    graphs = Graphs()
    job = Job(base, momentum=0.9) if base is torch.optim.SGD else Job(base)
    scheduler = torch.optim.lr_scheduler.StepLR(job.optimizer, 2)
    run = torch.compile(getattr(job, way), backend=graphs)
    counts = []
    for _ in range(8):
        run()
        scheduler.step()
        counts.append(len(graphs.graphs))
    assert counts[0] > 0 and counts[3:] == counts[3:4] * 5


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_stays_compiled_inside_a_step(way: str) -> None:
    """With and without a compiled function around the step."""
    want, losses = train(Job(), way)
    for around in (None, "eager"):
        torch._dynamo.reset()
        graphs = Graphs()
        got, compiled_losses = train(Job(compiled_net=graphs), way, around)
        assert torch.equal(got, want) and compiled_losses == losses
        assert graphs.calls("linear") >= 2


def test_the_base_takes_its_own_step() -> None:
    """Not one that Dynamo has traced, whose bits differ on some versions of torch."""
    graphs = Graphs()
    train(Job(torch.optim.AdamW), "step", graphs)
    assert not graphs.calls("sqrt") and not graphs.calls("lerp")


def test_what_a_loop_leaves_early_is_put_back() -> None:
    job = Job()
    before = job.bits()

    def run() -> Tensor:
        for sample in job.optimizer.samples():
            with sample:
                sample.record(job.loss())
            break
        return job.x + 1

    torch.compile(run, backend="eager")()
    assert torch.equal(job.bits(), before)
    with pytest.raises(RuntimeError, match="needs an estimate"):
        job.optimizer.apply()


def test_an_exception_in_a_compiled_closure_puts_everything_back() -> None:
    job = Job()
    before = job.bits()
    passes = []

    def closure() -> Tensor:
        loss = job.loss()
        passes.append(loss)
        if len(passes) == 3:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        torch.compile(lambda: job.optimizer.step(closure), backend="eager")()
    assert torch.equal(job.bits(), before)
    assert all(p.grad is None for p in job.net.parameters())


def test_fullgraph_says_what_breaks_the_graph() -> None:
    job = Job()
    before = job.bits()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a step of TSAM"):
        torch.compile(job.step, backend="eager", fullgraph=True)()
    assert torch.equal(job.bits(), before)


def test_diagnostics_are_read_in_a_compiled_function() -> None:
    job = Job()
    job.step()

    def run() -> Tensor:
        return job.optimizer.diagnostics.ess + job.optimizer.diagnostics.losses.sum()

    want = run()
    for _ in range(3):
        assert torch.equal(torch.compile(run, backend="eager")(), want)
        job.step()
        want = run()


def test_functions_of_the_package_are_still_traced() -> None:
    """Only steps break the graph; an op next to one is compiled."""
    graphs = Graphs()
    losses = torch.tensor([1.0, 2.0])
    got = torch.compile(lambda: tilted_loss(losses, 1.0), backend=graphs, fullgraph=True)()
    assert got == tilted_loss(losses, 1.0)
    assert len(graphs.graphs) == 1


def test_methods_keep_their_names_and_signatures() -> None:
    for method in (TSAM.step, TSAM.samples, TSAM.estimate_gradient, TSAM.part, TSAM.perturbed, Sample.record):
        assert method.__doc__ and method.__module__.startswith("tsam_ext.")
    assert list(inspect.signature(TSAM.samples).parameters) == ["self"]
    assert list(inspect.signature(TSAM.perturbed).parameters) == ["self", "sample"]
    assert list(inspect.signature(TSAM.step).parameters) == ["self", "closure"]


FIRST = """
import torch, torch._dynamo
import tsam_ext
x = torch.ones(2, requires_grad=True)
optimizer = tsam_ext.TSAM([x], lr=0.1, num_samples=3, seed=0)
seen = []

def backend(graph, inputs):
    seen.append(graph.print_readable(print_output=False))
    return graph.forward

def step():
    for sample in optimizer.samples():
        with sample:
            loss = (x**2).sum()
            loss.backward()
            sample.record(loss)
    optimizer.apply()

torch.compile(step, backend=backend)()
assert not [code for code in seen if "tsam" in code], seen
assert (x < 1).all()
"""


def test_dynamo_may_be_imported_first() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ for torch.compile")
def test_inductor_too() -> None:
    want, losses = train(Job(), "step")
    got, compiled_losses = train(Job(), "step", "inductor")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
