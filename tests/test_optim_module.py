"""Modules around the parameters: normalisation layers, dropout, data-parallel wrappers, devices.

The law behind each: the passes of one step leave a module and the random generators as one forward would, and
nothing in a step makes the host wait for a device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from tsam_ext import TSAM
from tsam_ext.engine import notices

SAM = {"num_samples": 1, "radius": 0.0}


def convolutions(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.Flatten(),
        nn.BatchNorm1d(27, momentum=None),
        nn.Linear(27, 3),
    )
    x, y = torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,))
    return net.to(dtype), x.to(dtype), y


def buffers(net: nn.Module) -> list[Tensor]:
    return [b.clone() for b in net.buffers()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{}, {"sampler": "noise"}, {"every": 2}, SAM])
def test_running_statistics_move_as_in_one_forward(options: dict[str, Any]) -> None:
    """With model=: after each step the buffers are those that the step's first pass left."""
    net, x, y = convolutions()
    optimizer = tsam(net.parameters(), lr=0.1, model=net, **options)
    after_first: list[list[Tensor]] = []

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        after_first.append(buffers(net))
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            after_first.clear()
            before = buffers(net)
            optimizer.step(closure)
            assert same(buffers(net), after_first[0])
            assert not same(buffers(net), before)
            assert int(net[1].num_batches_tracked) == step + 1
    net.eval()
    frozen = buffers(net)
    optimizer.step(closure)
    assert same(buffers(net), frozen)


def test_statistics_are_those_of_a_plain_forward_where_nothing_moves_first() -> None:
    net, x, y = convolutions()
    twin, _, _ = convolutions()
    twin(x)
    optimizer = tsam(net.parameters(), lr=0.1, model=net, radius=0.0)

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert same(buffers(net), buffers(twin))


def test_statistics_return_after_an_exception() -> None:
    net, x, y = convolutions()
    optimizer = tsam(net.parameters(), lr=0.1, model=net)
    before, calls = buffers(net), []

    def closure() -> Tensor:
        calls.append(1)
        loss = cross_entropy(net(x), y)
        if len(calls) == 4:
            raise KeyError
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert same(buffers(net), before)


def test_without_the_model_statistics_move_and_one_warning_says_so() -> None:
    net, x, y = convolutions()
    optimizer = tsam(net.parameters(), lr=0.1)

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="model=") as caught:
        optimizer.step(closure)
    assert len(caught) == 1
    assert int(net[1].num_batches_tracked) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
        quiet = tsam(net.parameters(), lr=0.1)
        quiet.zero_grad()
        net.eval()
        quiet.step(closure)


def test_a_warning_points_at_the_user_s_line_in_every_form_of_a_step() -> None:
    """Of closure, estimate, loop, under a scheduler's wrapper of step; of a first step, and of health."""
    net, x, y = convolutions()

    def closure() -> Tensor:
        loss = cross_entropy(net(x), y)
        loss.backward()
        return loss

    def loop(optimizer: TSAM) -> None:
        for sample in optimizer.samples():  # here
            with sample:
                sample.record(closure())

    def scheduled(optimizer: TSAM) -> None:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        optimizer.step(closure)  # here

    def form(name: str) -> Callable[[TSAM], Any]:
        forms = {"loop": loop, "scheduled": scheduled}
        forms["step"] = lambda optimizer: optimizer.step(closure)  # here
        forms["estimate"] = lambda optimizer: optimizer.estimate_gradient(closure)  # here
        return forms[name]

    lines = Path(__file__).read_text().splitlines()
    for name in ("step", "estimate", "loop", "scheduled"):
        with pytest.warns(UserWarning, match="model=") as caught:
            form(name)(TSAM(net.parameters(), lr=0.1, num_samples=3))
        assert Path(caught[0].filename) == Path(__file__), name
        assert lines[caught[0].lineno - 1].endswith("# here"), name
        optimizer = TSAM(net.parameters(), lr=0.1, tilt=1e-9, model=net, num_samples=3)
        for _ in range(10):
            optimizer.step(closure)
        with pytest.warns(UserWarning, match="effective sample size") as caught:
            form(name)(optimizer)
        assert Path(caught[0].filename) == Path(__file__), name
        assert lines[caught[0].lineno - 1].endswith("# here"), name


