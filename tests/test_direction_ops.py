"""take_direction_ and add_direction_ against float64 torch (reference/direction.py): values, laws, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tsam_ext import _C
from tsam_ext.engine.state import DIRECTION_SLOTS, DIRECTION_SUMS, RATIO
from tsam_ext.reference import add_direction, take_direction

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # of A and of v; G and g are wide
sizes_of = st.lists(st.sampled_from([0, 1, 3, 64, 65, 127, 1000, 65_537]), min_size=1, max_size=4)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tolerance(dtype: torch.dtype) -> float:
    """A few roundings of the result; nothing else is narrow."""
    return 1e-13 if dtype == torch.float64 else 2e-6


def tensors(sizes: list[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in sizes]


def scalars() -> Tensor:
    return torch.full((DIRECTION_SLOTS,), float("nan"), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes_of, dtype=st.sampled_from(DTYPES), staged=st.booleans())
def test_they_are_the_formulas(sizes: list[int], dtype: torch.dtype, staged: bool) -> None:
    plain, tilted, direction = tensors(sizes, wide(dtype), 0), tensors(sizes, dtype, 1), scalars()
    g, a = torch.cat(plain).double(), torch.cat(tilted).double()
    for stage in (0, 1) if staged else (-1,):
        _C.take_direction_(plain, tilted, direction, stage)
    v = take_direction(g, a) if sum(sizes) else g
    got = torch.cat(plain).double()
    # Two terms of the size of A / |G| that nearly cancel where A lies along G.
    scale = float(a.abs().max() / g.norm()) if sum(sizes) else 0.0
    assert torch.allclose(got, v, rtol=0.0, atol=tolerance(dtype) * scale)
    assert torch.allclose(direction[:DIRECTION_SUMS], torch.stack([a @ a, a @ g, g @ g]), rtol=1e-12, atol=1e-12)
    assert torch.allclose(direction[RATIO], v.norm(), rtol=1e-5, atol=1e-7)
    grads, carried = tensors(sizes, wide(dtype), 2), [t.to(dtype) for t in plain]
    expected = add_direction(torch.cat(grads), torch.cat(carried))
    for stage in (0, 1) if staged else (-1,):
        _C.add_direction_(grads, carried, direction, stage)
    atol = tolerance(dtype) * (1.0 + float(expected.abs().max()) if sum(sizes) else 0.0)
    assert torch.allclose(torch.cat(grads).double(), expected, rtol=0.0, atol=atol)


def taken(plain: Tensor, tilted: Tensor) -> Tensor:
    out = plain.clone()
    _C.take_direction_([out], [tilted.clone()], scalars())
    return out


def test_nothing_is_carried_where_there_is_nothing_to_measure() -> None:
    g, a = torch.randn(1000, dtype=torch.float64), torch.randn(1000, dtype=torch.float64)
    zero = torch.zeros(1000, dtype=torch.float64)
    for plain, tilted in (
        (g, 3.0 * g),  # along G
        (g, 3.0 * g + 3e-7 * a),  # but for less than 1e-6 of it
        (zero, a),
        (g, zero),
        (1e-40 * g, 1e-40 * a),  # 1 / |G| is no float32
        (g.clone().fill_(float("nan")), a),
        (g, a.clone().index_fill(0, torch.tensor(3), float("inf"))),
        (g.clone().index_fill(0, torch.tensor(999), float("-inf")), a),
    ):
        assert torch.equal(taken(plain, tilted), zero)
    assert taken(g, 3.0 * g + 1e-5 * a).norm() > 0.0
    assert taken(1e-30 * g, 1e-30 * a).norm() > 0.0


def test_a_gradient_that_is_not_finite_stays_as_it_is() -> None:
    """Its other elements too, so that who looks for the first bad one finds it."""
    for value in (float("nan"), float("inf")):
        g = torch.ones(70_000)
        g[5] = value
        before = g.clone()
        _C.add_direction_([g], [torch.ones(70_000)], scalars())
        assert torch.equal(g.nan_to_num(7.0), before.nan_to_num(7.0))


def test_long_sums_keep_the_direction_orthogonal() -> None:
    """Four million float32 elements, A nearly along G: along G is left what the two coefficients are rounded by."""
    g, noise = torch.randn(4_000_000), torch.randn(4_000_000)
    a = 2.0 * g + 1e-3 * noise
    v = taken(g, a).double()
    along = abs(float(v @ g.double())) / float(g.double().norm())
    assert along < 2**-23 * float(a.norm() / g.norm())
    assert float(v.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    x, y = [torch.ones(4), torch.ones(3)], [torch.full((4,), 2.0), torch.full((3,), 2.0)]
    half = [t.bfloat16() for t in y]
    for name, into, others in (("take_direction_", "plain", "tilted"), ("add_direction_", "grads", "carried")):
        call = getattr(_C, name)
        for arguments, message in (
            ((x, y[:1], scalars()), rf"{others}: got 1 entries, expected 2 \(as many as {into}\)"),
            ((x, [y[0], torch.ones(4)], scalars()), rf"{others}\[1\]: got shape \(4\).*expected shape \(3\).*{into}"),
            ((half, y, scalars()), rf"{into}\[0\]: got dtype bfloat16, expected float32"),
            (([x[0].double(), x[1]], y, scalars()), rf"{into}\[0\]: got dtype float64, expected float32"),
            ((x, y, scalars()[:5]), r"direction: got shape \(5\).*float64 tensor of 9 elements"),
            ((x, y, scalars().float()), r"direction: got .*float32, expected a contiguous float64"),
            ((x, [x[0], y[1]], scalars()), r"\w+\[0\]: got memory shared with \w+\[0\]"),
            ((x, y, scalars(), 2), r"stage: got 2, expected an integer from -1 to 1"),
        ):
            with pytest.raises(ValueError, match=rf"^tsam\.{name}: {message}"):
                call(*arguments)
        assert all(bool((t == 1.0).all()) for t in x)
    assert all(bool((t == 2.0).all()) for t in y)


def test_a_list_longer_than_a_launch() -> None:
    sizes = [1 + i % 6 for i in range(1500)]
    plain, tilted, direction = tensors(sizes, torch.float32, 0), tensors(sizes, torch.float32, 1), scalars()
    v = take_direction(torch.cat(plain), torch.cat(tilted))
    _C.take_direction_(plain, tilted, direction)
    assert torch.allclose(torch.cat(plain).double(), v, rtol=1e-5, atol=1e-7)


@pytest.mark.host_only("threads are the CPU's")
def test_threads_do_not_change_the_bits() -> None:
    results: list[Any] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            plain, tilted = tensors([300_000, 70_001], torch.float32, 0), tensors([300_000, 70_001], torch.float32, 1)
            direction = scalars()
            _C.take_direction_(plain, tilted, direction)
            _C.add_direction_(tilted, plain, direction)
            results.append([*plain, *tilted, direction.nan_to_num(0.0)])  # two slots are nobody's
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
