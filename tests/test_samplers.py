"""Samplers as objects: frozen, checking themselves, and refused or named where an option belongs elsewhere.

An option's meaning is its sampler's: what means nothing for one is refused, by name, before anything changes.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
from typing import Any, get_args, get_type_hints

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import tsam_ext
from tsam_ext import HMC, TSAM, Ascent, Noise
from tsam_ext.engine.checks import NOISES
from tsam_ext.phase_space import PRIORS
from tsam_ext.samplers import BY_NAME, NoiseKind, SamplerName

NAN, INF = math.nan, math.inf
NUMBER = "a finite number"

BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (Ascent, {"noise": "uniform"}, ValueError, "noise: got 'uniform', expected 'gaussian' or 'sphere' or 'ball'"),
    (Noise, {"noise": 0}, TypeError, "noise: got 0, expected 'gaussian'"),
    (Noise, {"antithetic": "yes"}, TypeError, "antithetic: got 'yes', expected True or False"),
    (HMC, {"step_size": 0.0}, ValueError, "step_size: got 0.0, expected None or a finite number above 0"),
    (HMC, {"step_size": -1.0}, ValueError, "step_size: got -1.0"),
    (HMC, {"step_size": "long"}, TypeError, "step_size: got 'long'"),
    (HMC, {"delta": NAN}, ValueError, "delta: got nan, expected None, a finite number, a 0-dim tensor or 'auto'"),
    (HMC, {"delta": INF}, ValueError, "delta: got inf"),
    (HMC, {"delta": "much"}, TypeError, "delta: got 'much'"),
    (HMC, {"delta": torch.ones(2)}, ValueError, "delta: got a torch.float32 tensor of shape (2,), expected a floating"),
    (HMC, {"delta": torch.tensor(1)}, ValueError, "delta: got a torch.int64 tensor"),
    (HMC, {"delta_scale": INF}, ValueError, "delta_scale: got inf, expected a finite number"),
    (HMC, {"num_leapfrog_steps": 0}, ValueError, "num_leapfrog_steps: got 0, expected an integer from 1"),
    (HMC, {"num_leapfrog_steps": 1.5}, TypeError, "num_leapfrog_steps: got 1.5"),
    (HMC, {"prior": "cauchy"}, ValueError, "prior: got 'cauchy', expected 'gaussian' or 'ball'"),
    (HMC, {"chain": "long"}, ValueError, "chain: got 'long', expected 'persistent' or 'fresh'"),
    (HMC, {"burn_in": -1}, ValueError, "burn_in: got -1"),
    (HMC, {"metropolis": 1}, TypeError, "metropolis: got 1"),
    (HMC, {"recycle": "yes"}, TypeError, "recycle: got 'yes'"),
    (HMC, {"adapt_step_size": None}, TypeError, "adapt_step_size: got None"),
]


def parameters() -> list[Parameter]:
    return [Parameter(torch.ones(3)), Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(("kind", "options", "error", "message"), BAD)
def test_a_sampler_checks_itself(kind: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{kind.__name__}: {re.escape(message)}"):
        kind(**options)


def test_python_refuses_what_a_sampler_does_not_have() -> None:
    for kind, name in ((HMC, "radius"), (HMC, "noise"), (Ascent, "delta"), (Noise, "recycle")):
        with pytest.raises(TypeError, match=name):
            kind(**{name: 1.0})


def test_samplers_are_frozen_and_small() -> None:
    for sampler in (Ascent(), Noise("sphere", antithetic=True), HMC(delta=2)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            sampler.noise = "ball"  # type: ignore[misc, union-attr]
        assert repr(pickle.loads(pickle.dumps(sampler))) == repr(sampler)
    assert Ascent("ball") == Ascent("ball") != Ascent("sphere")
    assert Ascent() != Noise()
    assert HMC(delta=numpy.float32(2), burn_in=numpy.int64(3)).delta.__class__ is float


@pytest.mark.parametrize(("name", "kind"), [("ascent", Ascent), ("noise", Noise), ("hmc", HMC)])
def test_a_name_is_the_sampler_with_its_defaults(name: Any, kind: Any) -> None:
    optimizer = TSAM(parameters(), lr=0.1, sampler=name)
    assert type(optimizer.settings.sampler) is kind
    assert repr(optimizer.settings.sampler) == repr(kind())
    given = kind()
    assert TSAM(parameters(), lr=0.1, sampler=given).settings.sampler is given


def test_gradients_per_step_are_counted(problem) -> None:
    """What a sampler's page says of its price is how often the closure runs."""
    for sampler in (Ascent(), Noise(), HMC(num_leapfrog_steps=2, burn_in=1)):
        task = problem()
        optimizer = TSAM(task.parameters, lr=0.1, sampler=sampler, num_samples=4)
        task.train(optimizer, 1)
        assert len(task.calls) == {Ascent: 2 * 4, Noise: 4, HMC: 1 + 2 * (4 + 1)}[type(sampler)]


