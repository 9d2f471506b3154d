"""TSAM under wrappers: of classes made from its own, with a copy of its ``__dict__`` or without, and around it.

Law: whichever of wrapper and wrapped is called, both have taken the step; so nothing that changes between two steps may
be an attribute that a method of TSAM binds anew. Lightning, Fabric and Accelerate themselves: each way to write a step
that their wrapper lets through does what it does without the wrapper, bit for bit.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor

from tsam_ext import TSAM
from tsam_ext.closures import stands_for_none

SAMPLERS: dict[str, dict[str, Any]] = {
    "ascent": {},
    "every": {"every": 2},
    "noise": {"sampler": "noise"},
    "hmc": {"sampler": "hmc", "delta": 3.0},
}


def wrapped(optimizer: TSAM) -> Any:
    """An object of a class made from TSAM's, with a copy of its ``__dict__``."""
    shell = type("Wrapped", (TSAM,), {}).__new__(type("Wrapped", (TSAM,), {}))
    shell.__dict__ = dict(optimizer.__dict__)
    return shell


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_wrapper_and_wrapped_are_one(problem, sampler: str) -> None:
    """Steps by turns through either are the steps of one optimizer, and so are loading and estimating."""
    task, twin = problem(), problem()
    inner, alone = (tsam(t.parameters, lr=0.1, seed=3, rho=0.3, **SAMPLERS[sampler]) for t in (task, twin))
    outer = wrapped(inner)
    for optimizer in (outer, inner, outer, outer, inner):
        task.train(optimizer, 1)
        twin.train(alone, 1)
        assert task.holds(twin.copies())
    state = copy.deepcopy(outer.state_dict())
    assert state["param_groups"] == alone.state_dict()["param_groups"]
    outer.estimate_gradient(task.closure(outer))
    inner.apply()
    alone.estimate_gradient(twin.closure(alone))
    alone.apply()
    inner.load_state_dict(state)
    alone.load_state_dict(state)
    with pytest.raises(RuntimeError, match="estimate"):
        outer.step()
    task.train(outer, 2)
    twin.train(alone, 2)
    assert task.holds(twin.copies())
    assert outer.diagnostics is inner.diagnostics
    assert outer.seed == inner.seed == 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_attribute_is_bound_anew(problem, sampler: str) -> None:
    task = problem()
    optimizer = tsam(task.parameters, lr=0.1, seed=3, model=task.net, **SAMPLERS[sampler])
    before = dict(vars(optimizer))
    task.train(optimizer, 2)
    for sample in optimizer.samples():
        with sample:
            loss = task.loss()
            loss.backward()
            sample.record(loss)
    optimizer.apply()
    with optimizer.perturbed():
        pass
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    if sampler == "ascent":
        sam = tsam(task.parameters, lr=0.1, radius=0.0, num_samples=1)
        first = dict(vars(sam))
        task.loss().backward()
        sam.first_step(zero_grad=True)
        task.loss().backward()
        sam.second_step()
        assert all(vars(sam)[name] is value for name, value in first.items())
    assert vars(optimizer).keys() == before.keys()
    for name, value in before.items():
        assert vars(optimizer)[name] is value, name


Way = Callable[[Any, Any, Any, Callable[[Any], Any]], None]


def by_closure(task: Any, optimizer: Any, inner: Any, backward: Callable[[Any], Any]) -> None:
    optimizer.step(lambda: passed(task, inner, backward))


def clipped(task: Any, optimizer: Any, inner: Any, backward: Callable[[Any], Any]) -> None:
    inner.estimate_gradient(lambda: passed(task, inner, backward))
    torch.nn.utils.clip_grad_norm_(task.parameters, 0.1)
    optimizer.step()


def applied(task: Any, optimizer: Any, inner: Any, backward: Callable[[Any], Any]) -> None:
    inner.estimate_gradient(lambda: passed(task, inner, backward))
    torch.nn.utils.clip_grad_norm_(task.parameters, 0.1)
    inner.apply()


def looped(task: Any, optimizer: Any, inner: Any, backward: Callable[[Any], Any]) -> None:
    for sample in inner.samples():
        with sample:
            sample.record(passed(task, inner, backward))
    inner.apply()


def passed(task: Any, optimizer: Any, backward: Callable[[Any], Any]) -> Tensor:
    x, y = optimizer.part(task.x, task.y)
    loss: Tensor = task.loss(x, y)
    backward(loss)
    return loss


