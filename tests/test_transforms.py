"""The differentiable ops in other hands: all six in one function under torch.func and torch.compile, and their edges.

Laws: a transform of the function is that of the reference; compiled is eager, in values, layout and noise; vmap is a
loop, over no rows and over numbers too; what cannot be had inside torch.compile is refused or left to eager.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import tsam_ext
from tsam_ext import _C, _ops
from tsam_ext import reference as oracle
from tsam_ext.functional import kick, leapfrog, perturb, tilted_loss, tilted_reduce, tilted_weights


def all_six(ops: Any, noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Two steps of a sampler, then the tilted mean of three losses, its weights and a tilted sum."""

    def run(x: Tensor, p: Tensor, h: Tensor, r: Tensor) -> Tensor:
        x, p = ops.leapfrog(x, p, -x, h, 1.3)
        p = ops.kick(p, -x, h / 2)
        moved = noise(x, r, 7, 3)
        losses = torch.stack([(moved**2).mean(), (p**2).mean(), (moved * p).mean()])
        total = ops.tilted_reduce(losses, torch.stack([moved, p, x]), 1.5)
        return ops.tilted_loss(losses, 1.5) + (ops.tilted_weights(losses, 1.5) ** 2).sum() + (total**3).sum()

    return run


ours, theirs = all_six(tsam_ext, tsam_ext.perturb), all_six(oracle, oracle.perturb)
EVERY = (0, 1, 2, 3)


def arguments(*batch: int, n: int = 6) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    x, p = (torch.randn(*batch, n, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, p, torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)


def close(got: Any, want: Any) -> bool:
    if isinstance(want, Tensor):
        return got.shape == want.shape and torch.allclose(got, want, rtol=1e-6, atol=1e-6)  # float32 noise
    return all(close(a, b) for a, b in zip(got, want, strict=True))


def test_all_six_under_transforms_are_the_reference() -> None:
    values = arguments()
    assert close(ours(*values), theirs(*values))
    for transform in (grad, hessian, jacfwd):
        assert close(transform(ours, EVERY)(*values), transform(theirs, EVERY)(*values))
    x, p, h, r = arguments(4)
    got = vmap(grad(ours, EVERY), (0, 0, None, None))(x, p, h, r)
    rows = [grad(theirs, EVERY)(*row, h, r) for row in zip(x, p, strict=True)]
    assert close(got, tuple(map(torch.stack, zip(*rows, strict=True))))
    got = vmap(hessian(lambda losses: tilted_loss(losses, 2.0)))(x)
    assert close(got, torch.stack([hessian(lambda losses: oracle.tilted_loss(losses, 2.0))(row) for row in x]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_all_six_compile_with_dynamic_shapes(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=backend)
    for n in (6, 9):
        values = [value.requires_grad_() for value in arguments(n=n)]
        got, want = compiled(*values), ours(*values)
        assert close(got, want)
        assert close(torch.autograd.grad(got, values), torch.autograd.grad(want, values))
    values = arguments()
    compiled = torch.compile(grad(ours, EVERY), fullgraph=True, dynamic=True, backend=backend)
    assert close(compiled(*values), grad(ours, EVERY)(*values))


def test_numbers_may_be_symbolic() -> None:
    """With dynamic=True Dynamo makes symbols of Python's numbers."""

    def run(x: Tensor, tilt: float, a: float, radius: float, draw: int, seed: int) -> Tensor:
        return tilted_loss(perturb(kick(x, x, a), radius, seed, draw), tilt) + tilted_weights(x, tilt)[0]

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    x = arguments()[0]
    for case in ((0.5, 0.1, 0.2, 3, 4), (0.7, -0.3, 0.4, 2**50, 2**62), (-2.0, 5.0, 0.0, 7, 8)):
        assert torch.equal(compiled(x, *case), run(x, *case))


DENSE = torch.channels_last
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=DENSE),
    "permuted": lambda: torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1),
    "transposed": lambda: torch.randn(4, 3).mT,
    "every second": lambda: torch.randn(4, 6)[:, ::2],
    "every second of a transposed": lambda: torch.randn(6, 4).mT[:, ::2],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
}


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_is_eager_in_values_and_layout(name: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    x = LAYOUTS[name]()
    other = torch.randn(x.shape)

    def run(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return *leapfrog(x, other, x, 0.3, 2.0), kick(x, other, other), perturb(x, 0.1, 3, 5, kind="ball")

    torch._dynamo.reset()
    want = run(x, other)
    got = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")(x, other)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert b.stride() == (x.stride() if _dense(name) else torch.empty(x.shape).stride())
    assert torch.equal(want[2], kick(x.contiguous(), other, other))


def _dense(name: str) -> bool:
    return not name.startswith(("every", "expanded"))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if _dense(name)])