OPTIONS = [field.name for kind in (Ascent, HMC) for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("given", ["class", "instance", "only an instance"])
def test_a_sampler_s_option_given_to_tsam_says_where_it_belongs(name: str, given: str) -> None:
    owner = "Ascent" if name in ("noise", "antithetic") else "HMC"
    message = rf"^TSAM: {name} belongs to the sampler: sampler={owner}\({name}=\.\.\.\)$"
    base = torch.optim.SGD(parameters(), lr=0.1)
    arguments = {"class": (parameters(),), "instance": (None, base), "only an instance": (base,)}[given]
    with pytest.raises(TypeError, match=message):
        TSAM(*arguments, **{name: 1.0})
    assert "radius" not in base.defaults


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sampler_s_option_in_a_group_says_where_it_belongs(name: str) -> None:
    match = rf"^TSAM: param_groups\[\d\]\.{name}: got 1.0, expected no such key: .*sampler=\w+\({name}=\.\.\.\)"
    first, second = parameters()
    with pytest.raises(ValueError, match=match):
        TSAM([{"params": [first], name: 1.0}], lr=0.1)
    optimizer = TSAM([first], lr=0.1)
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [second], name: 1.0})
    assert len(optimizer.param_groups) == 1


class WithOptions(torch.optim.SGD):
    """A base with options that are named as a sampler's and as ours."""

    def __init__(self, params: Any, lr: float = 0.1, delta: float = 0.1, chain: str = "no", rho: float = 0.9) -> None:
        super().__init__(params, lr=lr)
        for name, value in (("delta", delta), ("chain", chain), ("rho", rho)):
            self.defaults[name] = value
            for group in self.param_groups:
                group.setdefault(name, value)


def test_a_base_s_own_options_are_its_own() -> None:
    first, second = parameters()
    optimizer = TSAM([{"params": [first], "delta": 0.5}, {"params": [second]}], WithOptions, delta=0.2, rho=0.3)
    assert [group["delta"] for group in optimizer.param_groups] == [0.5, 0.2]
    assert [group["rho"] for group in optimizer.param_groups] == [0.9, 0.9]
    assert [group["tsam_rho"] for group in optimizer.param_groups] == [0.3, 0.3]
    optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "chain": "yes", "rho": 0.4, "tsam_rho": 0.7})
    assert optimizer.param_groups[2]["rho"] == 0.4
    assert optimizer.param_groups[2]["tsam_rho"] == 0.7
    instance = WithOptions(parameters())
    instance.param_groups[0]["prior"] = "a note of its owner's"
    TSAM(instance, sampler=HMC(delta=3.0))
    assert instance.param_groups[0]["delta"] == 0.1


def test_adadelta_has_a_rho_of_its_own(problem) -> None:
    """Ours perturbs, Adadelta's averages: as by hand, over three steps of SAM, and through a checkpoint."""
    task, twin = problem(), problem()
    optimizer = TSAM(task.parameters, torch.optim.Adadelta, lr=0.5, rho=0.3, radius=0.0, num_samples=1)
    (group,) = optimizer.param_groups
    assert (group["rho"], group["tsam_rho"]) == (0.9, 0.3)
    plain = torch.optim.Adadelta(twin.parameters, lr=0.5)
    for _ in range(3):
        task.train(optimizer, 1)
        plain.zero_grad()
        twin.loss().backward()
        start = twin.copies()
        norm = twin.gradient().norm()
        with torch.no_grad():
            for p in twin.parameters:
                p += 0.3 * p.grad / norm
        plain.zero_grad()
        twin.loss().backward()
        with torch.no_grad():
            for p, before in zip(twin.parameters, start, strict=True):
                p.copy_(before)
        plain.step()
    torch.testing.assert_close(task.flat(), twin.flat(), rtol=1e-12, atol=1e-12)
    other = TSAM(problem().parameters, torch.optim.Adadelta, rho=0.8)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["rho"], other.param_groups[0]["tsam_rho"]) == (0.9, 0.3)


