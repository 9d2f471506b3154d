"""Whatever a metric does and however it ends, nothing of it stays; and what it cannot measure is refused by name.

Laws: parameters, their p.grad, buffers and torch's generator have the bits from before, after a value, an exception in
the loss at any pass, and Ctrl-C in the loss or in the progress callback; a refusal comes before the loss has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rank_training import rows, squared_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tsam_ext import metrics

METRICS: dict[str, Callable[..., Any]] = {
    "eigenvalues": lambda o, **k: metrics.hessian_eigenvalues(o, 2, tolerance=0.5, **k),
    "trace": lambda o, **k: metrics.hessian_trace(o, 2, **k),
    "average": lambda o, **k: metrics.average_sharpness(o, 0.3, num_samples=2, **k),
    "ascent": lambda o, **k: metrics.ascent_sharpness(o, 0.3, group_size=3, **k),
    "tilted": lambda o, **k: metrics.tilted_objective(o, 1.0, 0.3, num_samples=2, **k),
    "surface": lambda o, **k: metrics.surface(o, [-1.0, 0.5], **k),
}


class Counting(nn.Module):
    """A net whose every forward moves buffers, one of them in place and one by another object, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("nothing", None)
        self.register_buffer("wide", torch.zeros(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        """The layers."""
        self.calls += 1
        self.seen = self.seen + 1
        return self.layers(x)


class Scene:
    """A net, its loader, and all that has to stay as it is; the loss raises ``error`` in its ``at``-th call."""

    def __init__(self, training: bool = True) -> None:
        torch.manual_seed(0)
        self.net = Counting().double().train(training)
        x, y = rows()
        self.net.layers[0].weight.grad = torch.ones_like(self.net.layers[0].weight)
        self.loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
        self.calls, self.at, self.error = 0, 0, KeyboardInterrupt()
        self.objective = metrics.Objective(self.net, self.loader, self.loss)
        self.tensors = [*self.net.parameters(), *self.net.buffers()]
        self.before = [tensor.detach().clone() for tensor in self.tensors]
        self.generator = torch.random.get_rng_state()

    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return squared_error(net(batch[0]), batch[1])

    def check(self) -> None:
        now = [*self.net.parameters(), *self.net.buffers()]
        for tensor, first, values in zip(now, self.tensors, self.before, strict=True):
            assert tensor is first
            assert torch.equal(tensor, values)
        assert self.net.nothing is None
        assert torch.equal(torch.random.get_rng_state(), self.generator)
        weight, *others = self.net.parameters()
        assert weight.grad is not None
        assert bool((weight.grad == 1.0).all())
        assert all(p.grad is None for p in others)
        assert all(module.training is self.net.training for module in self.net.modules())
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_stays_of_a_metric(name: str, training: bool) -> None:
    scene = Scene(training)
    METRICS[name](scene.objective)
    assert scene.calls > 3
    scene.check()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(("at", "error"), [(1, ValueError("x")), (5, KeyboardInterrupt())])
def test_nothing_stays_of_a_loss_that_raises(name: str, at: int, error: BaseException) -> None:
    scene = Scene()
    scene.at, scene.error = at, error
    with pytest.raises(type(error)):
        METRICS[name](scene.objective)
    assert scene.calls == at
    scene.check()


@pytest.mark.parametrize("name", METRICS)
def test_progress_counts_to_its_total_and_may_interrupt(name: str) -> None:
    scene = Scene()
    seen: list[tuple[int, int]] = []
    METRICS[name](scene.objective, progress=lambda *args: seen.append(args))
    total = seen[0][1]
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {every for _, every in seen} == {total}
    assert total == (300 if name == "eigenvalues" else len(seen))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        METRICS[name](scene.objective, progress=stop)
    scene.check()


def test_a_parameter_that_the_loss_writes_is_put_back() -> None:
    scene = Scene()

    def loss(net: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            net.layers[4].weight.mul_(0.5)
        return squared_error(net(batch[0]), batch[1])

    metrics.hessian_trace(metrics.Objective(scene.net, scene.loader, loss), 1)
    scene.check()


def test_inside_no_grad_and_inference_mode_it_is_the_same() -> None:
    scene = Scene(training=False)
    free = metrics.hessian_trace(scene.objective, 1).mean
    with torch.no_grad():
        assert metrics.hessian_trace(scene.objective, 1).mean == free
    with torch.inference_mode():
        assert metrics.hessian_trace(scene.objective, 1).mean == free


def once() -> Iterator[Any]:
    yield from zip(*(t.split(4) for t in rows()), strict=True)


class Shrinking:
    """A loader that forgets a batch with each walk."""

    def __init__(self) -> None:
        self.batches = list(once())

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches
        self.batches.pop()


def value(net: nn.Module, batch: Any) -> Tensor:
    return squared_error(net(batch[0]), batch[1])


HALF, META = nn.Linear(5, 3).bfloat16(), nn.Linear(5, 3, device="meta")
BAD: list[tuple[Callable[[nn.Module], Any], str]] = [
    (lambda net: metrics.Objective(3, [], value), r"model: got 3, expected a torch.nn.Module"),
    (lambda net: metrics.Objective(net, once(), value), r"loader: got generator, expected batches that can be walked"),
    (lambda net: metrics.Objective(net, [], 7), r"loss_fn: got 7, expected a function"),
    (lambda net: metrics.Objective(HALF, [], value), r"weight: got .*bfloat16.*, expected a dense tensor of float32"),
    (lambda net: metrics.Objective(META, [], value), r"weight: got .* on meta, expected"),
    (lambda net: metrics.Objective(net, [], value, process_group=1), r"process_group: got 1, expected 'auto', None"),
    (lambda net: metrics.Objective(nn.ReLU(), [], value), r"model: got no element that requires grad"),
    (lambda net: metrics.Objective.of_function(sum, torch.ones(2)), r"params: got a tensor .*, expected a list"),
    (lambda net: metrics.Objective.of_function(sum, [net.weight] * 2), r"params: got a tensor twice"),
    (lambda net: metrics.Objective.of_function(sum, [net.weight * 2]), r"params\[0\]: got the result of an operation"),
    (lambda net: METRICS["trace"](net), r"hessian_trace: objective: got .*Linear, expected a metrics.Objective"),
    (lambda net: METRICS["trace"](metrics.Objective(net, [], value)), r"loader: got 0 rows, expected the same rows"),
    (lambda net: METRICS["ascent"](metrics.Objective(net, [], value)), r"loader: got 0 rows, expected at least one"),
    (lambda net: METRICS["trace"](metrics.Objective(net, Shrinking(), value)), r"got 8 rows in a pass after 12"),
    (lambda net: METRICS["trace"](metrics.Objective(net, [3], value)), r"loader: got a batch \(3\) without a tensor"),
    (lambda net: METRICS["average"](metrics.Objective(net, [3], lambda *a: 1.0, rows=len)), r"has no len"),
    (lambda net: METRICS["average"](metrics.Objective(net, [rows()], lambda *a: 1.0)), r"loss: got 1.0, expected"),
    (lambda net: METRICS["average"](metrics.Objective(net, [rows()], lambda net, b: b[0])), r"loss: got .*\(12, 5\)"),
    (lambda net: METRICS["trace"](metrics.Objective(net, [rows()], lambda net, b: b[0].sum())), r"no parameter"),
    (lambda net: METRICS["trace"](metrics.Objective(net, list(once()), value), progress=3), r"progress: got int"),
]  # fmt: skip
SETTINGS: list[tuple[Callable[[metrics.Objective], Any], str]] = [
    (lambda o: metrics.hessian_eigenvalues(o, 19), r"k: got 19, expected an integer from 1 to 18"),
    (lambda o: metrics.hessian_eigenvalues(o, which="top"), r"which: got 'top', expected 'largest' or"),
    (lambda o: metrics.hessian_eigenvalues(o, 5, max_products=4), r"max_products: got 4, expected an integer from 5"),
    (lambda o: metrics.hessian_eigenvalues(o, 5, block_size=6), r"block_size: got 6, expected an integer from 1 to 5"),
    (lambda o: metrics.hessian_eigenvalues(o, tolerance=0.0), r"tolerance: got 0.0, expected a finite number above 0"),
    (lambda o: metrics.hessian_trace(o, 0), r"num_samples: got 0"),
    (lambda o: metrics.average_sharpness(o, -1.0), r"average_sharpness: radius: got -1.0"),
    (lambda o: metrics.average_sharpness(o, 1.0, noise="pink"), r"noise: got 'pink'"),
    (lambda o: metrics.tilted_objective(o, float("nan"), 1.0), r"tilted_objective: tilt: got nan"),
    (lambda o: metrics.ascent_sharpness(o, 1.0, group_size=0), r"group_size: got 0"),
    (lambda o: metrics.surface(o), r"coordinates: got 0 vectors"),
    (lambda o: metrics.surface(o, 3), r"coordinates\[0\]: got 3, expected a vector"),
    (lambda o: metrics.surface(o, [0.0, float("inf")]), r"coordinates\[0\]\[1\]: got inf"),
    (lambda o: metrics.surface(o, [0.0], directions=[]), r"directions: got 0 entries, expected a list of 1"),
    (lambda o: metrics.surface(o, [0.0], directions=[[torch.ones(3)]]), r"directions\[0\]: got 1 entries"),
    (lambda o: metrics.surface(o, [0.0], directions=[[torch.ones(3)] * 2]), r"directions\[0\]\[0\]: got .* \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_cannot_be_measured_is_refused(call: Callable[[nn.Module], Any], message: str) -> None:
    net = nn.Linear(5, 3).double()
    with pytest.raises((TypeError, ValueError), match=message):
        call(net)


@pytest.mark.parametrize(("call", "message"), SETTINGS)
def test_a_bad_setting_is_refused_before_the_loss_runs(call: Callable[[metrics.Objective], Any], message: str) -> None:
    def never(net: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("the loss ran")

    objective = metrics.Objective(nn.Linear(5, 3), [rows()], never)
    with pytest.raises((TypeError, ValueError), match=message):
        call(objective)


def test_a_function_has_no_groups_and_a_nan_no_spectrum() -> None:
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="group_size: got 1, expected None, as the objective is a function"):
        metrics.ascent_sharpness(metrics.Objective.of_function(lambda: x.sum(), [x]), 1.0, group_size=1)
    broken = metrics.Objective.of_function(lambda: x.abs().sqrt().sum(), [x])
    with pytest.raises(ValueError, match="objective: got a Hessian that is not finite"):
        metrics.hessian_eigenvalues(broken, 1)