def test_fakes_have_the_layout_of_the_kernels(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, one = LAYOUTS[name](), torch.ones(())
    calls: list[Callable[[Tensor, Tensor], Any]] = [
        lambda x, one: _C.kick(x, x, one),
        lambda x, one: _C.leapfrog(x, x, x, one, one)[0],
        lambda x, one: _C.leapfrog(x, x, x, one, one)[1],
        lambda x, one: _C.perturb(x, one, 1, 2, 0, 0),
        lambda x, one: _C.tilted_reduce(x.new_ones(x.shape[0]), x, 1.0),
    ]
    for call in calls:
        with FakeTensorMode() as mode:
            fake = call(mode.from_tensor(x), mode.from_tensor(one))
        assert fake.stride() == call(x, one).stride()


def test_fakes_name_what_is_on_another_device() -> None:
    x, meta = torch.ones(3), torch.ones(3, device="meta")
    for call, place in (
        (lambda: _C.kick(x, meta, x), "kick: grad_log_density"),
        (lambda: _C.perturb(x, meta[0], 1, 0, 0, 0), "perturb: radius"),
        (lambda: _C.tilted_reduce(x, meta, 1.0), "tilted_reduce: values"),
        (lambda: _C.restore_([x, meta], [x, x]), r"restore_: position\[1\]"),
        (lambda: _C.restore_([x], [meta]), r"restore_: saved\[0\]"),
    ):
        with pytest.raises(ValueError, match=rf"tsam\.{place}: got a tensor on meta, expected one on cpu, as "):
            call()


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "tilted_loss": lambda x: tilted_loss(x, 0.7),
    "tilted_weights": lambda x: tilted_weights(x, 0.7),
    "tilted_reduce": lambda x: tilted_reduce(x, x[:, None] * torch.ones(2, dtype=x.dtype), 0.7),
    "leapfrog": lambda x: leapfrog(x, x, x, 0.2)[0],
    "kick": lambda x: kick(x, x, 0.2),
    "perturb": lambda x: perturb(x, 0.2, 1, 2),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_is_a_loop_along_any_axis(name: str, dim: int) -> None:
    op, x = ROWS[name], torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for function in (op, jacfwd(op), jacrev(op)):
        got = vmap(function, in_dims=dim)(x)
        assert torch.allclose(got, torch.stack([function(row) for row in x.unbind(dim)]), rtol=1e-12)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_no_rows(name: str, dim: int) -> None:
    op = ROWS[name]
    none, some = torch.zeros((0, 3) if dim == 0 else (3, 0)), torch.zeros((2, 3) if dim == 0 else (3, 2))
    for function in (op, grad(lambda x: (op(x) ** 2).sum()), jacfwd(op)):
        got, want = (vmap(function, in_dims=dim)(x) for x in (none, some))
        assert got.shape == (0, *want.shape[1:])
    leaf = none.requires_grad_()
    vmap(op, in_dims=dim)(leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_vmap_over_numbers_does_not_round_them(dtype: torch.dtype) -> None:
    x, g = (torch.randn(64, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    numbers = torch.linspace(0.1234, 0.9876, 64, dtype=torch.float64)
    per_row = torch.randn(64, 3).to(dtype)
    cases: list[tuple[Any, Any, Any]] = [
        (x, g, numbers[0]),
        (x, g, numbers),
        (x[0], g, numbers[0]),
        (x, g[0], numbers),
        (per_row, per_row, numbers),
    ]
    for op in (kick, lambda m, g, a: torch.stack(leapfrog(m, g, g, a, a))):
        for case in cases:
            dims = tuple(None if len(value.shape) == 0 else 0 for value in case)
            rows = [op(*(v if d is None else v[i] for v, d in zip(case, dims, strict=True))) for i in range(64)]
            assert torch.equal(vmap(op, in_dims=dims)(*case), torch.stack(rows))


def test_an_empty_sum_has_a_gradient() -> None:
    losses, values = torch.randn(3, requires_grad=True), torch.randn(3, 0, 2, requires_grad=True)
    for reduce in (tilted_reduce, _C.tilted_reduce):
        found = torch.autograd.grad(reduce(losses, values, 1.0).sum(), (losses, values))
        assert torch.equal(found[0], torch.zeros(3))
        assert found[1].shape == values.shape


def test_autocast_does_not_round_inside() -> None:
    losses, values = torch.randn(6, requires_grad=True), torch.randn(6, 300, requires_grad=True)
    for reduce in (tilted_reduce, _C.tilted_reduce):
        found = []
        for on in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                loss = (reduce(losses, values, 1.0) ** 2).sum() + tilted_loss(losses, 1.0)
                found.append(torch.autograd.grad(loss, (losses, values)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_forward_mode_inside_compile_is_left_to_eager_or_refused() -> None:
    """The compiled twin has no jvp: Dynamo would hand out tangents of zero."""

    def run(x: Tensor) -> Tensor:
        return jvp(lambda y: tilted_loss(y, 1.0), (x,), (torch.ones_like(x),))[1]

    x = arguments()[0]
    torch._dynamo.reset()
    assert close(torch.compile(run, backend="eager")(x), torch.ones((), dtype=torch.float64))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"no forward mode inside torch\.compile"):
        torch.compile(run, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: tilted_loss(y, 1.0), backend="aot_eager")
    assert close(jvp(compiled, (x,), (torch.ones_like(x),))[1], torch.ones((), dtype=torch.float64))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        assert close(tangent, torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_nobody_records(mode: Callable[[], Any]) -> None:
    values = [value.requires_grad_() for value in arguments()]
    with mode():
        got = ours(*values)
    assert not got.requires_grad
    assert close(got, theirs(*values).detach())


def test_functions_are_copied_and_pickled_by_name() -> None:
    for name in ("tilted_loss", "tilted_weights", "tilted_reduce", "leapfrog", "kick", "perturb"):
        for where in (tsam_ext.functional, _C):
            function = getattr(where, name)
            assert copy.deepcopy(function) is function
            assert pickle.loads(pickle.dumps(function)) is function


def test_an_exported_program_computes_the_same() -> None:
    class Net(torch.nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return ours(*values)

    values = arguments()
    assert close(torch.export.export(Net(), values).module()(*values), ours(*values))


SCRIPT = """
import importlib.util, multiprocessing, sys
import torch
import tsam_ext
from tsam_ext import _C

def run(x):
    return _C.tilted_loss(x, 2.0)

if __name__ == "__main__":
    assert "torch._dynamo" not in sys.modules
    spec = importlib.util.find_spec("torch._dynamo")  # asked for, not imported
    assert spec is not None and "torch._dynamo" not in sys.modules
    x = torch.ones(3)
    assert torch.compile(run, fullgraph=True, backend="eager")(x) == run(x)
    import torch._dynamo
    assert type(torch._dynamo.__spec__.loader).__module__ != "tsam_ext._compile"
    assert not [f for f in sys.meta_path if type(f).__module__ == "tsam_ext._compile"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(run, [x])[0] == run(x)
"""


def test_dynamo_may_be_looked_for_before_it_is_imported_and_processes_spawned(tmp_path: Any) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr


RELOADED = """
import importlib, sys
import tsam_ext, tsam_ext._compile

class Old:  # as finders were before Python 3.4
    def find_module(self, name, path=None):
        return None

importlib.reload(tsam_ext._compile)
sys.meta_path.insert(0, Old())
import torch, torch._dynamo
run = torch.compile(tsam_ext._C.tilted_loss, fullgraph=True, backend="eager")
assert run(torch.ones(3), 2.0) == 1.0
"""


def test_reloading_and_old_finders_leave_compile_alive(tmp_path: Any) -> None:
    path = tmp_path / "script.py"
    path.write_text(RELOADED)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_every_differentiable_op_is_in_the_tables_here() -> None:
    assert ROWS.keys() == set(_ops.DIFFERENTIABLE)
