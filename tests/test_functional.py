"""tilted_loss, tilted_weights, tilted_reduce: values, derivatives of both orders and modes, transforms, refusals.

Laws: shift invariance, the limits t -> 0 and t -> +-inf, the small-t expansion, gradient = weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import tsam_ext
from tsam_ext import _C
from tsam_ext import reference as oracle
from tsam_ext.functional import tilted_loss, tilted_reduce, tilted_weights

INF = float("inf")
TILTS = [-INF, -20.0, -1.0, 0.0, 1e-12, 1e-8, 0.3, 1.0, 20.0, 1e4, INF]


def losses_of(s: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(s, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("s", [1, 2, 9])
def test_values_are_the_reference_s(tilt: float, scale: float, s: int) -> None:
    losses, values = losses_of(s, scale), torch.randn(s, 3, 5, dtype=torch.float64)
    want = oracle.tilted_loss(losses, tilt)
    assert torch.allclose(tilted_loss(losses, tilt), want, rtol=1e-12, atol=1e-14 * scale)
    weights = oracle.tilted_weights(losses, tilt)
    assert torch.allclose(tilted_weights(losses, tilt), weights, rtol=1e-7, atol=1e-15)
    reduced = oracle.tilted_reduce(losses, values, tilt)
    assert torch.allclose(tilted_reduce(losses, values, tilt), reduced, rtol=1e-7, atol=1e-14)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    st.floats(-30, 30),
    st.floats(-100, 100),
)
def test_laws(values: list[float], tilt: float, shift: float) -> None:
    losses = torch.tensor(values, dtype=torch.float64)
    value = tilted_loss(losses, tilt)
    assert losses.min() - 1e-9 <= value <= losses.max() + 1e-9
    assert torch.allclose(tilted_loss(losses + shift, tilt), value + shift, rtol=1e-10, atol=1e-8)
    assert torch.allclose(tilted_weights(losses + shift, tilt), tilted_weights(losses, tilt), atol=1e-10)
    assert tilted_weights(losses, tilt).sum().sub(1).abs() < 1e-12
    assert tilted_loss(losses, tilt + 1) >= value - 1e-9  # monotone in the tilt
    assert torch.allclose(tilted_loss(-losses, -tilt), -value, rtol=1e-10, atol=1e-9)


def test_small_tilt_keeps_all_digits() -> None:
    losses = losses_of(5)
    variance = losses.var(correction=0)
    for tilt in (1e-6, 1e-8, -1e-7):
        slope = (tilted_loss(losses, tilt) - losses.mean()) / (tilt / 2)
        assert abs(slope / variance - 1) < 1e-5 + 1e-14 / abs(tilt)
    assert tilted_loss(losses.float(), 1e-8) != 0.0  # log-sum-exp minus log s gives 0 in float32


@pytest.mark.parametrize("tilt", [-3.0, 0.0, 1e-6, 0.7, 5.0])
def test_derivatives(tilt: float) -> None:
    losses = losses_of(4).requires_grad_()
    values = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    for op in (tilted_loss, tilted_weights, _C.tilted_loss, _C.tilted_weights):
        forward = op in (tilted_loss, tilted_weights)
        assert gradcheck(lambda x, op=op: op(x, tilt), (losses,), check_forward_ad=forward)
        assert gradgradcheck(lambda x, op=op: op(x, tilt), (losses,))
    for reduce in (tilted_reduce, _C.tilted_reduce):

        def run(x: Tensor, v: Tensor, reduce=reduce) -> Tensor:
            return reduce(x, v, tilt)

        assert gradcheck(run, (losses, values), check_forward_ad=reduce is tilted_reduce)
        assert gradgradcheck(run, (losses, values))
    (grad,) = torch.autograd.grad(tilted_loss(losses, tilt), losses)
    assert torch.equal(grad, tilted_weights(losses.detach(), tilt))


@pytest.mark.parametrize("tilt", [INF, -INF])
def test_the_gradient_at_an_infinite_tilt_is_shared_by_ties(tilt: float) -> None:
    losses = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    tilted_loss(losses, tilt).backward()
    want = [0.0, 0.5, 0.5, 0.0] if tilt > 0 else [0.5, 0.0, 0.0, 0.5]
    assert losses.grad is not None
    assert losses.grad.tolist() == want


def test_transforms() -> None:
    losses, tilt = losses_of(4), 0.9
    batch, values = (
        torch.stack([losses, 2 * losses, -losses]),
        torch.randn(4, 6, dtype=torch.float64),
    )
    from torch.func import grad, hessian, jacfwd, jacrev, vmap

    for op, ref in ((tilted_loss, oracle.tilted_loss), (tilted_weights, oracle.tilted_weights)):
        want = torch.stack([ref(row, tilt) for row in batch])
        assert torch.allclose(vmap(lambda x, op=op: op(x, tilt))(batch), want)
        want = jacrev(lambda x, ref=ref: ref(x, tilt))(losses)
        for transform in (jacrev, jacfwd):
            assert torch.allclose(transform(lambda x, op=op: op(x, tilt))(losses), want)
    want = hessian(lambda x: oracle.tilted_loss(x, tilt))(losses)
    assert torch.allclose(hessian(lambda x: tilted_loss(x, tilt))(losses), want)
    rows = vmap(grad(lambda x: tilted_loss(x, tilt)))(batch)
    assert torch.allclose(rows, torch.stack([oracle.tilted_weights(row, tilt) for row in batch]))
    reduced = vmap(lambda x: tilted_reduce(x, values, tilt))(batch)
    want = torch.stack([oracle.tilted_reduce(row, values, tilt) for row in batch])
    assert torch.allclose(reduced, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    losses, values = losses_of(5).to(dtype), torch.randn(5, 70_001).to(dtype)
    want = oracle.tilted_reduce(losses.double(), values.double(), 2.0)
    # One rounding to dtype: half a unit in the last place.
    unit = torch.finfo(dtype).eps
    assert ((tilted_reduce(losses, values, 2.0).double() - want).abs() <= 0.5001 * unit * want.abs() + 1e-7).all()
    assert tilted_loss(losses, 2.0) == oracle.tilted_loss(losses.double(), 2.0).to(dtype)


@pytest.mark.parametrize(("rows", "columns"), [(70_001, 1), (20_000, 3), (9_000, 40), (3_000, 131), (515, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_that_many_threads_share(rows: int, columns: int, dtype: torch.dtype) -> None:
    """None is left out or counted twice, each time in the same order; also where rows do not begin at words."""
    torch.manual_seed(0)
    losses = losses_of(rows)
    columns_first = torch.randn(columns, rows).to(dtype)
    beside = torch.randn(rows, columns + 1).to(dtype)
    for values in (torch.randn(rows, columns).to(dtype), beside[:, 1:], columns_first.t()):
        want, size = (oracle.tilted_reduce(losses, v, 0.7) for v in (values.double(), values.double().abs()))
        got = tilted_reduce(losses, values, 0.7)
        assert ((got.double() - want).abs() <= 0.501 * torch.finfo(dtype).eps * want.abs() + 1e-12 * size).all()
        assert torch.equal(got, tilted_reduce(losses, values, 0.7))


@pytest.mark.parametrize("rows", [6, 6_000])
@pytest.mark.parametrize("size", [1e-45, 1e-41, 1.0, 1e20, 3e38])
def test_numbers_of_any_size_and_none(rows: int, size: float) -> None:
    """Side by side, under weights down to 0: means are those of float64, rounded once to float32."""
    torch.manual_seed(0)
    losses, tilt = torch.linspace(0.0, 10.0, rows, dtype=torch.float64), 100.0  # weights from 1e-434, which is 0
    values = torch.randn(rows, 12).clamp(-1, 1) * size
    values[:, 1], values[:, 2] = 0.0, 1e-3
    values[rows // 2, 4], values[rows // 2, 5], values[0, 6], values[0, 7] = INF, math.nan, INF, math.nan
    values[rows // 2, 8], values[rows - 1, 8] = INF, -INF
    want = (oracle.tilted_weights(losses, tilt)[:, None] * values.double()).sum(0)
    got = tilted_reduce(losses, values, tilt)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    assert finite.sum() == 7 and got[4] == INF and got[6].isnan()
    error = (got.double() - want)[finite].abs()
    assert (error <= 0.501 * 2**-23 * want[finite].abs() + 0.501 * 2**-149).all()


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(3, 4, 5, 6, 7),
    "channels_last": lambda: torch.randn(3, 4, 6, 7, 5).movedim(-1, 2),
    "sample axis innermost": lambda: torch.randn(4, 5, 6, 7, 3).movedim(-1, 0),
    "expanded": lambda: torch.randn(1, 4, 5, 6, 7).expand(3, 4, 5, 6, 7),
    "every second": lambda: torch.randn(6, 4, 10, 6, 14)[::2, :, ::2, :, ::2],
    "transposed": lambda: torch.randn(3, 7, 5, 6, 4).mT.transpose(1, 2),
    "large, cut": lambda: torch.randn(3, 300, 301)[:, :, :300],
    "vectors": lambda: torch.randn(3, 1),
    "numbers": lambda: torch.randn(3),
    "empty": lambda: torch.randn(3, 0, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_reduce_reads_any_layout_where_it_lies(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    losses, values = losses_of(3), LAYOUTS[name]().to(dtype)
    want = oracle.tilted_reduce(losses, values.double(), 0.7)
    for op in (tilted_reduce, _C.tilted_reduce):
        got = op(losses, values, 0.7)
        assert got.stride() == torch.empty_like(values[0]).stride()
        assert ((got.double() - want).abs() <= 0.51 * torch.finfo(dtype).eps * want.abs() + 1e-15).all()


def test_reduce_makes_no_copy_of_its_values() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    losses = torch.ones(2)
    for values in (torch.randn(2, 4, 6, 5).movedim(-1, 1), torch.randn(4, 2).t()):
        names: list[str] = []
        with Calls():
            tilted_reduce(losses, values, 1.0)
        assert names == ["tsam.tilted_reduce.default"]


FORMS: dict[str, Callable[[str], Any]] = {
    "functional": lambda name: getattr(tsam_ext.functional, name),
    "_C": lambda name: getattr(_C, name),
    "torch.ops": lambda name: getattr(torch.ops.tsam, name),
}
NAMES = ["tilted_loss", "tilted_weights", "tilted_reduce"]


def arguments_of(name: str, s: int = 3, n: int = 4) -> tuple[Tensor, ...]:
    losses, values = losses_of(s).requires_grad_(), torch.randn(s, n, dtype=torch.float64, requires_grad=True)
    return (losses, values) if name == "tilted_reduce" else (losses,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tilt", [0.5, 0.0, float("inf")])
def test_opcheck(name: str, tilt: float) -> None:
    torch.library.opcheck(getattr(torch.ops.tsam, name).default, (*arguments_of(name), tilt))


def test_opcheck_of_values_in_another_layout() -> None:
    values = torch.randn(3, 4, 6, 7, 5).movedim(-1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.tsam.tilted_reduce.default, (losses_of(3).requires_grad_(), values, 0.5))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_compiles_fullgraph_with_dynamic_shapes(name: str, form: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    op, counter = FORMS[form](name), CompileCounterWithBackend("aot_eager")

    def run(*tensors: Tensor) -> Tensor:
        return op(*tensors, 2.0)

    torch._dynamo.reset()
    compiled, graphs = torch.compile(run, fullgraph=True, backend=counter, dynamic=True), []
    for s, n in ((4, 3), (6, 5), (9, 2)):
        arguments = arguments_of(name, s, n)
        got, want = compiled(*arguments), run(*arguments)
        assert torch.allclose(got, want)
        weights = torch.randn_like(want)
        pairs = zip(*(torch.autograd.grad((weights * out).sum(), arguments) for out in (got, want)), strict=True)
        assert all(torch.allclose(a, b) for a, b in pairs)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs == graphs[:1] * 3  # one graph serves all sizes


def test_transforms_of_reduce_are_the_reference_s() -> None:
    from torch.func import hessian, jacfwd, jacrev, jvp, vmap

    losses, values, tilt = losses_of(3), torch.randn(3, 2, dtype=torch.float64), 0.8

    def ours(x: Tensor, v: Tensor) -> Tensor:
        return tilted_reduce(x, v, tilt)

    def theirs(x: Tensor, v: Tensor) -> Tensor:
        return oracle.tilted_reduce(x, v, tilt)

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.allclose(a, b, rtol=1e-11, atol=1e-12)
        return all(same(x, y) for x, y in zip(a, b, strict=True))

    for transform in (jacrev, jacfwd, hessian):
        assert same(transform(ours, argnums=(0, 1))(losses, values), transform(theirs, argnums=(0, 1))(losses, values))
    tangents = torch.randn(3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    assert same(jvp(ours, (losses, values), tangents), jvp(theirs, (losses, values), tangents))
    rows, tables = torch.stack([losses, -losses], 1), torch.stack([values, 2 * values, values**2])
    assert same(vmap(ours, (1, None))(rows, values), torch.stack([theirs(x, values) for x in rows.unbind(1)]))
    assert same(vmap(ours, (None, 0))(losses, tables), torch.stack([theirs(losses, v) for v in tables]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tilted_loss(torch.ones(2), math.nan), ValueError, "tilted_loss: tilt: got nan"),
        (lambda: tilted_loss(torch.ones(2), "1"), TypeError, "tilted_loss: tilt: got '1'"),
        (lambda: tilted_loss(torch.ones(2), True), TypeError, "tilted_loss: tilt: got True"),
        (lambda: tilted_loss([1.0], 1.0), TypeError, "losses: got list, expected a tensor"),
        (lambda: tilted_loss(torch.ones(2, 2), 1.0), ValueError, r"losses: got shape \(2, 2\)"),
        (lambda: tilted_weights(torch.ones(0), 1.0), ValueError, r"losses: got shape \(0,\)"),
        (
            lambda: tilted_weights(torch.ones(2).long(), 1.0),
            ValueError,
            "int64, expected a dense tensor of float32",
        ),
        (
            lambda: tilted_reduce(torch.ones(2), torch.ones(3, 2), 1.0),
            ValueError,
            "expected 2 entries in front",
        ),
        (
            lambda: tilted_reduce(torch.ones(2), torch.ones(2, device="meta"), 1.0),
            ValueError,
            "values: got .*meta",
        ),
        (
            lambda: tilted_reduce(torch.ones(2), torch.ones(2).to_sparse(), 1.0),
            ValueError,
            "sparse",
        ),
    ],
)
def test_refusals(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_one_function_under_three_names() -> None:
    losses = losses_of(3)
    assert tsam_ext.tilted_loss is tilted_loss
    same = [
        tilted_loss(losses, 1.5),
        _C.tilted_loss(losses, 1.5),
        torch.ops.tsam.tilted_loss(losses, 1.5),
    ]
    assert same[0] == same[1] == same[2]
    assert _C.tilted_loss(losses=losses, tilt=1.5) == same[0]
