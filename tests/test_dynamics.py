"""leapfrog, kick and perturb: values, laws of the integrator, derivatives of both modes, transforms, refusals.

Laws: a step is reversible and preserves volume, its energy error falls as h²; perturb is TSAM's noise, linear in x and
radius, the same bits for a slice as for the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

import tsam_ext
from tsam_ext import _C
from tsam_ext import reference as oracle
from tsam_ext.engine.checks import NOISES
from tsam_ext.functional import kick, leapfrog, perturb

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(), (0,), (1,), (3, 5), (64,), (65,), (2, 3, 4, 5), (66_000,)]),
    dtype=st.sampled_from(DTYPES),
    each=st.booleans(),
)
def test_values_are_the_formula_rounded_once(shape: tuple[int, ...], dtype: torch.dtype, each: bool) -> None:
    x, p, g = (randn(*shape, seed=i, dtype=dtype) for i in range(3))
    h = randn(*shape, seed=3, dtype=dtype).abs() if each else 0.3
    m = randn(*shape, seed=4, dtype=dtype).abs() + 0.5 if each else 1.7
    wide = [t.double() if isinstance(t, Tensor) else t for t in (x, p, g, h, m)]
    want = oracle.leapfrog(*wide)
    # float32 arithmetic: each of two multiply-adds and three products within one rounding of values up to about 20.
    slack = {torch.float64: 1e-14, torch.float32: 6e-6}.get(dtype, 6e-6)
    unit = torch.finfo(dtype).eps / 2
    for got, exact in zip(leapfrog(x, p, g, h, m), want, strict=True):
        assert got.dtype == dtype
        assert ((got.double() - exact).abs() <= unit * exact.abs() + slack).all()
    exact = oracle.kick(wide[1], wide[2], wide[3])
    assert ((kick(p, g, h).double() - exact).abs() <= unit * exact.abs() + slack).all()


def test_layouts_are_kept_and_strided_arguments_work() -> None:
    x = randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    p, g = randn(2, 3, 4, 5, seed=1), randn(2, 3, 4, 5, seed=2).to(memory_format=torch.channels_last)
    for arguments in ((x, g, g), (x, p, g), (x[:, ::2], p[:, ::2], g[:, ::2]), (x.mT, p.mT, g.mT)):
        for got, want in zip(leapfrog(*arguments, 0.5, 2.0), oracle.leapfrog(*arguments, 0.5, 2.0), strict=True):
            assert torch.allclose(got, want)
    assert leapfrog(x, g, g, 0.5)[0].stride() == x.stride()
    per_chain = torch.tensor([[0.1], [0.2]], dtype=torch.float64)
    chains = randn(2, 7), randn(2, 7, seed=1), randn(2, 7, seed=2)
    for got, want in zip(leapfrog(*chains, per_chain), oracle.leapfrog(*chains, per_chain), strict=True):
        assert torch.allclose(got, want)


def step(x: Tensor, p: Tensor, h: float, inverse_mass: Any = 1.0) -> tuple[Tensor, Tensor]:
    """One leapfrog step for the density exp(-Σ (x⁴/4 + x²/2))."""
    x, p = leapfrog(x, p, -(x**3 + x), h, inverse_mass)
    return x, kick(p, -(x**3 + x), h / 2)


def energy(x: Tensor, p: Tensor, inverse_mass: float) -> Tensor:
    return (x**4 / 4 + x**2 / 2 + inverse_mass * p**2 / 2).sum()


def test_a_trajectory_is_reversible() -> None:
    x, p = start = randn(50), randn(50, seed=1)
    for _ in range(20):
        x, p = step(x, p, 0.1, 2.0)
    p = -p
    for _ in range(20):
        x, p = step(x, p, 0.1, 2.0)
    assert torch.allclose(x, start[0], rtol=0, atol=1e-11)
    assert torch.allclose(-p, start[1], rtol=0, atol=1e-11)


def test_a_step_preserves_volume() -> None:
    def joint(state: Tensor) -> Tensor:
        return torch.cat(step(state[:3], state[3:], 0.3, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)))

    jacobian = jacrev(joint)(randn(6))
    assert abs(torch.linalg.det(jacobian) - 1) < 1e-13
    assert (jacobian - torch.eye(6)).abs().max() > 0.1  # it does move


def test_the_energy_error_is_of_second_order() -> None:
    def error(h: float) -> float:
        x, p = randn(200), randn(200, seed=1)
        before = energy(x, p, 2.0)
        for _ in range(round(0.8 / h)):
            x, p = step(x, p, h, 2.0)
        return float(energy(x, p, 2.0) - before)

    assert 3.8 < error(0.02) / error(0.01) < 4.2


def test_merged_kicks_are_two_half_kicks() -> None:
    p, g = randn(9), randn(9, seed=1)
    assert torch.allclose(kick(kick(p, g, 0.1), g, 0.1), kick(p, g, 0.2), atol=1e-15)


ARGUMENTS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "leapfrog": lambda: (randn(3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2), number(0.4), number(1.3)),
    "leapfrog each": lambda: tuple(randn(3, 2, seed=i) for i in range(5)),
    "kick": lambda: (randn(4), randn(4, seed=1), number(0.7)),
    "kick each": lambda: tuple(randn(4, seed=i) for i in range(3)),
    "perturb": lambda: (randn(5), number(0.3)),
    "perturb rademacher": lambda: (randn(5), number(0.3)),
}


def functions(name: str) -> list[Callable[..., Any]]:
    """The functional, the pybind11 and the torch.ops form of an op, then the reference."""
    name, *kinds = name.split()
    if name == "perturb":
        kind = kinds[0] if kinds else "gaussian"
        index = NOISES.index(kind)
        return [
            lambda x, r: perturb(x, r, 3, 5, 2, kind),
            lambda x, r: _C.perturb(x, r, 3, 5, 2, index),
            lambda x, r: torch.ops.tsam.perturb(x, r, 3, 5, 2, index),
            lambda x, r: oracle.perturb(x, r, 3, 5, 2, kind),
        ]
    return [getattr(where, name) for where in (tsam_ext.functional, _C, torch.ops.tsam, oracle)]


def close(got: Any, want: Any, tolerance: float = 1e-12) -> bool:
    if isinstance(want, Tensor):
        return got.shape == want.shape and torch.allclose(got, want, rtol=tolerance, atol=tolerance)
    return len(got) == len(want) and all(close(a, b, tolerance) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_derivatives_of_both_orders(name: str) -> None:
    ours = functions(name)
    arguments = tuple(a.requires_grad_() for a in ARGUMENTS[name]())
    for form, op in enumerate(ours[:3]):
        assert gradcheck(op, arguments, check_forward_ad=form == 0, check_batched_grad=form == 0)
        assert gradgradcheck(op, arguments)
    for i, argument in enumerate(arguments):  # one argument alone, so that unused branches are not hidden
        alone = [a.detach() for a in arguments]
        alone[i] = argument
        assert gradcheck(ours[0], alone, check_forward_ad=True)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_transforms_are_those_of_the_reference(name: str) -> None:
    ours, reference = functions(name)[0], functions(name)[3]
    arguments = ARGUMENTS[name]()
    tolerance = 3e-7 if name == "perturb" else 1e-12  # normals are float32
    every = tuple(range(len(arguments)))
    assert close(ours(*arguments), reference(*arguments), tolerance)
    for transform in (jacrev, jacfwd):
        got = transform(ours, argnums=every)(*arguments)
        assert close(got, transform(reference, argnums=every)(*arguments), tolerance)
    tangents = tuple(randn(*a.shape, seed=9 + i) for i, a in enumerate(arguments))
    assert close(jvp(ours, arguments, tangents), jvp(reference, arguments, tangents), tolerance)

    def scalar(op: Callable[..., Any]) -> Callable[..., Tensor]:
        def run(*args: Tensor) -> Tensor:
            out = op(*args)
            return sum((t**3).sum() for t in ((out,) if isinstance(out, Tensor) else out))

        return run

    got = hessian(scalar(ours), argnums=every)(*arguments)
    assert close(got, hessian(scalar(reference), argnums=every)(*arguments), 10 * tolerance)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_vmap_is_a_loop(name: str) -> None:
    ours = functions(name)[0]
    arguments = ARGUMENTS[name]()
    for k in range(1, 2 ** len(arguments)):  # every choice of what is batched, at every place
        chosen = [bool(k >> i & 1) for i in range(len(arguments))]
        batched, dims = [], []
        for i, (argument, batch) in enumerate(zip(arguments, chosen, strict=True)):
            dim = min(i % 2, argument.dim())
            rows = [argument + j for j in range(3)]
            batched.append(torch.stack(rows, dim) if batch else argument)
            dims.append(dim if batch else None)
        got = vmap(ours, in_dims=tuple(dims))(*batched)
        rows = [ours(*(a + j if b else a for a, b in zip(arguments, chosen, strict=True))) for j in range(3)]
        want = torch.stack(rows) if isinstance(rows[0], Tensor) else tuple(map(torch.stack, zip(*rows, strict=True)))
        assert close(got, want, 1e-15)


def test_vmap_of_grad_and_grad_of_vmap() -> None:
    x, p, g, h = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2), randn(4, seed=3)

    def one(op: Any) -> Callable[..., Tensor]:
        return lambda x, p, g, h: (op(x, p, g, h, 1.5)[0] ** 2).sum()

    from torch.func import grad

    for ours, reference in ((leapfrog, oracle.leapfrog),):
        every = (0, 1, 2, 3)
        assert close(vmap(grad(one(ours), every))(x, p, g, h), vmap(grad(one(reference), every))(x, p, g, h))

        def total(op: Any) -> Callable[..., Tensor]:
            return lambda *args: vmap(one(op))(*args).sum()

        assert close(grad(total(ours), every)(x, p, g, h), grad(total(reference), every)(x, p, g, h))


@pytest.mark.parametrize("name", ["leapfrog", "kick", "perturb"])
def test_opcheck(name: str) -> None:
    arguments = tuple(a.requires_grad_() for a in ARGUMENTS[name]())
    rest = (3, 5, 2, 0) if name == "perturb" else ()
    torch.library.opcheck(getattr(torch.ops.tsam, name).default, (*arguments, *rest))


@pytest.mark.parametrize("name", ["leapfrog", "kick", "perturb"])
@pytest.mark.parametrize("form", [0, 1, 2], ids=["functional", "_C", "torch.ops"])
def test_compiles_fullgraph_with_dynamic_shapes(name: str, form: int) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    op, counter = functions(name)[form], CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for size in (5, 8, 300):
        arguments = tuple(
            (randn(size, seed=i) if a.dim() else a).requires_grad_() for i, a in enumerate(ARGUMENTS[name]())
        )
        got, want = compiled(*arguments), op(*arguments)
        assert close(got, want)
        outputs = [(out,) if isinstance(out, Tensor) else out for out in (got, want)]
        grads = [torch.autograd.grad(sum((o**2).sum() for o in out), arguments) for out in outputs]
        assert close(*grads)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 3  # one graph serves all sizes


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_is_the_noise_of_the_list_op(kind: str, dtype: torch.dtype) -> None:
    from tsam_ext.functional import new_state, perturb_

    x, step, sample = randn(70_001, dtype=dtype), 9, 4
    moved, saved = [x.clone()], [torch.empty_like(x)]
    perturb_(moved, saved, new_state(0), 0.2, seed=2**63 + 5, step=step, sample=sample, kind=kind, base=[3])
    got = perturb(x, 0.2, 2**63 + 5, step << 28 | sample, 3, kind)
    assert torch.equal(got, moved[0])
    assert not torch.equal(got, x)
    reference = oracle.perturb(x.double(), 0.2, 2**63 + 5, step << 28 | sample, 3, kind)
    assert (got.double() - reference).abs().max() <= torch.finfo(dtype).eps * 4 + 1e-8


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 500), base=st.integers(0, 2**40), draw=st.integers(0, 2**60 - 1))
def test_a_slice_draws_its_slice_of_the_noise(cut: int, base: int, draw: int) -> None:
    whole = torch.zeros(500)
    first = perturb(whole[:cut], cut**0.5, 1, draw, base)
    second = perturb(whole[cut:], (500 - cut) ** 0.5, 1, draw, base + cut)
    # Gaussian noise is z / sqrt(d): with radius sqrt(d) each part is z.
    assert torch.allclose(torch.cat([first, second]), perturb(whole, 500**0.5, 1, draw, base), atol=1e-6)


X = torch.zeros(2, 3)
REFUSALS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: leapfrog([1.0], X, X, 0.1), TypeError, r"tsam\.leapfrog: position: got list, expected a tensor"),
    (lambda: leapfrog(X, X.long(), X, 0.1), ValueError, r"leapfrog: momentum: got .*int64, expected a dense tensor"),
    (lambda: leapfrog(X, X, X.to_sparse(), 0.1), ValueError, r"leapfrog: grad_log_density: got a torch.sparse_coo"),
    (lambda: leapfrog(X, X[0], X, 0.1), ValueError, r"momentum: got shape \(3,\), expected \(2, 3\), the shape of pos"),
    (lambda: leapfrog(X, X.double(), X, 0.1), ValueError, r"momentum: got dtype torch.float64, expected torch.float32"),
    (lambda: leapfrog(X, X.to("meta"), X, 0.1), ValueError, r"momentum: got a tensor on meta, expected one on cpu"),
    (lambda: leapfrog(X, X, X, float("nan")), ValueError, r"step_size: got nan, expected a finite number"),
    (lambda: leapfrog(X, X, X, "a"), TypeError, r"step_size: got 'a', expected a finite number or a tensor"),
    (lambda: leapfrog(X, X, X, True), TypeError, r"step_size: got True"),
    (lambda: leapfrog(X, X, X, torch.ones(5)), ValueError, r"step_size: got shape \(5,\), expected one that broadc"),
    (lambda: leapfrog(X, X, X, 0.1, 0.0), ValueError, r"inverse_mass: got 0.0, expected a finite positive number"),
    (lambda: kick(X, X[:1], 0.1), ValueError, r"kick: grad_log_density: got shape \(1, 3\)"),
    (lambda: kick(X, X, float("inf")), ValueError, r"kick: a: got inf, expected a finite number"),
    (lambda: perturb(X, -1.0, 0, 0), ValueError, r"perturb: radius: got -1.0, expected a finite number not below 0"),
    (lambda: perturb(X, torch.ones(2), 0, 0), ValueError, r"radius: got shape \(2,\)"),
    (lambda: perturb(X, 1.0, -1, 0), ValueError, r"seed: got -1, expected an integer from 0"),
    (lambda: perturb(X, 1.0, 0, 2**60), ValueError, r"draw: got 1152921504606846976, expected an integer from 0"),
    (lambda: perturb(X, 1.0, 0, 0, -4), ValueError, r"base: got -4"),
    (lambda: perturb(X, 1.0, 0, 0, 0, "cube"), ValueError, r"kind: got 'cube', expected 'gaussian' or 'sphere'"),
    (lambda: perturb(X, 1.0, 0.5, 0), TypeError, r"seed: got 0.5"),
    (lambda: _C.leapfrog(X, X[0], X, X, X), ValueError, r"^tsam\.leapfrog: momentum: got shape \(3\)"),
    (lambda: _C.leapfrog(X, X, X, X[0], X), ValueError, r"step_size: got shape \(3\)"),
    (lambda: _C.kick(X, X.double(), X), ValueError, r"kick: grad_log_density: got dtype float64, expected float32"),
    (lambda: _C.kick(X[:, ::2], X[:, ::2], X[:, ::2]), ValueError, r"kick: momentum: got .*expected a dense tensor"),
    (lambda: _C.perturb(X, X, 0, 0, 0, 0), ValueError, r"perturb: radius: got shape \(2, 3\).*one element"),
    (lambda: _C.perturb(X, X[0, 0], 0, 0, 0, 4), ValueError, r"perturb: kind: got 4, expected an integer from 0 to 3"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS)
def test_refusals(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
