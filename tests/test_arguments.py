"""What every function of tsam_ext.functional says of every kind of bad argument, over all of their arguments.

Law: a bad value is a TypeError or ValueError that names the op, the argument and the index in a list, what came and
what was wanted, and nothing has been written by then. The table is op × argument × bad values of the argument's kind.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tsam_ext import _C, functional

HUGE = 10**400  # float() overflows
LONG = 10**5000  # and repr() refuses this one
NAN, INF = float("nan"), float("inf")


class Sub(Tensor):
    """A subclass that adds nothing."""


def pair() -> list[Tensor]:
    return [torch.ones(3), torch.full((2, 2), 2.0)]


def begun() -> Tensor:
    state = functional.new_state(2)
    functional.tilt_begin_(state, 1.0)
    functional.tilt_update_(state, 0.5, 0)
    return state


def vector() -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0])


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "tilted_loss": lambda: {"losses": vector(), "tilt": 1.0},
    "tilted_weights": lambda: {"losses": vector(), "tilt": 1.0},
    "tilted_reduce": lambda: {"losses": vector(), "values": torch.ones(3, 2), "tilt": 1.0},
    "leapfrog": lambda: {
        "position": vector(),
        "momentum": vector(),
        "grad_log_density": vector(),
        "step_size": 0.1,
        "inverse_mass": 2.0,
    },
    "kick": lambda: {"momentum": vector(), "grad_log_density": vector(), "a": 0.1},
    "leapfrog_": lambda: GOOD["leapfrog"](),
    "kick_": lambda: GOOD["kick"](),
    "perturb": lambda: {"x": vector(), "radius": 0.1, "seed": 1, "draw": 0, "base": 0, "kind": "ball"},
    "perturb_": lambda: {
        "position": pair(),
        "saved": pair(),
        "state": begun(),
        "radius": 0.1,
        "seed": 1,
        "step": 0,
        "sample": 0,
        "kind": "sphere",
        "adaptive": False,
        "base": [0, 4],
        "dimension": 7,
        "negate": False,
        "save": True,
        "rounding": "stochastic",
    },
    "grad_norm_": lambda: {"grads": pair(), "origin": pair(), "state": begun(), "adaptive": False, "row": 1},
    "ascend_": lambda: {
        "position": pair(),
        "saved": pair(),
        "grads": pair(),
        "state": begun(),
        "rho": 0.1,
        "adaptive": False,
        "save": True,
        "rounding": "stochastic",
        "seed": 1,
        "step": 0,
        "sample": 0,
        "base": [0, 4],
    },
    "tilt_begin_": lambda: {"state": begun(), "tilt": 1.0},
    "tilt_update_": lambda: {
        "state": begun(),
        "loss": 0.5,
        "row": 1,
        "log_size": 0.0,
        "skip_nonfinite": False,
        "last": False,
    },
    "accumulate_": lambda: {"accumulator": pair(), "grads": pair(), "state": begun()},
    "restore_": lambda: {"position": pair(), "saved": pair()},
    "new_state": lambda: {"num_samples": 1, "device": "cpu"},
}


def kind_of(op: str, name: str, value: object) -> str:
    """What kind of argument one is: by its name, or by the good value."""
    named = {
        "tilt": "tilt",
        "base": "integer" if op == "perturb" else "integers",
        "adaptive": "flags",
        "rho": "numbers",
    }
    named |= {"loss": "number", "log_size": "plain number", "kind": "word", "device": "word", "step_size": "factor"}
    named |= {"a": "factor", "inverse_mass": "positive factor", "radius": "lengths" if op == "perturb_" else "length"}
    named |= {"rounding": "word"}
    if name in named:
        return named[name]
    if isinstance(value, Tensor):
        return "state" if name == "state" else "tensor"
    return {list: "list", bool: "flag", int: "integer"}[type(value)]


NOT_TENSORS: dict[str, Any] = {
    "None": None,
    "number": 1.0,
    "string": "ab",
    "list": [1.0],
    "array": np.ones(3),
    "object": object(),
    "class": Tensor,
}
BAD_TENSORS: dict[str, Callable[[], Any]] = {
    "int64": lambda: torch.ones(3, dtype=torch.int64),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "sparse csr": lambda: torch.ones(3, 3).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}
NOT_NUMBERS: dict[str, Any] = {
    "None": None,
    "string": "a",
    "flag": True,
    "numpy's flag": np.True_,
    "complex": 1j,
    "Decimal": Decimal("0.5"),
    "bytes": b"x",
    "dict": {},
    "object": object(),
    "array": np.ones(2),
}
NOT_FINITE: dict[str, Any] = {"nan": NAN, "inf": INF, "numpy's nan": np.float32(NAN)}
TOO_LARGE: dict[str, Any] = {"huge": HUGE, "long": LONG, "long and negative": -LONG}
BELOW_ZERO: dict[str, Any] = {"-1": -1, "-0.5": -0.5}
NOT_FLAGS: dict[str, Any] = {
    "None": None,
    "0": 0,
    "2": 2,
    "string": "yes",
    "numpy's": np.True_,
    "tensor": torch.ones(()),
}
NOT_INTEGERS: dict[str, Any] = {**NOT_NUMBERS, "0.5": 0.5, "nan": NAN, "tensor": torch.ones((), dtype=torch.int64)}
OUT_OF_RANGE: dict[str, Any] = {"-1": -1, "2**70": 2**70, **TOO_LARGE}
TENSOR_IN_NUMBERS: dict[str, Any] = {"tensor": torch.ones(())}
BAD_FACTORS: dict[str, Any] = {
    "one dimension too many": lambda: torch.ones(1, 1),
    "does not broadcast": lambda: torch.ones(2),
    "on another device": lambda: torch.ones((), device="meta"),
    "int64 number": lambda: torch.ones((), dtype=torch.int64),
}
SCALARS: dict[str, Any] = {**NOT_NUMBERS, **TOO_LARGE, "list": [0.5]}
BAD: dict[str, dict[str, Any]] = {
    "tensor": {**NOT_TENSORS, **BAD_TENSORS},
    "state": {
        **NOT_TENSORS,
        **BAD_TENSORS,
        "float32": lambda: torch.ones(40),
        "too short": lambda: torch.ones(15, dtype=torch.float64),
        "every second": lambda: torch.ones(80, dtype=torch.float64)[::2],
    },
    "list": {
        **{k: v for k, v in NOT_TENSORS.items() if k not in ("list", "None")},
        "tensor": lambda: torch.ones(3),
        "generator": lambda: iter(pair()),
        "dict": lambda: dict(enumerate(pair())),
        "range": range(2),
    },
    "tilt": {**SCALARS, "nan": NAN},
    "number": {**SCALARS, "two": lambda: torch.ones(2), "on another device": lambda: torch.ones((), device="meta")},
    "plain number": {**SCALARS, **NOT_FINITE, **TENSOR_IN_NUMBERS},
    "factor": {**SCALARS, **NOT_FINITE, **BAD_FACTORS},
    "positive factor": {**SCALARS, **NOT_FINITE, **BAD_FACTORS, **BELOW_ZERO, "0": 0},
    "length": {**SCALARS, **NOT_FINITE, **BELOW_ZERO, "two": lambda: torch.ones(2)},
    "lengths": {**NOT_NUMBERS, **TOO_LARGE, **NOT_FINITE, **BELOW_ZERO, **TENSOR_IN_NUMBERS},
    "numbers": {**NOT_NUMBERS, **TOO_LARGE, **NOT_FINITE, **TENSOR_IN_NUMBERS},
    "flag": {**NOT_FLAGS, "list": [True]},
    "flags": NOT_FLAGS,
    "integer": {**NOT_INTEGERS, **OUT_OF_RANGE, "list": [1]},
    "integers": {k: v for k, v in NOT_INTEGERS.items() if k != "None"},
    "word": {"None": None, "another": "cube", "number": 1.5, "flag": True, "list": ["ball"], "bytes": b"ball"},
}
# In the second place of a list, the first being good.
BAD_ITEMS: dict[str, dict[str, Any]] = {
    "list": {**NOT_TENSORS, **BAD_TENSORS, "on another device": lambda: torch.ones(3, device="meta")},
    "lengths": {**BAD["lengths"], "list": [0.5]},
    "numbers": {**BAD["numbers"], "list": [0.5]},
    "flags": {**NOT_FLAGS, "list": [True]},
    "integers": {**NOT_INTEGERS, **OUT_OF_RANGE, "list": [1]},
}
FIRST: dict[str, Any] = {"lengths": 0.5, "numbers": 0.5, "flags": True, "integers": 0}


def rows() -> Iterator[Any]:
    """op, argument, what it is bad for, how to make it, and the place that a message must name."""
    for op, good in GOOD.items():
        for name, value in good().items():
            kind = kind_of(op, name, value)
            optional = {("accumulate_", "grads"), *(("perturb_", name) for name in ("base", "dimension", "step"))}
            optional |= {("ascend_", name) for name in ("base", "step")}
            for label, bad in BAD[kind].items():
                if not (label == "None" and (op, name) in optional):
                    yield pytest.param(op, name, None, bad, re.escape(name), id=f"{op}-{name}-{label}")
            for label, bad in BAD_ITEMS.get(kind, {}).items():
                place = rf"{name}\[1\]"
                if label == "on another device" and name == next(iter(good())):
                    place = r"\w+\[[01]\]"  # the list's first tensor says where all should be
                yield pytest.param(op, name, FIRST.get(kind, value), bad, place, id=f"{op}-{name}[1]-{label}")
            if kind in BAD_ITEMS:
                for length in (0, 1, 3):
                    entries = [FIRST.get(kind)] * length if kind in FIRST else [torch.ones(3) for _ in range(length)]
                    yield pytest.param(op, name, None, lambda e=entries: e, r"\w+", id=f"{op}-{name}-{length} entries")


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    every = (v if isinstance(v, (list, tuple)) else [v] for v in arguments.values())
    return [t for values in every for t in values if type(t) is Tensor and t.layout is torch.strided]


@pytest.mark.parametrize(("op", "name", "first", "bad", "place"), list(rows()))
def test_a_bad_argument_is_named_and_nothing_written(op: str, name: str, first: Any, bad: Any, place: str) -> None:
    arguments = GOOD[op]()
    value = bad() if callable(bad) and not isinstance(bad, type) else bad
    if first is not None:
        value = [first[0] if isinstance(first, list) and isinstance(first[0], Tensor) else first, value]
        if name == "base":
            value[0] = 0
    arguments[name] = value
    tensors = [t for t in tensors_of(arguments) if t.device.type == "cpu" and t.dtype != torch.float8_e4m3fn]
    before = [(t.clone(), t._version) for t in tensors]
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(functional, op)(**arguments)
    message = str(caught.value)
    assert re.match(rf"tsam\.{op}: {place}: got .+, expected .+", message), message
    assert len(message) < 400
    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())
        assert tensor._version == version


def test_the_table_has_every_function_and_argument() -> None:
    functions = {name for name in functional.__all__ if name != "Slot"}
    assert functions == GOOD.keys()
    for op, good in GOOD.items():
        assert list(inspect.signature(getattr(functional, op)).parameters) == list(good())
        getattr(functional, op)(**good())  # and what it calls good is


@pytest.mark.parametrize("op", GOOD)
def test_subclasses_tuples_and_numpy_numbers_are_taken(op: str) -> None:
    arguments = GOOD[op]()

    def other(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(other, value))
        if isinstance(value, Tensor):
            return value.as_subclass(Sub)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        return np.int64(value) if isinstance(value, int) else np.float32(value)

    getattr(functional, op)(**{name: other(value) for name, value in arguments.items()})


def lazy() -> dict[str, Tensor]:
    return {"negated": torch._neg_view(torch.ones(3)), "zero": torch._efficientzerotensor(3)}


@pytest.mark.parametrize("name", ["negated", "zero"])
def test_lists_that_are_written_refuse_tensors_without_values_of_their_own(name: str) -> None:
    tensor = lazy()[name]
    message = rf"restore_: position\[0\]: got a lazily {name} tensor, expected one whose values lie in its memory"
    with pytest.raises(ValueError, match=message):
        functional.restore_([tensor], [torch.ones(3)])


def test_a_lazily_negated_gradient_is_read_as_it_is() -> None:
    total = [torch.ones(3)]
    functional.accumulate_(total, [lazy()["negated"]], begun())  # the first sample's
    assert torch.equal(total[0], torch.full((3,), -1.0))


def test_an_accumulator_needs_a_counted_sample() -> None:
    """Without one the state holds no action: adopted gradients were read from a list of none."""
    for gradients in (None, [torch.ones(3)]):
        total = [torch.full((3,), 2.0)]
        with pytest.raises(ValueError, match=r"accumulate_: state: got a state in which no step has begun, expected"):
            functional.accumulate_(total, gradients, functional.new_state(1))
        assert torch.equal(total[0], torch.full((3,), 2.0))


def test_the_kernels_name_a_missing_tensor_too() -> None:
    for call, place in (
        (lambda: _C.tilt_begin_(begun(), None), "tilt_begin_: tilt"),
        (lambda: _C.tilt_update_(begun(), None, 0.0, 0, False, False), "tilt_update_: loss"),
        (lambda: _C.kick(vector(), vector(), None), "kick: a"),
    ):
        with pytest.raises(ValueError, match=rf"^tsam\.{place}: got None, expected a tensor$"):
            call()
