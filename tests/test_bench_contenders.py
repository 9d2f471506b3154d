"""The methods that are compared: each takes the step and the gradients that it says, from options of JSON.

Also the commands compare, sweep and cost, run whole with --quick.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import baselines
from bench.__main__ import main
from bench.training import compare, panels, peers
from bench.training.contenders import CONTENDERS
from bench.training.methods import METHODS, Method, Steered

pytest.importorskip("mlxtend")
pytest.importorskip("pytorch_optimizer")
X, Y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(32) % 3
ALL = {method.name: method for method in (*CONTENDERS, *METHODS)}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def steps(method: Method, settings: dict[str, object], count: int) -> tuple[nn.Module, float]:
    """The net after some steps, and the passes (in whole batches) per step."""
    model, passes = net(), 0.0
    optimizer = method.optimizer(model, settings, 1, count)

    def closure() -> Tensor:
        nonlocal passes
        part = getattr(optimizer, "part", None)
        x, y = part(X, Y) if method.kind == "tsam" and part else (X, Y)
        passes += len(x) / len(X)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(count):
        assert not method.step(optimizer, closure).requires_grad
    return model, passes / count


@pytest.mark.parametrize("name", ALL)
def test_a_step_costs_the_gradients_that_the_method_says(name: str) -> None:
    method = ALL[name]
    model, passes = steps(method, {"lr": method.rates[0], **method.own[0]}, 6)
    assert passes == pytest.approx(method.gradients)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not torch.equal(model[0].weight, net()[0].weight)  # type: ignore[index]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_librarys_sam_takes_the_step_of_ours() -> None:
    theirs, _ = steps(Method("SAM", "sam", 2), {"lr": 0.1, "rho": 0.2}, 4)
    ours, _ = steps(ALL["SAM"], {"lr": 0.1, "rho": 0.2}, 4)
    assert torch.allclose(flat(theirs), flat(ours), atol=1e-10)


def test_momentum_sam_looks_ahead_along_the_momentum() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    curvature = torch.tensor([1.0, 2.0])
    optimizer = peers.MomentumSAM([weight], rho=0.5, lr=0.1, momentum=0.9)

    def closure() -> Tensor:
        loss = (0.5 * curvature * weight**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.take(closure)
    first = torch.tensor([3.0, 8.0])
    assert torch.allclose(weight.detach(), torch.tensor([3.0, 4.0]) - 0.1 * first)
    before = weight.detach().clone()
    optimizer.take(closure)
    gradient = curvature * (before - 0.5 * first / first.norm())
    assert torch.allclose(weight.detach(), before - 0.1 * (0.9 * first + gradient))


def test_only_normalisation_layers_are_perturbed() -> None:
    model = net()
    optimizer = ALL["SAM, norm layers"].optimizer(model, {"lr": 0.1, "rho": 0.5}, 1, 1)
    seen: list[list[Tensor]] = []

    def closure() -> Tensor:
        seen.append([p.detach().clone() for p in model.parameters()])
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.zero_grad()
    optimizer.step(closure)  # type: ignore[arg-type]
    moved = [not torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert moved == [False, False, True, True, False, False]
    distance = torch.cat([(b - a).flatten() for a, b in zip(*seen, strict=True)]).norm()
    assert float(distance) == pytest.approx(0.5)


def test_tilts_that_change() -> None:
    model = net()
    schedule = Method("schedule", "tsam", 2, panels.parts(2, tilt_from=0.0, tilt_to=-2.0, lr=0.1))
    optimizer = schedule.optimizer(model, {}, 1, 10)
    tilt = optimizer.settings.tilt  # type: ignore[attr-defined]
    assert [tilt(0), tilt(5), tilt(10)] == [0.0, -1.0, -2.0]
    steered = Method("steered", "tsam", 2, panels.parts(4, ess_target=0.5, lr=0.1))
    guide = steered.optimizer(net(), {}, 1, 10).settings.tilt  # type: ignore[attr-defined]
    assert isinstance(guide, Steered)

    class Told:
        weights = torch.ones(4)
        ess = torch.tensor(4.0)

    guide.optimizer = type("Stub", (), {"diagnostics": Told})()
    assert guide(0) == -0.5
    assert guide(1) == pytest.approx(-0.5 * math.exp(0.1 * 0.5))  # all samples weigh the same: a stronger tilt
    Told.ess = torch.tensor(1.0)
    assert guide(2) > guide(1) * 1.05


def test_python_loops_of_hmc_sample_the_density() -> None:
    """A quadratic loss makes it Gaussian: 3,000 draws in 60 batches, six standard errors (1e-7)."""
    rho, delta, weight = 0.5, 3.0, nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
    scale = rho / 2**0.5

    def closure() -> Tensor:
        loss = (0.5 * weight**2 + weight).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    torch.manual_seed(3)
    chain = baselines.LoopHMC([weight], rho=rho, delta=delta, tilt=delta, num_samples=1)
    draws = []
    for _ in range(3000):
        chain.estimate_gradient(closure)
        draws.append(chain.position[0].clone())
    assert torch.equal(weight.detach(), torch.tensor([0.5, -0.5], dtype=torch.float64))
    x, precision = torch.stack(draws), 1 - delta * scale**2
    mean = delta * scale * (torch.tensor([0.5, -0.5], dtype=torch.float64) + 1) / precision
    for power, expected in ((1, mean), (2, mean**2 + 1 / precision)):
        batches = (x**power).view(60, 50, 2).mean(1)
        assert bool(((batches.mean(0) - expected).abs() < 6 * batches.std(0) / 60**0.5).all())


def test_python_loops_of_hmc_weigh_their_samples() -> None:
    """Three samples of a linear loss, whose gradients say where they were: softmax((tilt - delta) L) of them."""
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    losses, gradients = [], []

    def closure() -> Tensor:
        loss = weight.sum() + 0.5 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        losses.append(float(loss))
        gradients.append(weight.grad.clone())
        return loss

    torch.manual_seed(1)
    chain = baselines.LoopHMC([weight], rho=0.5, delta=0.0, tilt=9.0, num_samples=3)  # at delta 0 all are accepted
    chain.estimate_gradient(closure)
    weights = torch.softmax(9.0 * torch.tensor(losses[1:], dtype=torch.float64), 0)
    expected = (weights[:, None] * torch.stack(gradients[1:])).sum(0)
    assert weight.grad is not None
    assert torch.allclose(weight.grad, expected)
    assert len(losses) == 4


def test_every_line_of_a_panel_can_run() -> None:
    for question, lines in panels.PANELS.values():
        assert question
        assert len({line.label for line in lines}) == len(lines)
        for line in lines:
            model, passes = steps(line.method, {}, 30)
            assert all(bool(p.isfinite().all()) for p in model.parameters()), line.label
            assert passes == pytest.approx(line.method.gradients, rel=0.03)


def test_the_budgets() -> None:
    sam, carried, erm = ALL["SAM"], ALL["SAM every 3"], ALL["ERM"]
    seconds = {"SAM": 2.0, "SAM every 3": 1.6, "ERM": 0.8}
    found = {
        budget: [compare.epochs_of(m, budget, 40, seconds, sam) for m in (sam, carried, erm)]
        for budget in compare.BUDGETS
    }
    assert found == {"epochs": [40, 40, 40], "gradients": [40, 60, 80], "seconds": [40, 50, 100]}
    assert not compare.applies(ALL["SAM, norm layers"], "mnist")
    assert compare.applies(ALL["SAM, norm layers"], "digits-cnn")


def test_compare_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["compare", "--quick", "--tasks", "digits:0.3", "--epochs", "2", "--workers", "1", "--out", str(tmp_path)]
    assert main(short) == 0
    text = capsys.readouterr().out
    assert "### digits, noise 0.3: accuracy (more is better), 2 epochs" in text
    assert text.count("| SAM every 3") == 1
    assert "SAM every 3 minus LookSAM at equal seconds: " in text
    kept = (tmp_path / "compare-quick-runs.json").read_text()
    assert main([*short, "--resume"]) == 0
    assert json.loads((tmp_path / "compare-quick-runs.json").read_text()) == json.loads(kept)


def test_sweep_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--quick", "--panels", "every", "--workers", "1", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| k = 3, carry" in text
    assert "weight on wrong labels" in text


def test_cost_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ["TSAM", "TSAM hmc, loops"]
    assert main(["cost", "--quick", "--steps", "2", "--ways", *ways, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert all(f"| {way} " in text for way in ways)
    rows = json.loads((tmp_path / "cost-quick.json").read_text())["results"]
    assert all(row["seconds"] > 0 and row["peak"] > 0 for row in rows)
