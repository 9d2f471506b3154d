"""What ends a run of tsam_ext.hmc.sample early, what is left of it, and that it goes on as if nothing had happened.

Laws: a run in parts has the bits of the whole run, wherever it was cut, through a file too; an interrupt between any
two instructions costs no draw whose transition was whole; an exception loses nothing.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from tsam_ext import hmc

PER_DRAW = ("log_density", "acceptance_rate", "diverging", "energy_error", "rounding")


def density(x: Any) -> Tensor:
    tensors = [x] if isinstance(x, Tensor) else x
    return -0.5 * sum((t.double() - 0.3).square().sum() + t.double().pow(4).sum() for t in tensors)


def mixed() -> list[Tensor]:
    return [torch.ones(2, 3), torch.ones((), dtype=torch.float64), torch.ones(5).bfloat16(), torch.ones(3, 2).half().T]


SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (torch.ones(3), {}),
    (mixed(), {"inverse_mass": [3.0, 0.7, 2.0, 0.1], "thin": 3}),
    ([torch.ones(2, dtype=torch.float64)], {"integrator": hmc.MCLACHLAN, "step_size_jitter": 0.0, "metropolis": False}),
]


def same(a: Any, b: Any, rows: slice = slice(None)) -> bool:
    """Whether a trace has the bits of those rows of another."""
    pairs = [(getattr(a, name), getattr(b, name)[rows]) for name in PER_DRAW]
    draws = [(a.draws, b.draws)] if isinstance(a.draws, Tensor) else list(zip(a.draws, b.draws, strict=True))
    pairs += [(x, y[rows]) for x, y in draws]
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in pairs)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("position", "options"), SETTINGS)
def test_two_parts_are_one_run(position: Any, options: dict[str, Any]) -> None:
    options = {**options, "burn_in": 6, "num_leapfrog_steps": 3, "seed": 2**64 - 3}
    whole = hmc.sample(density, position, num_samples=12, **options)
    first = hmc.sample(density, position, num_samples=5, **options)
    kept = through_a_file(first.state)
    both = hmc.resume(density, first, num_samples=7)
    assert same(both, whole)
    assert (both.step_size, both.interrupted, len(both)) == (whole.step_size, False, 12)
    assert both.state["num_samples"] == whole.state["num_samples"] == 12
    assert same(hmc.resume(density, kept, num_samples=7), whole, slice(5, 12))
    assert same(first, whole, slice(5))  # it was not changed
    assert all(torch.equal(a, b) for a, b in zip(kept["x"], first.state["x"], strict=True))
    again = hmc.resume(density, hmc.resume(density, kept, num_samples=3).state, num_samples=4)
    assert same(again, whole, slice(8, 12))


def test_the_state_says_where_the_chain_is() -> None:
    trace = hmc.sample(density, mixed(), num_samples=3, burn_in=2, inverse_mass=3.0, seed=1)
    for position, draws in zip(trace.state["position"], trace.draws, strict=True):
        torch.testing.assert_close(position, draws[-1], rtol=0, atol=0)
    assert trace.state["transitions"] == 5
    assert trace.state["seed"] == 1
    assert isinstance(hmc.sample(density, torch.ones(2), num_samples=1, burn_in=0).state["position"], Tensor)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_goes_on_where_autograd_is_off(mode: Callable[[], Any]) -> None:
    whole = hmc.sample(density, torch.ones(2), num_samples=4, burn_in=2, seed=3)
    with mode():
        half = hmc.sample(density, torch.ones(2), num_samples=2, burn_in=2, seed=3)
        both = hmc.resume(density, half, num_samples=2)
    assert same(both, whole)
    assert not both.draws.is_inference()
    assert not half.state["x"].is_inference()


class Stops:
    """The density, until a call of that number raises; ``calls`` counts."""

    def __init__(self, stop: int, error: BaseException) -> None:
        self.calls, self.stop, self.error = 0, stop, error

    def __call__(self, x: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise self.error
        return density(x)


RUN: dict[str, Any] = {"num_samples": 6, "burn_in": 3, "thin": 2, "num_leapfrog_steps": 2, "seed": 8}  # 15 transitions


@pytest.mark.parametrize("position", [torch.ones(2), mixed()])
@pytest.mark.parametrize("stop", [12, 13, 21, 31])
def test_an_interrupt_hands_back_the_draws_that_are_there(position: Any, stop: int) -> None:
    whole = hmc.sample(density, position, **RUN)
    with pytest.warns(
        UserWarning, match=r"TSAM: hmc.sample: interrupted after \d of 6 draws; hmc.resume goes on"
    ) as told:
        trace = hmc.sample(Stops(stop, KeyboardInterrupt()), position, **RUN)
    assert told[0].filename == __file__
    transitions = (stop - 2) // 2
    assert (len(trace), trace.interrupted) == ((transitions - 3) // 2, True)
    assert trace.state["transitions"] == transitions
    assert same(trace, whole, slice(len(trace)))
    rest = hmc.resume(density, through_a_file(trace.state))
    assert same(rest, whole, slice(len(trace), 6))
    assert not rest.interrupted
    assert same(hmc.resume(density, trace), whole)
    with pytest.warns(UserWarning, match="TSAM: hmc.resume: interrupted after"):
        twice = hmc.resume(Stops(2, KeyboardInterrupt()), trace)  # without a draw of its own
    assert same(hmc.resume(density, twice), whole)


@pytest.mark.parametrize(("stop", "error"), [(6, KeyboardInterrupt()), (6, ValueError("mine")), (20, SystemExit())])
def test_what_passes_through_carries_what_was_there(stop: int, error: BaseException) -> None:
    """Within the burn-in too, which is then not lost."""
    whole = hmc.sample(density, mixed(), **RUN)
    with pytest.raises(type(error)) as caught:
        hmc.sample(Stops(stop, error), mixed(), **RUN)
    assert caught.value is error
    trace = caught.value.trace  # type: ignore[attr-defined]
    assert trace.state["transitions"] == (stop - 2) // 2
    assert same(trace, whole, slice(len(trace)))
    assert same(hmc.resume(density, trace), whole)
    if sys.version_info >= (3, 11):
        notes = [f"hmc.sample: error.trace has {len(trace)} draws, and hmc.resume goes on from it."]
        assert caught.value.__notes__ == notes


def test_before_the_first_transition_there_is_nothing_to_carry() -> None:
    for stop in (1, 2, 3):
        with pytest.raises(ValueError, match="mine") as caught:
            hmc.sample(Stops(stop, ValueError("mine")), mixed(), **RUN)
        assert not hasattr(caught.value, "trace")


@pytest.mark.filterwarnings("error")
def test_a_warning_made_an_error_loses_no_draw() -> None:
    with pytest.raises(UserWarning, match="interrupted after 2 of 6") as caught:
        hmc.sample(Stops(18, KeyboardInterrupt()), mixed(), **RUN)
    assert len(caught.value.trace) == 2  # type: ignore[attr-defined]


class Interrupts:
    """Raises a KeyboardInterrupt before the instruction of that number that a run executes in the package's files."""

    FILES = ("hmc.py", "walk.py", "trace.py")

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        # Not in ``sample`` itself, which only hands on what _run returns.
        if not code.co_filename.endswith(self.FILES) or code.co_name == "sample":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
        return self