def test_noise_takes_one_length(problem) -> None:
    """radius is the length of the noise; rho is, where there is no radius. Both at once: one would be ignored."""
    first, second = parameters()
    match = r"rho: got 0.3 beside radius=0.2, expected one of the two, or rho=0, as the sampler is Noise"
    with pytest.raises(ValueError, match="^TSAM: " + match):
        TSAM([first], lr=0.1, sampler="noise", rho=0.3, radius=0.2)
    with pytest.raises(ValueError, match=r"^TSAM: param_groups\[0\]\." + match):
        TSAM([{"params": [first], "rho": 0.3}], lr=0.1, sampler="noise", radius=0.2)
    with pytest.raises(TypeError, match=r"^TSAM: param_groups\[0\]\.rho: got '0.3', expected a finite number"):
        TSAM([{"params": [first], "rho": "0.3"}], lr=0.1, sampler="noise", radius=0.2)
    optimizer = TSAM([first], lr=0.1, sampler="noise", rho=0.1)
    with pytest.raises(ValueError, match=r"^TSAM: param_groups\[1\]\." + match):
        optimizer.add_param_group({"params": [second], "rho": 0.3, "radius": 0.2})
    optimizer.add_param_group({"params": [second], "radius": 0.2})  # for this group alone
    groups = [{"params": [Parameter(torch.ones(3))], "rho": 0.0}, {"params": [Parameter(torch.ones(3))]}]
    TSAM(groups, lr=0.1, sampler="noise", radius=0.2)
    for sampler in (Ascent(), "ascent"):
        TSAM(parameters(), lr=0.1, sampler=sampler, rho=0.3, radius=0.2)


def test_options_that_mean_nothing_beside_others_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^HMC: delta_scale: got 5.0, expected 1.0, as delta is not 'auto'"):
        HMC(delta=1.0, delta_scale=5.0)
    HMC(delta="auto", delta_scale=5.0)
    with pytest.raises(ValueError, match=r"^TSAM: num_samples: got 1, expected 2 or more, .*Ascent\(antithetic=True\)"):
        TSAM(parameters(), lr=0.1, sampler=Ascent(antithetic=True), num_samples=1)
    with pytest.raises(ValueError, match=r"^TSAM: rho: got 0.05 beside radius=0.2"):  # the default's value, but meant
        TSAM(parameters(), lr=0.1, sampler="noise", rho=0.05, radius=0.2)
    TSAM(parameters(), lr=0.1, sampler="noise", radius=0.2)
    for name in ("tsam_rho", "tsam_version"):
        match = rf"^TSAM: param_groups\[0\]\.{name}: got 0.3, expected no such key \(ours are rho, radius, adaptive\)"
        with pytest.raises(ValueError, match=match):
            TSAM([{"params": parameters(), name: 0.3}], lr=0.1)


class Swallowing(torch.optim.SGD):
    """A base that hands any option on, and one that is its own."""

    def __init__(self, params: Any, **options: Any) -> None:
        delta = options.pop("delta", 0.1)
        options.pop("prior", None)
        super().__init__(params, **options)
        self.defaults["delta"] = delta


def test_a_base_that_takes_any_option_says_itself_what_is_its_own() -> None:
    optimizer = TSAM(parameters(), Swallowing, lr=0.1, delta=0.7)
    assert optimizer.defaults["delta"] == 0.7
    for name in ("noise", "prior"):  # refused by SGD; swallowed without a word
        with pytest.raises(TypeError, match=rf"^TSAM: {name} belongs to the sampler"):
            TSAM(parameters(), Swallowing, lr=0.1, **{name: 1.0})
    with pytest.raises(TypeError, match="momentun"):
        TSAM(parameters(), Swallowing, lr=0.1, delta=0.7, momentun=0.9)

    class Unreadable(torch.optim.SGD):
        __signature__ = 5

    TSAM(parameters(), Unreadable, lr=0.1)
    with pytest.raises(TypeError, match=r"^TSAM: noise belongs to the sampler"):
        TSAM(parameters(), Unreadable, lr=0.1, noise="sphere")


