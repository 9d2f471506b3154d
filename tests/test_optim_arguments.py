"""Every bad argument is refused at construction, before anything changes, in one sentence.

The sentence names TSAM, the argument, what came and what was wanted. A row of BAD is one mistake.
Invariant: what is refused (an argument, a parameter, a base optimizer) is left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import Parameter

import tsam_ext
from tsam_ext import TSAM

NAN, INF = math.nan, math.inf
NUMBER = "a finite number"

# argument, bad value, exception, what came, what was wanted
BAD: list[tuple[str, Any, type[Exception], str, str]] = [
    ("rho", -0.1, ValueError, "-0.1", NUMBER),
    ("rho", NAN, ValueError, "nan", NUMBER),
    ("rho", INF, ValueError, "inf", NUMBER),
    ("rho", "0.1", TypeError, "'0.1'", NUMBER),
    ("rho", None, TypeError, "None", NUMBER),
    ("rho", True, TypeError, "True", NUMBER),
    ("rho", 1j, TypeError, "1j", NUMBER),
    ("tilt", NAN, ValueError, "nan", "a number"),
    ("tilt", "1", TypeError, "'1'", "a number"),
    ("tilt", None, TypeError, "None", "a number"),
    ("tilt", True, TypeError, "True", "a number"),
    ("tilt", torch.zeros(2), ValueError, r"shape \(2,\)", "tensor of one element"),
    ("tilt", torch.tensor(1), ValueError, "int64", "tensor of one element"),
    ("num_samples", 0, ValueError, "0", "an integer"),
    ("num_samples", -2, ValueError, "-2", "an integer"),
    ("num_samples", 2.0, TypeError, "2.0", "an integer"),
    ("num_samples", True, TypeError, "True", "an integer"),
    ("num_samples", "3", TypeError, "'3'", "an integer"),
    ("sampler", "sgld", ValueError, "'sgld'", "'ascent' or 'noise'"),
    ("sampler", None, TypeError, "None", "'ascent' or 'noise' or 'hmc', or an Ascent, Noise or HMC object"),
    ("sampler", tsam_ext.Ascent, TypeError, "Ascent", "Ascent, Noise or HMC object"),
    ("radius", -1, ValueError, "-1", NUMBER),
    ("radius", NAN, ValueError, "nan", NUMBER),
    ("radius", "1", TypeError, "'1'", NUMBER),
    ("batch", "half", ValueError, "'half'", "'whole' or 'split'"),
    ("batch", 4, TypeError, "4", "'whole' or 'split'"),
    ("every", 0, ValueError, "0", "an integer"),
    ("every", -1, ValueError, "-1", "an integer"),
    ("every", 1.5, TypeError, "1.5", "an integer"),
    ("adaptive", 1, TypeError, "1", "True or False"),
    ("adaptive", None, TypeError, "None", "True or False"),
    ("adaptive", np.True_, TypeError, r"(numpy\.bool|bool_)", "True or False"),
    ("skip_nonfinite_loss", 0, TypeError, "0", "True or False"),
    ("same_masks", None, TypeError, "None", "True or False"),
    ("model", "net", TypeError, "'net'", "Module"),
    ("seed", -1, ValueError, "-1", "an integer"),
    ("seed", 1 << 64, ValueError, str(1 << 64), "an integer"),
    ("seed", 1.0, TypeError, "1.0", "an integer"),
    ("seed", True, TypeError, "True", "an integer"),
    ("base_optimizer", "SGD", TypeError, "'SGD'", "Optimizer"),
    ("base_optimizer", nn.Linear, TypeError, "Linear", "Optimizer"),
    ("base_optimizer", None, TypeError, "None", "Optimizer"),
    ("base_optimizer", torch.optim.LBFGS, ValueError, "LBFGS", "steps once"),
    ("base_optimizer", torch.optim.SparseAdam, ValueError, "SparseAdam", "steps once"),
]


def parameters() -> list[Parameter]:
    return [Parameter(torch.ones(3)), Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(("name", "value", "error", "got", "wanted"), BAD)
def test_bad_arguments_are_named(name, value, error, got: str, wanted: str) -> None:
    options = {} if name == "base_optimizer" else {"lr": 0.1}
    with pytest.raises(error, match=rf"^TSAM: {name}: got .*{got}.*, expected .*{wanted}"):
        TSAM(parameters(), **{name: value}, **options)


@pytest.mark.parametrize("row", [row for row in BAD if row[0] in ("rho", "radius", "adaptive")])
def test_bad_values_of_a_group_are_named(row: tuple[Any, ...]) -> None:
    name, value, error, got, wanted = row
    first, second = parameters()
    match = rf"^TSAM: param_groups\[1\]\.{name}: got .*{got}.*, expected .*{wanted}"
    with pytest.raises(error, match=match):
        TSAM([{"params": [first]}, {"params": [second], name: value}], lr=0.1)
    optimizer = TSAM([first], lr=0.1)
    with pytest.raises(error, match=match):
        optimizer.add_param_group({"params": [second], name: value})
    assert len(optimizer.param_groups) == 1


GLOBAL = ["tilt", "num_samples", "sampler", "batch", "every", "seed", "model"]


@pytest.mark.parametrize("name", [*GLOBAL, "skip_nonfinite_loss", "same_masks"])
def test_settings_for_all_groups_are_refused_in_one(name: str) -> None:
    value = {"tilt": 2.0, "num_samples": 3, "every": 1}.get(name, "ascent")
    first, second = parameters()
    with pytest.raises(ValueError, match=rf"TSAM: param_groups\[0\]\.{name}: got .*all groups"):
        TSAM([{"params": [first], name: value}], lr=0.1)
    optimizer = TSAM([first], lr=0.1)
    with pytest.raises(ValueError, match=rf"TSAM: param_groups\[1\]\.{name}"):
        optimizer.add_param_group({"params": [second], name: value})


def test_good_extremes_are_taken() -> None:
    for options in (
        {"rho": 0},
        {"radius": 0},
        {"radius": None},
        {"tilt": INF},
        {"tilt": -INF},
        {"tilt": 3},
        {"tilt": torch.tensor(2.0)},
        {"tilt": lambda step: 0.1 * step},
        {"seed": 0},
        {"seed": (1 << 64) - 1},
        {"num_samples": 1},
        {"every": 10**6},
    ):
        TSAM(parameters(), lr=0.1, **options)


def test_base_optimizer_class_and_instance() -> None:
    params = parameters()
    named = [("first", params[0]), ("second", params[1])]
    for given in (None, params, iter(params), [{"params": params}], named, iter(named), [{"params": named}]):
        base = torch.optim.AdamW(params, lr=0.1)
        optimizer = TSAM(given, base)
        assert optimizer.base_optimizer is base
        assert optimizer.param_groups is base.param_groups
        assert optimizer.state is base.state
        assert optimizer.defaults is base.defaults
    assert isinstance(TSAM(params, lr=0.1).base_optimizer, torch.optim.SGD)
    assert isinstance(TSAM(params, lr=0.1), torch.optim.Optimizer)
    base = torch.optim.AdamW(params, lr=0.1)
    for other in (params[::-1], params[:1], parameters(), []):
        with pytest.raises(ValueError, match=r"^TSAM: params: got .*base_optimizer"):
            TSAM(other, base)
    with pytest.raises(TypeError, match=r"^TSAM: lr: got 0.1, expected .*instance"):
        TSAM(params, base, lr=0.1)
    with pytest.raises(TypeError, match=r"^TSAM: params: got None"):
        TSAM(None, lr=0.1)
    held = torch.optim.SGD(params, lr=0.1)
    TSAM(held)
    with pytest.raises(ValueError, match=r"^TSAM: base_optimizer: got SGD with .*, expected .* no TSAM holds already"):
        TSAM(held)
    with pytest.raises(TypeError, match=r"^TSAM: base_optimizer: got .*AdamW.*, expected nothing beside"):
        TSAM(torch.optim.SGD(params, lr=0.1), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"^TSAM: base_optimizer: got LBFGS"):
        TSAM(None, torch.optim.LBFGS(params))
    with pytest.raises(ValueError, match=r"^TSAM: base_optimizer: got .*TSAM"):
        TSAM(None, TSAM(params, lr=0.1))


def test_a_refused_instance_is_left_as_it_was() -> None:
    """The checks come first: nothing is added to a base optimizer that we then refuse to wrap."""
    base = torch.optim.SGD(parameters(), lr=0.1)
    defaults, keys = dict(base.defaults), set(base.param_groups[0])
    state = torch.random.get_rng_state()
    for options in ({"rho": -1.0}, {"tilt": NAN}, {"seed": -1}, {"model": 3}, {"lr": 0.1}):
        with pytest.raises((TypeError, ValueError)):
            TSAM(None, base, **options)
    assert (base.defaults, set(base.param_groups[0])) == (defaults, keys)
    assert torch.equal(torch.random.get_rng_state(), state)


SHARED = torch.zeros(16)
UNUSABLE: dict[str, tuple[Callable[[], list[Parameter]], str, str]] = {
    "sparse": (lambda: [Parameter(torch.eye(3).to_sparse())], "sparse", "dense"),
    "sparse csr": (lambda: [Parameter(torch.eye(3).to_sparse_csr())], "sparse", "dense"),
    "complex": (lambda: [Parameter(torch.ones(3, dtype=torch.complex32))], "complex32", "float32"),
    "gaps": (lambda: [Parameter(torch.zeros(4, 6)[:, ::2])], "strides", "dense"),
    "expanded": (lambda: [Parameter(torch.zeros(1).expand(5))], "strides", "dense"),
    "overlapping": (
        lambda: [Parameter(SHARED[:6]), Parameter(torch.ones(2)), Parameter(SHARED[4:])],
        r"memory shared with param_groups\[.\]\['params'\]\[0\]",
        "overlap",
    ),
    "same memory": (lambda: [Parameter(SHARED[:6]), Parameter(SHARED[:6])], "memory shared", "overlap"),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("name", UNUSABLE)
def test_parameters_that_cannot_be_moved_are_named(name: str) -> None:
    build, got, wanted = UNUSABLE[name]
    bad = build()
    match = rf"^TSAM: param_groups\[0\]\['params'\]\[\d\]: got .*{got}.*, expected .*{wanted}"
    with pytest.raises(ValueError, match=match):
        TSAM(bad, lr=0.1)
    with pytest.raises(ValueError, match=match):
        TSAM(None, torch.optim.SGD(bad, lr=0.1))
    optimizer = TSAM(parameters(), lr=0.1)
    with pytest.raises(ValueError, match=match.replace(r"\[0\]", r"\[1\]", 1)):
        optimizer.add_param_group({"params": bad, "rho": 0.1})
    assert len(optimizer.param_groups) == 1


def test_overlap_with_an_earlier_group_is_seen() -> None:
    optimizer = TSAM([Parameter(SHARED[:6])], lr=0.1)
    with pytest.raises(ValueError, match=r"param_groups\[1\].*memory shared with param_groups\[0\]"):
        optimizer.add_param_group({"params": [Parameter(SHARED[2:9])]})
    optimizer.add_param_group({"params": [Parameter(SHARED[6:9])]})  # neighbours are fine


def test_what_torch_refuses_stays_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        TSAM([], lr=0.1)
    with pytest.raises(ValueError, match="learning rate"):
        TSAM(parameters(), lr=-1.0)
    with pytest.raises(TypeError, match="momentun"):
        TSAM(parameters(), lr=0.1, momentun=0.9)
    with pytest.raises(TypeError):
        TSAM(parameters(), torch.optim.SGD, 0.1)
    with pytest.raises(TypeError):
        TSAM(torch.ones(3), lr=0.1)


@pytest.mark.parametrize("value", [NAN, "1", None, torch.ones(2)])
def test_a_schedule_with_a_bad_value_is_named_and_harmless(problem, value: Any) -> None:
    task = problem()
    copies = task.copies()
    optimizer = TSAM(task.parameters, lr=0.1, tilt=lambda step: value, num_samples=3)
    with pytest.raises((TypeError, ValueError), match="tilt"):
        task.train(optimizer, 1)
    assert task.holds(copies)
    assert task.calls == []