def test_a_folder_whose_name_begins_as_ours_is_a_user_s(tmp_path: Path) -> None:
    """Code in torch's neighbours, torchmetrics say, is not torch's own."""
    for package in (Path(torch.__file__).parent, Path(notices.__file__).parents[1]):
        scope: dict[str, Any] = {"warn": notices.warn}
        exec(compile("def call():\n    warn('here')", f"{package}_more/reader.py", "exec"), scope)
        with pytest.warns(UserWarning, match="here") as caught:
            scope["call"]()
        assert caught[0].filename == f"{package}_more/reader.py"
        exec(compile("def call():\n    warn('here')", f"{package}/inside.py", "exec"), scope)
        with pytest.warns(UserWarning, match="here") as caught:
            scope["call"]()
        assert Path(caught[0].filename) == Path(__file__)


@pytest.mark.parametrize("fails", [False, True])
def test_the_watch_for_layers_ends_with_the_first_step(problem, fails: bool) -> None:
    """Its hook is on every module of the process, so it must not outlive the step, whatever way that ends."""
    hooks = nn.modules.module._global_forward_pre_hooks
    before, during = len(hooks), []
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1)

    def closure() -> Tensor:
        during.append(len(hooks))
        if fails:
            raise KeyError
        return task.closure(optimizer)()

    if fails:
        with pytest.raises(KeyError):
            optimizer.step(closure)
    else:
        optimizer.step(closure)
    assert during[0] == before + 1
    assert len(hooks) == before


@pytest.mark.parametrize("same_masks", [True, False])
def test_dropout_masks(problem, same_masks: bool) -> None:
    """The same in all passes of a step, new in the next step, and the stream ends as after one forward."""
    task, masks = problem(dropout=0.5), []
    optimizer = tsam(task.parameters, lr=0.1, same_masks=same_masks)
    task.net[2].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    start = torch.random.get_rng_state()
    task.train(optimizer, 1)
    ended = torch.random.get_rng_state()
    torch.random.set_rng_state(start)
    task.loss()
    assert torch.equal(torch.random.get_rng_state(), ended) == same_masks
    torch.random.set_rng_state(ended)
    assert [torch.equal(m, masks[0]) for m in masks[1:6]] == [same_masks] * 5
    masks.clear()
    task.train(optimizer, 1)
    first = masks[0]
    masks.clear()
    task.train(optimizer, 1)
    assert not torch.equal(first, masks[0])


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("bucket_mb", [1e-6, 25.0])
def test_distributed_data_parallel(problem, tmp_path, bucket_view: bool, bucket_mb: float) -> None:
    """One process: the bare module's bits, also where gradients are views of the reducer's buckets."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = problem(), problem()
        optimizer, twin = (tsam(t.parameters, lr=0.1, momentum=0.9, rho=0.5, seed=1) for t in (ours, theirs))
        parallel = nn.parallel.DistributedDataParallel
        ours.net = parallel(ours.net, gradient_as_bucket_view=bucket_view, bucket_cap_mb=bucket_mb)
        assert ours.train(optimizer, 4) == theirs.train(twin, 4)
        assert ours.holds(theirs.copies())
    finally:
        distributed.destroy_process_group()


class NoSync(TorchDispatchMode):
    """Fails on what would make the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert "_local_scalar_dense" not in name, name
        assert "is_nonzero" not in name, name
        assert "aten::equal" not in name, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"sampler": "noise", "every": 2}, {"batch": "split"}, SAM])
@pytest.mark.parametrize("tilt", [2.0, float("inf")])
def test_a_step_reads_nothing_from_the_device(problem, options, tilt: float) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, momentum=0.9, tilt=tilt, **options)

    def closure() -> Tensor:
        x, y = optimizer.part(task.x, task.y)
        loss = task.loss(x, y)
        loss.backward()
        return loss

    with NoSync():
        for _ in range(2):
            optimizer.step(closure)
        seen = optimizer.diagnostics
        assert seen.losses.dtype == seen.weights.dtype == seen.tilted_loss.dtype == torch.float64


def test_a_step_under_no_grad_runs_the_closure_with_grad(problem) -> None:
    ours, theirs = problem(), problem()
    optimizer, twin = (tsam(t.parameters, lr=0.1, seed=2) for t in (ours, theirs))
    with torch.no_grad():
        losses = ours.train(optimizer, 2)
    assert losses == theirs.train(twin, 2)
    assert ours.holds(theirs.copies())