WAYS: tuple[Way, ...] = (by_closure, clipped, applied, looped)


def follow(way: Way, task: Any, optimizer: Any, inner: Any, backward: Callable[[Any], Any], twin: Any) -> None:
    """Two steps through a wrapper are two of a twin without; ``inner`` is what has the methods that torch has not."""
    alone = tsam(twin.parameters, lr=0.1, seed=3, batch="split")
    for _ in range(2):
        way(task, optimizer, inner, backward)
        way(twin, alone, alone, lambda loss: loss.backward())
        assert task.holds(twin.copies())
        assert torch.equal(inner.diagnostics.losses, alone.diagnostics.losses)
    with inner.perturbed():
        assert not task.holds(twin.copies())
    assert task.holds(twin.copies())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_fabric_lets_everything_through(problem, way: Way) -> None:
    lightning_fabric = pytest.importorskip("lightning.fabric", reason="pip install '.[recipes]'")
    fabric = lightning_fabric.Fabric(accelerator="cpu", devices=1)
    task, twin = problem(), problem()
    model = task.net
    wrapped_model, optimizer = fabric.setup(model, tsam(task.parameters, lr=0.1, seed=3, batch="split"))
    task.net = wrapped_model
    assert optimizer.__class__.__name__ == "FabricTSAM"
    follow(way, task, optimizer, optimizer, fabric.backward, twin)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_lightning_with_manual_optimization_lets_everything_through(problem, way: Way) -> None:
    """And counts the steps, which its checkpoints and max_steps go by."""
    lightning = pytest.importorskip("lightning", reason="pip install '.[recipes]'")
    task, twin = problem(), problem()
    hooks: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = task.net, False

        def configure_optimizers(self) -> Any:
            return tsam(self.parameters(), lr=0.1, seed=3, batch="split")

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            follow(way, task, optimizer, optimizer, self.manual_backward, twin)
            with pytest.raises(RuntimeError, match="needs an estimate"):
                optimizer.step()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            hooks.append(float(task.gradient().norm()))

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, **quiet)
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(1, 1)))
    assert trainer.global_step == 2
    if way is clipped:
        assert hooks[:2] == pytest.approx([0.1, 0.1], rel=1e-3)  # the hook sees the aggregate


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_accelerate_keeps_tsam_as_its_optimizer(problem, way: Way) -> None:
    """Its wrapper has no methods but torch's: ``optimizer.optimizer`` has the others, and step() uses its estimate."""
    accelerate = pytest.importorskip("accelerate", reason="pip install '.[recipes]'")
    accelerator = accelerate.Accelerator(cpu=True)
    task, twin = problem(), problem()
    task.net, optimizer = accelerator.prepare(task.net, tsam(task.parameters, lr=0.1, seed=3, batch="split"))
    assert not hasattr(optimizer, "estimate_gradient") and isinstance(optimizer.optimizer, TSAM)
    follow(way, task, optimizer, optimizer.optimizer, accelerator.backward, twin)
    optimizer.load_state_dict(optimizer.state_dict())


def test_what_lightning_passes_for_no_closure_is_none(problem) -> None:
    """As Lightning builds it: its function that does nothing, last in a partial. Others are closures."""

    def do_nothing_closure() -> None:
        return

    def around(model: Any, optimizer: Any, closure: Callable[[], Any]) -> Any:
        calls.append(task.gradient().norm())
        return closure()

    calls: list[Tensor] = []
    task, twin = problem(), problem()
    optimizer, alone = (tsam(t.parameters, lr=0.1, seed=3) for t in (task, twin))
    given = functools.partial(around, None, None, do_nothing_closure)
    assert not stands_for_none(given) and not stands_for_none(task.loss) and not stands_for_none(SimpleNamespace())
    do_nothing_closure.__module__ = "lightning.pytorch.core.optimizer"
    assert stands_for_none(given) and stands_for_none(do_nothing_closure)
    with pytest.raises(RuntimeError, match="needs an estimate"):
        optimizer.step(given)
    optimizer.estimate_gradient(task.closure(optimizer))
    alone.estimate_gradient(twin.closure(alone))
    assert optimizer.step(given) is None
    alone.apply()
    assert task.holds(twin.copies())
    assert calls[-1] == twin.gradient().norm()
