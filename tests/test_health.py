"""What a user hears without reading the diagnostics: each finding once, when it holds, and not where it is natural.

The law: a warning comes in the step after the last of those that it is about, and no step waits, dispatches an op or
copies more for it. Losses are planted by closures whose gradients are given, so that nothing is left to chance.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from flat_options import tsam
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tsam_ext import TSAM, _cuda
from tsam_ext.engine.state import HEADER, new_state
from tsam_ext.estimates import Report
from tsam_ext.health import Finding, Health, Seen

EQUAL, INERT, ACCEPTANCE = "equal bits", "effective sample size", "acceptance of the last 10"
ROUNDING, NONFINITE = "rounding noise", "non-finite loss"


def planted(losses: Iterable[float], *, slope: float = 1.0, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """An optimizer, and a closure with these losses, one a pass, over and over, and gradients of length about slope."""
    parameter = nn.Parameter(torch.full((4,), 0.5, dtype=torch.float64))
    optimizer, values = tsam([parameter], lr=1e-6, seed=1, **options), itertools.cycle(losses)

    def closure() -> Tensor:
        parameter.grad = torch.full_like(parameter, 0.5 * slope)
        optimizer.part(torch.zeros(6))
        return torch.tensor(next(values), dtype=dtype)

    return optimizer, closure


def said(optimizer: TSAM, closure: Callable[[], Tensor], steps: int) -> list[tuple[int, str]]:
    """Every warning of these steps, with the number of its step from 1."""
    found = []
    for step in range(1, steps + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(closure)
        found += [(step, str(warning.message)) for warning in caught]
    return found


def only(found: list[tuple[int, str]], step: int, *words: str) -> bool:
    return len(found) == 1 and found[0][0] == step and all(word in found[0][1] for word in words)


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 1, "radius": 0.0},
        {"num_samples": 1, "radius": 0.05},
        {"sampler": "noise", "num_samples": 2},
        {"batch": "split"},
        {"batch": "split", "radius": 0.0},
        {"every": 2},
        {"sampler": "hmc", "delta": 0.0},
        {"sampler": "hmc", "delta": 0.0, "recycle": True},
    ],
    ids=str,
)
def test_equal_losses_are_said_once_after_three_steps(options: dict[str, Any]) -> None:
    optimizer, closure = planted([0.75], tilt=0.0, **options)
    found = said(optimizer, closure, 14)
    assert only(found, 6 if "every" in options else 4, EQUAL, "0.75", "parametrize.cached()", "bfloat16")


@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0.0},
        {"rho": 0.0, "sampler": "hmc", "delta": 0.0},
        {"sampler": "noise", "num_samples": 1},
        {"sampler": "noise", "radius": 0.0},
        {"sampler": "noise", "batch": "split"},  # parts of one batch may well have equal losses
    ],
    ids=str,
)
def test_equal_losses_are_no_finding_where_nothing_has_moved_or_rows_differ(options: dict[str, Any]) -> None:
    assert said(*planted([0.75], tilt=0.0, **options), 12) == []


@pytest.mark.parametrize(
    "losses", [[0.0], [0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.7500001]]
)
def test_zero_losses_and_two_equal_steps_are_no_finding(losses: list[float]) -> None:
    """A loss that has reached 0 stays there; two steps of six passes, or even four such in a row, are chance."""
    assert said(*planted(losses, tilt=0.0), 12) == []


def test_one_sample_of_ascent_is_compared_with_its_probe() -> None:
    assert said(*planted([0.75, 0.7500001], num_samples=1, radius=0.05, tilt=0.0), 12) == []
    assert said(*planted([0.75], num_samples=1, radius=0.0, slope=0.0, tilt=0.0), 12) == []  # no ascent


def test_a_loss_in_eight_bits_is_heard_of(problem: Any) -> None:
    """The whole way: a bfloat16 loss of a float32 net, and the same net with a float32 loss."""

    def train(dtype: torch.dtype) -> list[tuple[int, str]]:
        task = problem(dtype=torch.float32)
        optimizer = tsam(task.parameters, lr=1e-3, rho=1e-4, tilt=0.0, seed=0)

        def closure() -> Tensor:
            loss = task.loss()
            loss.backward()
            return loss.to(dtype)

        return said(optimizer, closure, 12)

    assert [EQUAL in text for _, text in train(torch.bfloat16)] == [True]
    assert train(torch.float32) == []


def test_a_chain_that_stands_is_one_of_low_acceptance(problem: Any) -> None:
    """After a rejection the last state counts again: its equal losses are natural."""
    task = problem()
    optimizer = tsam(task.parameters, lr=1e-6, rho=0.5, seed=3, sampler="hmc", delta=1e7, adapt_step_size=False)
    found = said(optimizer, task.closure(optimizer), 14)
    assert optimizer.diagnostics.losses.unique().numel() == 1
    assert only([entry for entry in found if ROUNDING not in entry[1]], 11, ACCEPTANCE)


@pytest.mark.parametrize("tilt", [1.0, 1e-9, torch.tensor(2.0, dtype=torch.float64), lambda step: 1.0])
def test_an_inert_tilt_is_said_once_after_ten_steps(tilt: Any) -> None:
    """The default tilt too: whoever trains with it expects that it does something."""
    losses = [1.0, 1.0 + 1e-4, 1.0 - 1e-4, 1.0 + 2e-4, 1.0]  # five for six passes: each step begins elsewhere
    assert only(said(*planted(losses, tilt=tilt), 24), 11, INERT, "of 3")


@pytest.mark.parametrize(
    "options",
    [
        {"tilt": 0.0},
        {"num_samples": 1},
        {"tilt": 1e5},
        {"sampler": "hmc", "delta": None},
        {"sampler": "hmc", "delta": 1.0},
        {"every": 3},  # four sampled steps in twelve
    ],
    ids=str,
)
def test_a_tilt_that_acts_or_cannot_is_not_said(options: dict[str, Any]) -> None:
    losses = [1.0, 1.0 + 1e-4, 1.0 - 1e-4, 1.0 + 2e-4, 1.0]
    assert said(*planted(losses, **options), 12) == []


@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 1), (torch.float64, 0)])
def test_rounding_is_that_of_the_loss_s_own_dtype(dtype: torch.dtype, times: int) -> None:
    losses = [1.0, 1.0 + 2.0**-23, 1.0 - 2.0**-24]
    found = said(*planted(losses, dtype=dtype, slope=1e-9, sampler="hmc", delta=1e7), 14)
    assert [ROUNDING in text for _, text in found].count(True) == times
    assert all(step == 11 for step, _ in found)


@pytest.mark.parametrize(("bad", "times"), [(2, 0), (3, 1)])
def test_nonfinite_losses_are_counted_over_ten_steps(bad: int, times: int) -> None:
    """A tenth of the samples is no finding, more is."""
    losses = [*[1.0, 2.0] * (10 - bad), *[1.0, float("nan")] * bad]
    optimizer, closure = planted(losses, sampler="noise", num_samples=2, tilt=5.0, skip_nonfinite_loss=True)
    found = said(optimizer, closure, 20)
    assert [(step, NONFINITE in text and "15%" in text) for step, text in found] == [(11, True)] * times


class NoOp(TorchDispatchMode):
    """Fails on any op at all."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func.name())