def test_what_is_refused_on_a_gpu_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of the user's that does not count on the device is refused before it gets keys of ours."""

    def refuses(base: Any, *, own: bool) -> None:
        raise ValueError("capturable")

    base = torch.optim.Adam(parameters())
    with monkeypatch.context() as patch:
        patch.setattr("tsam_ext.optim.make_capturable", refuses)
        with pytest.raises(ValueError, match="capturable"):
            TSAM(base, capturable=True, same_masks=False)
    assert "rho" not in base.defaults
    TSAM(base)


def test_hmc_takes_no_radius_in_a_group_either() -> None:
    first, second = parameters()
    with pytest.raises(ValueError, match=r"^TSAM: param_groups\[1\]\.radius: got 0.2, .*as the sampler is HMC"):
        TSAM([{"params": [first]}, {"params": [second], "radius": 0.2}], lr=0.1, sampler="hmc")
    TSAM([{"params": [first], "radius": None}, {"params": [second]}], lr=0.1, sampler="hmc")


class Unread(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a tensor's value would come to the host."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert op is not torch.ops.aten._local_scalar_dense.default
        assert op.name() not in ("aten::equal", "aten::is_nonzero")
        return op(*args, **(kwargs or {}))


def test_settings_are_shown_and_read_only(problem) -> None:
    task = problem()
    tilt = torch.tensor(5.0)
    optimizer = TSAM(
        task.parameters, lr=0.1, momentum=0.9, sampler=HMC(delta=torch.tensor(2.0)), tilt=tilt, num_samples=3
    )
    task.train(optimizer, 1)
    with Unread():
        text, seen = repr(optimizer), repr(optimizer.diagnostics)
    for part in ("TSAM (", "HMC(delta=<torch.float32 tensor on cpu>", "tilt=<torch.float32", ": SGD", "momentum=0.9"):
        assert part in text
    assert "acceptance_rate" in seen
    assert optimizer.settings.tilt is tilt
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.settings.num_samples = 5  # type: ignore[misc]
    with pytest.raises(AttributeError):
        optimizer.settings = None  # type: ignore[misc, assignment]

    def schedule(step: int) -> float:
        return float(step)

    assert "tilt=schedule" in repr(TSAM(parameters(), lr=0.1, tilt=schedule))
    adam = TSAM(parameters(), torch.optim.Adam, lr=torch.tensor(0.1))
    with Unread():
        assert "lr=<torch.float32" in repr(adam)


SAID = {
    "ascent": {"gradient_norms", "implied_delta"},
    "noise": set(),
    "hmc": {"acceptance_rate", "energy_errors", "num_divergent", "distance", "delta", "step_size", "rounding"},
}


@pytest.mark.parametrize("sampler", SAID)
def test_diagnostics_as_a_dict_are_those_of_the_sampler(problem, sampler: Any) -> None:
    task = problem()
    optimizer = TSAM(task.parameters, lr=0.1, sampler=sampler, every=2, num_samples=3)
    assert optimizer.diagnostics.to_dict() == {}
    assert repr(optimizer.diagnostics) == "Diagnostics(before the first step)"
    task.train(optimizer, 1)
    with Unread():
        values = optimizer.diagnostics.to_dict()
    every = {"losses", "weights", "ess", "tilted_loss", "num_nonfinite"}
    assert values.keys() == every | SAID[sampler] | ({"carried_ratio"} if sampler == "ascent" else set())
    for name, value in values.items():
        assert isinstance(value, Tensor)
        assert not value.isnan().any(), name
        assert torch.equal(value, getattr(optimizer.diagnostics, name))
    task.train(optimizer, 1)  # the plain gradient
    assert optimizer.diagnostics.to_dict().keys() == every


def test_help_fits_two_screens() -> None:
    """Of fifty lines each; a sampler's page likewise."""
    for kind in (TSAM, Ascent, Noise, HMC):
        assert len((kind.__doc__ or "").splitlines()) + len(dataclass_fields(kind)) <= 100
        assert tsam_ext.__all__.count(kind.__name__) == 1


def test_the_types_name_what_there_is() -> None:
    """The Literal types, which an editor offers, are the kinds of noise and the priors that the kernels have."""
    assert get_args(NoiseKind) == NOISES
    assert get_args(get_type_hints(HMC)["prior"]) == PRIORS
    assert get_args(SamplerName) == tuple(BY_NAME)


def dataclass_fields(kind: Any) -> tuple[Any, ...]:
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
