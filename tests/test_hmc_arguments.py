"""What tsam_ext.hmc.sample refuses, each before the first transition or at the call of the log density that breaks it.

Messages name the argument, what came and what was wanted.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tsam_ext import hmc


def density(x: list[Tensor]) -> Tensor:
    return -x[0].square().sum()


X = [torch.ones(2)]
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"position": 1.0}, TypeError, "position: got float, expected a tensor or a list of tensors$"),
    ({"position": np.ones(2)}, TypeError, "position: got ndarray, expected a tensor or a list of tensors$"),
    ({"position": X[0].int()}, ValueError, "position: got a torch.strided tensor of torch.int32"),
    ({"position": X[0].to("meta")}, ValueError, "position: got a tensor on meta, expected one that kernels run on"),
    ({"position": X[0], "log_density": 3}, TypeError, "log_density: got int, expected a function of a tensor$"),
    (
        {"position": X[0], "log_density": lambda x: torch.zeros(())},
        ValueError,
        "a value that does not depend on position, expected one that",
    ),
    ({"position": X[0], "inverse_mass": 1e300}, ValueError, r"inverse_mass: got 1e\+300, .* as position is scaled by"),
    ({"position": [1.0]}, TypeError, r"position\[0\]: got float, expected a tensor"),
    ({"position": []}, ValueError, "position: got no elements, expected a tensor, or a list of tensors, with at least"),
    ({"position": [torch.ones(0)]}, ValueError, "position: got no elements"),
    ({"position": [X[0], X[0].int()]}, ValueError, r"position\[1\]: got a torch.strided tensor of torch.int32"),
    ({"position": [X[0].cfloat()]}, ValueError, r"position\[0\]: got a torch.strided tensor of torch.complex64"),
    ({"position": [X[0].to_sparse()]}, ValueError, r"position\[0\]: got a torch.sparse_coo tensor"),
    (
        {"position": [X[0].to("meta")]},
        ValueError,
        r"position\[0\]: got a tensor on meta, expected one that kernels run on",
    ),
    ({"position": [X[0], X[0]]}, ValueError, r"log_density: got a value that does not depend on position\[1\]"),
    ({"position": [torch.tensor([math.nan])]}, ValueError, "log_density: got nan at the start, expected a finite"),
    ({"log_density": 3}, TypeError, "log_density: got int, expected a function of a list of tensors"),
    ({"log_density": lambda x: 1.0}, TypeError, "log_density: got float, expected a tensor of one element"),
    ({"log_density": lambda x: x[0]}, ValueError, r"got a torch.float32 tensor of shape \(2,\) on cpu, expected a fl"),
    ({"log_density": lambda x: x[0].sum().cfloat()}, ValueError, r"got a torch.complex64 tensor of shape \(\) on cpu"),
    ({"log_density": lambda x: x[0].sum().to("meta")}, ValueError, r"got a torch.float32 tensor of shape \(\) on meta"),
    ({"log_density": lambda x: density(x).detach()}, ValueError, r"a value that does not depend on position\[0\]"),
    ({"log_density": lambda x: x[0].sum() / 0.0}, ValueError, "log_density: got inf at the start"),
    ({"log_density": lambda x: (1 - x[0]).log().sum()}, ValueError, "log_density: got -inf at the start"),
    (
        {"log_density": lambda x: (1 - x[0]).sqrt().sum()},
        ValueError,
        r"log_density: got a gradient for position\[0\] that is not finite at the start",
    ),
    ({"num_samples": 0}, ValueError, "num_samples: got 0, expected an integer from 1"),
    ({"num_samples": 1.5}, TypeError, "num_samples: got 1.5, expected an integer"),
    ({"burn_in": -1}, ValueError, "burn_in: got -1, expected an integer from 0"),
    ({"thin": 0}, ValueError, "thin: got 0, expected an integer from 1"),
    (
        {"thin": 1 << 30, "num_samples": 4, "burn_in": 7},
        ValueError,
        r"burn_in \+ thin \* num_samples: got 4294967303, expected an integer from 1 to 4294967295",
    ),
    ({"num_leapfrog_steps": 0}, ValueError, "num_leapfrog_steps: got 0, expected an integer from 1 to 65536"),
    ({"num_leapfrog_steps": True}, TypeError, "num_leapfrog_steps: got True"),
    ({"step_size": 0.0}, ValueError, "step_size: got 0.0, expected a finite number above 0$"),
    ({"step_size": -0.1}, ValueError, "step_size: got -0.1, expected a finite number above 0$"),
    ({"step_size": math.inf}, ValueError, "step_size: got inf"),
    ({"step_size": "far"}, TypeError, "step_size: got 'far', expected a finite number above 0$"),
    ({"inverse_mass": 0}, ValueError, "inverse_mass: got 0, expected a finite number above 0"),
    ({"inverse_mass": [1.0, 1.0]}, ValueError, r"inverse_mass: got 2 entries, expected 1 \(as many as position\)"),
    ({"inverse_mass": [-1.0]}, ValueError, r"inverse_mass\[0\]: got -1.0, expected a finite number above 0"),
    (
        {"inverse_mass": 1e300},
        ValueError,
        r"inverse_mass\[0\]: got 1e\+300, expected a number whose root is a normal torch.float32, as pos",
    ),
    ({"inverse_mass": [1e-80]}, ValueError, r"inverse_mass\[0\]: got 1e-80, expected a number whose root is a normal"),
    (
        {"inverse_mass": 10**400},
        ValueError,
        "inverse_mass: got an integer of 1329 bits, expected a finite number",
    ),
    ({"step_size_jitter": -0.1}, ValueError, "step_size_jitter: got -0.1, expected a number from 0 to 1$"),
    ({"step_size_jitter": 1.5}, ValueError, "step_size_jitter: got 1.5, expected a number from 0 to 1$"),
    ({"step_size_jitter": math.nan}, ValueError, "step_size_jitter: got nan, expected a number from 0 to 1$"),
    ({"step_size_jitter": True}, TypeError, "step_size_jitter: got True, expected a number from 0 to 1$"),
    ({"on_error": "ignore"}, ValueError, "on_error: got 'ignore', expected 'raise' or 'reject'"),
    ({"on_error": None}, TypeError, "on_error: got None, expected 'raise' or 'reject'"),
    ({"adapt_step_size": 1}, TypeError, "adapt_step_size: got 1, expected True or False"),
    ({"metropolis": None}, TypeError, "metropolis: got None, expected True or False"),
    ({"progress": "yes"}, TypeError, "progress: got 'yes', expected True or False"),
    ({"integrator": "leapfrog"}, TypeError, r"integrator: got str, expected coefficients \(kick, drift, ..., kick\)"),
    ({"integrator": (1.0,)}, ValueError, r"integrator: got \(1.0,\), expected coefficients"),
    ({"integrator": (0.5, 1.0, 0.5, 0.0)}, ValueError, r"integrator: got \(0.5, 1.0, 0.5, 0.0\)"),
    ({"integrator": (0.4, 1.0, 0.6)}, ValueError, r"integrator: got \(0.4, 1.0, 0.6\)"),
    ({"integrator": (0.5, 0.9, 0.5)}, ValueError, r"integrator: got \(0.5, 0.9, 0.5\)"),
    ({"integrator": (0.4, 1.0, 0.4)}, ValueError, r"integrator: got \(0.4, 1.0, 0.4\)"),
    ({"integrator": (0.5, math.nan, 0.5)}, ValueError, r"integrator\[1\]: got nan, expected a finite number$"),
    ({"seed": -1}, ValueError, "seed: got -1, expected an integer from 0"),
    ({"seed": 2**64}, ValueError, "seed: got 18446744073709551616"),
    ({"seed": "lucky"}, TypeError, "seed: got 'lucky', expected an integer"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"log_density": density, "position": X, "num_samples": 2, "burn_in": 0, **arguments}
    with pytest.raises(error, match=rf"^tsam\.hmc\.sample: .*{message}"):
        hmc.sample(arguments.pop("log_density"), arguments.pop("position"), **arguments)


def test_a_trace_is_for_resume() -> None:
    trace = hmc.sample(density, X, num_samples=1, burn_in=0)
    with pytest.raises(TypeError, match=r"position: got Trace, expected .* \(hmc.resume goes on from a trace\)"):
        hmc.sample(density, trace)  # type: ignore[call-overload]


def test_a_log_density_that_changes_its_mind_is_refused_when_it_does() -> None:
    calls: list[int] = []

    def late(x: list[Tensor]) -> Any:
        calls.append(1)
        return density(x) if len(calls) < 4 else x[0]

    with pytest.raises(ValueError, match=r"log_density: got a torch.float32 tensor of shape \(2,\)"):
        hmc.sample(late, X)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (5, TypeError, "names: got int, expected a list of 1 different names"),
        ("x", TypeError, "names: got str, expected a list of 1 different names"),
        ([None], TypeError, r"names\[0\]: got NoneType, expected a string"),
        (["a", "b"], ValueError, r"names: got \['a', 'b'\], expected 1 different names"),
    ],
)
def test_names_of_a_trace_are_checked(names: Any, error: type[Exception], message: str) -> None:
    trace = hmc.sample(density, X, num_samples=2, burn_in=0)
    with pytest.raises(error, match=rf"^tsam\.hmc\.Trace\.to_dict: {message}"):
        trace.to_dict(names)


def test_the_default_device_is_nobody_s_business() -> None:
    want = hmc.sample(density, X, num_samples=5, burn_in=2, seed=3)
    torch.set_default_device("meta")
    try:
        got = hmc.sample(density, X, num_samples=5, burn_in=2, seed=3)
        hmc.sample(density, X, num_samples=1, burn_in=0)  # draws its seed
    finally:
        torch.set_default_device(None)
    assert torch.equal(got.draws[0], want.draws[0])
    assert torch.equal(got.log_density, want.log_density)