def report_of(**options: Any) -> Report:
    optimizer, closure = planted([0.75], **options)
    optimizer.step(closure)
    return optimizer._progress.estimate.report


def look(health: Health, report: Report, steps: int) -> None:
    for _ in range(steps):
        health.note(report)
        health.look()


@pytest.mark.parametrize("options", [{}, {"sampler": "hmc"}, {"dtype": torch.bfloat16}], ids=str)
def test_looking_dispatches_no_op_on_the_cpu(options: dict[str, Any]) -> None:
    health, report = Health(), report_of(tilt=0.0, **options)
    with NoOp(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        look(health, report, 3)
    assert [EQUAL in str(warning.message) for warning in caught] == [True]


class Later:
    """An event that comes when it is told to."""

    def __init__(self) -> None:
        self.come = False

    def query(self) -> bool:
        return self.come


def test_nothing_waits_for_a_copy_that_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not arrived is not read, and meanwhile no other step is copied."""
    sent: list[Later] = []

    def send(self: Health, parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], Later]:
        sent.append(Later())
        return parts, sent[-1]

    monkeypatch.setattr(Health, "_sent", send)
    optimizer, closure = planted([0.75], tilt=0.0)
    for _ in range(3):
        assert said(optimizer, closure, 5) == []
        sent[-1].come = True
    assert len(sent) == 3
    assert only(said(optimizer, closure, 5), 1, EQUAL)


def test_when_all_is_said_nothing_is_copied_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(Health, "_sent", lambda self, parts: sent.append(1) or (parts, None))
    health, report = Health((Finding(2, lambda seen: 1.0, lambda mean, seen: f"mean {mean}", high=0.5),)), report_of()
    sent.clear()
    with pytest.warns(UserWarning, match="mean 1.0") as caught:
        look(health, report, 5)
    assert len(caught) == 1
    assert len(sent) == 2


@pytest.mark.parametrize("low", [0.0, 2.5])
def test_a_finding_is_the_mean_of_its_window(low: float) -> None:
    """NaN is none; the window moves; a step that says nothing of it is left out."""
    values = iter([9.0, 1.0, float("nan"), 2.0, None, 2.0, 3.0, 5.0])
    health = Health((Finding(2, lambda seen: next(values), lambda mean, seen: f"mean {mean}", low=low, high=3.0),))
    report, found = report_of(), []
    for step in range(8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            health.note(report)
            health.look()
        found += [(step, str(warning.message)) for warning in caught]
    assert found == [(1, "TSAM: mean 5.0")]


def test_no_more_than_64_rows_are_looked_at() -> None:
    state = new_state(100)
    state[HEADER:] = torch.arange(400.0)
    seen: list[Seen] = []
    health = Health((Finding(1, seen.append, lambda mean, seen: ""),))  # type: ignore[arg-type]
    health.note(Report(state, num_samples=100, names=()))
    health.look()
    assert seen[0].losses == [4.0 * row for row in range(64)]
    assert seen[0].num_rows == 100


def test_a_capture_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a copy nor an event's query may come into a CUDA graph."""
    optimizer, closure = planted([0.75], tilt=0.0, capturable=True, same_masks=False)
    assert said(optimizer, closure, 3) == []
    with monkeypatch.context() as patch:
        patch.setattr(_cuda, "capturing", lambda device: True)
        assert said(optimizer, closure, 4) == []
    assert only(said(optimizer, closure, 4), 1, EQUAL)


def test_a_warning_that_is_an_error_leaves_the_optimizer_as_it_is() -> None:
    optimizer, closure = planted([0.75], tilt=0.0)
    said(optimizer, closure, 3)
    before = [parameter.clone() for parameter in optimizer.param_groups[0]["params"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=EQUAL):
            optimizer.step(closure)
        assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))
        assert optimizer.state_dict()["param_groups"][0]["tsam_step"] == 3
        with optimizer.perturbed():
            pass
        optimizer.step(closure)


def test_a_copy_starts_with_nothing_seen() -> None:
    optimizer, closure = planted([0.75], tilt=0.0)
    assert said(optimizer, closure, 3) == []
    twin = copy.deepcopy(optimizer)

    def other() -> Tensor:
        for parameter in twin.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        return torch.tensor(0.75)

    assert only(said(twin, other, 6), 4, EQUAL)


def test_reading_the_diagnostics_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    optimizer, closure = planted([0.75], tilt=1e-9)
    for _ in range(2):
        optimizer.step(closure)
        assert float(optimizer.diagnostics.ess) == 3.0
    assert not recwarn
