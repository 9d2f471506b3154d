"""leapfrog_ and kick_: the bits of leapfrog and kick in the memory of their arguments, and what they refuse.

Bits are compared on sizes on both sides of where a list no longer fits into the caches, whose lanes are others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tsam_ext import _C
from tsam_ext.functional import kick, kick_, leapfrog, leapfrog_

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PAST_CACHES = 5_000_003  # elements; of 16 bits they still fit


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 1, 67, 70_001, PAST_CACHES])
@pytest.mark.parametrize("each", [False, True], ids=["numbers", "each"])
def test_the_bits_are_those_out_of_place(dtype: torch.dtype, size: int, each: bool) -> None:
    x, p, g = (randn(size, seed=i, dtype=dtype) for i in range(3))
    h, m = (randn(size, seed=i, dtype=dtype).abs() + 0.1 for i in (3, 4)) if each else (0.3, 1.7)
    want, kicked = leapfrog(x, p, g, h, m), kick(p, g, h)
    momentum = p.clone()
    kick_(momentum, g, h)
    assert same_bits(momentum, kicked)
    leapfrog_(x, p, g, h, m)
    assert same_bits(x, want[0])
    assert same_bits(p, want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a", [0.3, -0.0, 0.0])
def test_lanes_of_every_width_give_the_same_bits(dtype: torch.dtype, a: float) -> None:
    """A list that fits into the caches, one that does not, and the elements that fill no block: one formula."""
    p, g = randn(PAST_CACHES, dtype=dtype), randn(PAST_CACHES, seed=1, dtype=dtype)
    p[::5] = -0.0
    whole = kick(p, g, a)
    part = slice(1_000_000, 1_100_000)
    assert same_bits(whole[part], kick(p[part], g[part], a))
    single = torch.cat([kick(p[i : i + 1], g[i : i + 1], a) for i in range(70)])
    assert same_bits(whole[:70], single)
    moved, half = leapfrog(p, g, p, a)
    inside = leapfrog(p[part], g[part], p[part], a)
    assert same_bits(moved[part], inside[0])
    assert same_bits(half[part], inside[1])


def test_layouts_are_kept_and_arguments_may_have_others() -> None:
    x, p = (randn(2, 3, 4, 5, seed=i).to(memory_format=torch.channels_last) for i in range(2))
    g, h = randn(2, 3, 4, 5, seed=2), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    want = leapfrog(x, p, g, h)
    pointers = x.data_ptr(), p.data_ptr()
    assert leapfrog_(x, p, g, h) is None
    assert torch.equal(x, want[0])
    assert torch.equal(p, want[1])
    assert (x.data_ptr(), p.data_ptr()) == pointers


def test_versions_move_so_that_autograd_notices() -> None:
    weight, p, x = torch.ones(3, requires_grad=True), torch.ones(3), torch.ones(3)
    for tensor, write in ((p, lambda: kick_(p, x, 0.5)), (x, lambda: leapfrog_(x, torch.ones(3), p, 0.5))):
        product = (weight * tensor).sum()
        before = tensor._version
        write()
        assert tensor._version == before + 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_they_compile_fullgraph() -> None:
    def run(x: Tensor, p: Tensor, g: Tensor) -> None:
        leapfrog_(x, p, g, 0.3, 1.5)
        kick_(p, g, 0.15)

    torch._dynamo.reset()
    eager, compiled = ([randn(9, seed=i) for i in range(3)] for _ in range(2))
    run(*eager)
    torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(map(torch.equal, eager, compiled))


X, P, G = torch.zeros(4), torch.ones(4), torch.ones(4)
LEAF = torch.ones(4, requires_grad=True)


def in_vmap(call: Callable[[Tensor], Any]) -> None:
    torch.vmap(call)(torch.ones(2, 4))


def with_tangent(call: Callable[[Tensor], Any]) -> None:
    with torch.autograd.forward_ad.dual_level():
        call(torch.autograd.forward_ad.make_dual(torch.ones(4), torch.ones(4)))


REFUSALS: list[tuple[Callable[[], Any], str]] = [
    (lambda: kick_(LEAF, G, 0.1), r"tsam\.kick_: momentum: got a leaf tensor that requires grad, expected torch.no_gr"),
    (lambda: kick_(P, LEAF, 0.1), r"tsam\.kick_: grad_log_density: got a leaf tensor that requires grad"),
    (lambda: kick_(P, LEAF * 2, 0.1), r"tsam\.kick_: grad_log_density: got a tensor that requires grad"),
    (lambda: kick_(P, G, LEAF), r"tsam\.kick_: a: got a .*tensor that requires grad"),
    (lambda: leapfrog_(LEAF, P, G, 0.1), r"tsam\.leapfrog_: position: got a leaf tensor that requires grad"),
    (lambda: leapfrog_(X, LEAF, G, 0.1), r"tsam\.leapfrog_: momentum: got a leaf tensor that requires grad"),
    (lambda: leapfrog_(X, P, G, 0.1, LEAF.exp()), r"tsam\.leapfrog_: inverse_mass: got a tensor that requires grad"),
    (lambda: in_vmap(lambda x: kick_(x, G, 0.1)), r"kick_: momentum: got a tensor of a transform"),
    (lambda: with_tangent(lambda x: kick_(P, x, 0.1)), r"kick_: grad_log_density: got a tensor of a transform"),
    (lambda: kick_(torch._neg_view(P), G, 0.1), r"kick_: momentum: got a lazily negated tensor"),
    (lambda: kick_(torch.inference_mode()(torch.ones)(4), G, 0.1), r"kick_: momentum: got an inference tensor"),
    (lambda: kick_(P, P, 0.1), r"tsam\.kick_: grad_log_density: got memory shared with momentum, expected tensors tha"),
    (lambda: kick_(P, G, P), r"tsam\.kick_: a: got memory shared with momentum"),
    (lambda: _C.kick_(P, G, P[2]), r"tsam\.kick_: a: got memory shared with momentum"),
    (lambda: leapfrog_(X, X, G, 0.1), r"tsam\.leapfrog_: momentum: got memory shared with position"),
    (lambda: leapfrog_(X, P, P, 0.1), r"tsam\.leapfrog_: grad_log_density: got memory shared with momentum"),
    (lambda: leapfrog_(X, P, G, X), r"tsam\.leapfrog_: step_size: got memory shared with position"),
    (lambda: leapfrog_(X, P, G, 0.1, P), r"tsam\.leapfrog_: inverse_mass: got memory shared with momentum"),
    (lambda: kick_(torch.ones(4, 4)[:, ::2], torch.ones(4, 2), 0.1), r"kick_: momentum: got .*expected a dense tensor"),
    (lambda: leapfrog_(torch.ones(2, 3), torch.ones(3, 2).T, torch.ones(2, 3), 0.1), r"leapfrog_: momentum: got shape"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals_write_nothing(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    assert torch.equal(X, torch.zeros(4))
    assert torch.equal(P, torch.ones(4))


def test_without_recording_a_leaf_may_be_moved() -> None:
    leaf, gradient = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    with torch.no_grad():
        kick_(leaf, gradient, 0.5)
    assert torch.equal(leaf.detach(), torch.full((4,), 1.5))
    with torch.inference_mode():
        inside = torch.ones(4)
        kick_(inside, inside.clone(), 0.5)
    assert torch.equal(inside, torch.full((4,), 1.5))