@pytest.mark.host_only("a hundred runs")
@pytest.mark.filterwarnings("ignore:TSAM. hmc")
def test_an_interrupt_may_come_between_any_two_instructions() -> None:
    settings: dict[str, Any] = {"num_samples": 2, "burn_in": 1, "thin": 2, "num_leapfrog_steps": 1, "seed": 8}
    position = [torch.ones(2), torch.ones(1).bfloat16()]
    whole, total = hmc.sample(density, position, **settings), 5
    calls = 0

    def counted(x: list[Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return density(x)

    def run(at: int) -> tuple[Any, int]:
        interrupts, old = Interrupts(at), sys.gettrace()
        sys.settrace(interrupts)
        try:
            trace = hmc.sample(counted, position, **settings)
        except KeyboardInterrupt as error:
            trace = getattr(error, "trace", None)
        finally:
            sys.settrace(old)
        return trace, interrupts.seen

    _, instructions = run(0)
    assert instructions > 1000
    seen = set()
    for at in range(1, instructions, instructions // 97):
        calls = 0
        trace, _ = run(at)
        whole_ones = max(calls - 1, 0)  # at most: one call a transition, and one at the start
        transitions = 0 if trace is None else trace.state["transitions"]
        assert whole_ones - 1 <= transitions <= whole_ones, f"instruction {at}"
        seen.add(transitions)
        if trace is not None:
            assert len(trace) == max(transitions - 1, 0) // 2
            assert same(trace, whole, slice(len(trace))), f"instruction {at}"
            assert transitions == total or same(hmc.resume(density, trace), whole), f"instruction {at}"
    assert seen == set(range(total + 1))


def test_errors_may_be_rejected_from_where_they_stopped_the_run() -> None:
    with pytest.raises(ValueError, match="mine") as caught:
        hmc.sample(Stops(20, ValueError("mine")), mixed(), **RUN)
    trace = hmc.resume(Stops(4, ValueError("mine")), caught.value.trace, on_error="reject")  # type: ignore[attr-defined]
    assert (len(trace), trace.errors, trace.state["on_error"]) == (6, 1, "reject")
    assert caught.value.trace.state["on_error"] == "raise"  # type: ignore[attr-defined]


def states() -> dict[str, Any]:
    return hmc.sample(density, torch.ones(2), num_samples=2, burn_in=0, seed=0).state


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 2}, ValueError, r"trace\['version'\]: got 2, expected 1, as this tsam_ext writes"),
        ({"thin": 0}, ValueError, "thin: got 0, expected an integer from 1"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"transitions": 1.5}, TypeError, r"trace\['transitions'\]: got 1.5, expected an integer from 0"),
        ({"log_step_size": float("nan")}, ValueError, r"trace\['log_step_size'\]: got nan, expected a finite number"),
        ({"x": torch.ones(3)}, ValueError, r"trace\['x'\]: got tensors of other shapes, expected those of trace\["),
        ({"x": [torch.ones(2)]}, ValueError, r"trace\['x'\]: got tensors of other shapes, expected those of trace\["),
        ({"position": "here"}, TypeError, r"trace\['position'\]: got str, expected a tensor or a list of tensors"),
        (
            {"transitions": 2**32 - 3},
            ValueError,
            r"burn_in \+ thin \* num_samples: got 4294967299, expected an integer",
        ),
    ],
)
def test_a_state_is_checked_like_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^tsam\.hmc\.resume: {message}"):
        hmc.resume(density, {**states(), **changes}, num_samples=6)


@pytest.mark.parametrize(
    ("trace", "options", "error", "message"),
    [
        (3, {}, TypeError, "trace: got int, expected a trace of hmc.sample, or its state"),
        ({"version": 1}, {}, ValueError, "trace: got a dict without 'num_samples', expected a trace of hmc.sample"),
        (None, {}, ValueError, "num_samples: got None, expected a number, as the 2 draws of the run are there"),
        (None, {"num_samples": 0}, ValueError, "num_samples: got 0, expected an integer from 1"),
        (
            None,
            {"num_samples": 1, "on_error": "skip"},
            ValueError,
            "on_error: got 'skip', expected 'raise' or 'reject'",
        ),
        (None, {"num_samples": 1, "progress": 1}, TypeError, "progress: got 1, expected True or False"),
    ],
)
def test_refusals(trace: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^tsam\.hmc\.resume: {message}"):
        hmc.resume(density, states() if trace is None else trace, **options)
