"""The noise as users get it, through perturb_ at position 0, radius 1 and dimension 1, where theta is z itself.

Laws: the bits depend on (seed, step, sample, element) alone; z is standard normal, or for rademacher a sign by one fair
bit, and independent across every word of the counter. Statistical tests draw from fixed seeds; each would fail by
chance with probability below 1e-6.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tsam_ext import _C
from tsam_ext.engine.checks import NOISES
from tsam_ext.engine.state import CHAIN_SLOTS, new_state
from tsam_ext.reference import noise as oracle

N = 1 << 20
UNSCALED = [name for name, needs_norm in _C.__noises__ if not needs_norm]  # position 0 becomes z itself


def draw(
    sizes: list[int],
    base: list[int],
    *,
    seed: int = 1,
    step: int = 0,
    sample: int = 0,
    noise: str = "gaussian",
    dtype: torch.dtype = torch.float32,
    dimension: int = 1,
    negate: bool = False,
) -> list[torch.Tensor]:
    position = [torch.zeros(n, dtype=dtype) for n in sizes]
    saved = [torch.empty_like(p) for p in position]
    n = len(sizes)
    _C.perturb_(
        position, saved, new_state(0, torch.device("cpu")), [1.0] * n, [False] * n, base,
        seed, step, sample, NOISES.index(noise), dimension, negate, True,
    )  # fmt: skip
    return position


def normals(n: int, base: int = 0, **counter: int) -> torch.Tensor:
    return draw([n], [base], **counter)[0]


def signs(n: int, base: int = 0, **counter: int) -> torch.Tensor:
    return draw([n], [base], noise="rademacher", **counter)[0]


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    base=st.integers(0, 2**40),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    sample=st.integers(0, 2**28 - 1),
    noise=st.sampled_from(UNSCALED),
)
def test_an_element_has_its_noise_wherever_the_list_is_cut(
    cuts: list[int], base: int, seed: int, step: int, sample: int, noise: str
) -> None:
    (whole,) = draw([sum(cuts)], [base], seed=seed, step=step, sample=sample, noise=noise)
    bases = [base + sum(cuts[:i]) for i in range(len(cuts))]
    pieces = draw(cuts, bases, seed=seed, step=step, sample=sample, noise=noise)
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("noise", ["ball", "rademacher"])
def test_the_bits_do_not_depend_on_threads(noise: str) -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(draw([300_001, 5, 70_000], [3, 400_000, 400_008], noise=noise))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


PROGRAM = """
import hashlib, torch
from tsam_ext import _C
from tsam_ext.engine.state import DIRECTION_SLOTS, new_state
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for noise in range(len(_C.__noises__)):
        for adaptive in (False, True):
            torch.manual_seed(0)
            x = [torch.randn(n).to(dtype) for n in (70_001, 13, 0, 1)]
            g = [torch.randn(n.shape).to(dtype) for n in x]
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            saved, state = [torch.empty_like(p) for p in x], new_state(2, torch.device("cpu"))
            total = [torch.empty_like(p, dtype=wide) for p in x]
            flags = [adaptive] * 4
            _C.tilt_begin_(state, torch.tensor(3.0))
            _C.perturb_(x, saved, state, [0.1] * 4, flags, [1, 70_004, 0, 70_020],
                        5, 6, 7, noise, 70_015, False, True)
            _C.grad_norm_(g, saved, state, flags, 0)
            _C.ascend_(x, saved, g, state, [0.05] * 4, flags, False)
            _C.ascend_(x, saved, g, state, [0.05] * 4, flags, False, [1, 70_004, 0, 70_020], 5, 6, 3)
            _C.norm_ascend_(x, saved, g, state, [0.05], flags, False, 1, [1, 70_004, 0, 70_020], 5, 6, 5)
            sums = torch.zeros(3, dtype=torch.float64)
            _C.displacement_(x, saved, g, sums, [0.05] * 4, flags)
            for row, loss in enumerate((0.3, 0.7)):
                _C.tilt_update_(state, torch.tensor(loss), 0.0, row, False, row == 1)
                _C.accumulate_(total, g, state)
            direction = torch.zeros(DIRECTION_SLOTS, dtype=torch.float64)
            plain = [p.clone() for p in total]
            _C.take_direction_(plain, g, direction)
            _C.add_direction_(total, plain, direction)
            moved = [p.clone() for p in (x[0], saved[0], g[0])]
            step = torch.tensor(0.3, dtype=dtype)
            _C.leapfrog_(*moved, step, g[0].abs() if adaptive else step)
            _C.kick_(moved[1], g[0], g[0] if adaptive else step)
            mean = _C.tilted_reduce(torch.tensor([0.3, 0.7, -0.4]), torch.stack([x[0], g[0], saved[0]]), 2.0)
            for tensor in (*x, *saved, *total, *plain, *moved, mean, state, sums, direction):
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
print(_C.__isa__, digest.hexdigest())
"""


@pytest.mark.host_only("instruction sets are the CPU's")
def test_every_op_has_the_same_bits_on_every_instruction_set() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    sets = ["baseline", *(["avx2"] if "avx2" in flags else []), *(["avx512"] if "avx512bw" in flags else [])]
    digests = {}
    for isa in sets:
        environment = {**os.environ, "TSAM_ISA": isa}
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        ran, digests[isa] = done.stdout.split()
        assert ran == isa  # or the comparison would be of one set with itself
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("base", [0, 4, 2**34 - 8, 2**50 + 4])
def test_the_noise_is_the_reference_s(base: int) -> None:
    z = normals(N, base, seed=2**62 + 11, step=9, sample=123)
    exact = oracle.normal(N, base=base, seed=2**62 + 11, step=9, sample=123)
    assert (z.double() - exact).abs().max() < 1e-6


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 9000),
    base=st.one_of(st.integers(0, 300), st.integers(0, 2**62)),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    sample=st.integers(0, 2**28 - 1),
)
def test_the_signs_are_the_reference_s(n: int, base: int, seed: int, step: int, sample: int) -> None:
    """Every bit, from any element on: a block of words, of 128 signs and of 4,096 may begin anywhere in the run."""
    counter = {"seed": seed, "step": step, "sample": sample}
    assert torch.equal(signs(n, base, **counter).double(), oracle.signs(n, base, **counter))


def test_signs_are_fair_coins() -> None:
    z = signs(N).double()
    bits = (z < 0).numpy()
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean()) * N**0.5 < 5.5
    # Each of a block's 128 bits, then each byte's 256 values; chi-square at 1e-7.
    counts = bits.reshape(-1, 128).sum(0)
    rows = N // 128
    assert stats.chi2.sf(((counts - rows / 2) ** 2 / (rows / 4)).sum(), 128) > 1e-7
    assert stats.chisquare(np.bincount(np.packbits(bits), minlength=256)).pvalue > 1e-7


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Half a unit in the last place of values up to 6.8 (the float64 path adds float32 noise to float64 zeros).
    [(torch.float64, 0.0), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)],
)
def test_every_dtype_gets_the_float32_noise(dtype: torch.dtype, tolerance: float) -> None:
    z, other = normals(5000), draw([5000], [0], dtype=dtype)[0]
    assert (z.double() - other.double()).abs().max() <= tolerance
    assert torch.equal(signs(5000).double(), draw([5000], [0], dtype=dtype, noise="rademacher")[0].double())


def test_normal_distribution() -> None:
    z = normals(N).double().numpy()
    # Kolmogorov-Smirnov at 1e-7, moments at 5.5 standard errors (4e-8 two-sided each).
    assert stats.kstest(z, "norm").pvalue > 1e-7
    for power, mean, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        error = abs((z**power).mean() - mean) / np.sqrt(variance / N)
        assert error < 5.5, f"moment {power} off by {error} standard errors"
    assert np.abs(z).max() < 6.764
    assert np.abs(z).max() > 4.0


def test_independent_across_every_word_of_the_counter() -> None:
    first = normals(N).double()
    others = {
        "next element": first.roll(-1),
        "next pair": first.roll(-2),
        "next quad": first.roll(-4),
        "2^34 elements on (word 1)": normals(N, 2**34).double(),
        "next step": normals(N, step=1).double(),
        "next sample": normals(N, sample=1).double(),
        "seed + 1": normals(N, seed=2).double(),
        "seed + 2^32": normals(N, seed=1 + 2**32).double(),
    }
    for name, other in others.items():
        # Correlations of z and of z^2 - 1 (variance 2), each at 5.5 standard errors.
        assert abs((first * other).mean()) * N**0.5 < 5.5, name
        squares = (first**2 - 1) * (other**2 - 1) / 2
        assert abs(squares.mean()) * N**0.5 < 5.5, name


def test_signs_are_independent_across_every_word_of_the_counter() -> None:
    first = signs(N).double()
    others = {f"{lag} elements on": first.roll(-lag) for lag in (1, 2, 4, 32, 64, 128, 4096)}
    others |= {
        "2^39 elements on (word 1)": signs(N, 2**39).double(),
        "next step": signs(N, step=1).double(),
        "next sample": signs(N, sample=1).double(),
        "seed + 1": signs(N, seed=2).double(),
        "seed + 2^32": signs(N, seed=1 + 2**32).double(),
        "gaussian": normals(N).sign().double(),
    }
    for name, other in others.items():
        assert abs((first * other).mean()) * N**0.5 < 5.5, name


@pytest.mark.parametrize("noise", UNSCALED)
def test_negation_is_exact(noise: str) -> None:
    assert torch.equal(*(draw([1001], [0], noise=noise, negate=negate)[0] * (1 - 2 * negate) for negate in (0, 1)))


@pytest.mark.parametrize("noise", ["sphere", "ball", "rademacher"])
def test_sphere_and_ball(noise: str) -> None:
    sizes, base = [700, 0, 321], [0, 700, 700]
    d = sum(sizes)
    norms = []
    for sample in range(400):
        pieces = draw(sizes, base, sample=sample, noise=noise, dimension=d, dtype=torch.float64)
        norms.append(torch.cat(pieces).norm().item())
    if noise != "ball":
        assert np.allclose(norms, 1.0, rtol=1e-12)
    else:
        # ||eps||^d is uniform; the reference takes the same uniform from the same counter.
        uniform = np.array(norms) ** d
        exact = [oracle.uniform(seed=1, step=0, sample=j, purpose=3) for j in range(400)]
        assert np.allclose(uniform, exact, rtol=1e-9)
        assert stats.kstest(uniform, "uniform").pvalue > 1e-7


def test_gaussian_norm_is_about_one() -> None:
    d = 100_000
    norm = draw([d], [0], dimension=d)[0].norm().item()
    assert abs(norm - 1.0) < 5.5 / (2 * d) ** 0.5


def test_momenta_are_the_same_numbers_in_every_dtype() -> None:
    """Those of hmc_leapfrog_, where neither kick nor drift moves them; a float64 list has float32's."""
    sizes, base, drawn = [1, 7, 4100], [0, 5, 13], []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        wide = torch.promote_types(dtype, torch.float32)
        kinds = [dtype, dtype, wide, wide, wide, wide, dtype]  # position, saved, momentum, x0, x1, x2, grads
        lists = [[torch.zeros(n, dtype=kind) for n in sizes] for kind in kinds]
        chain, ones, flags = torch.zeros(CHAIN_SLOTS, dtype=torch.float64), [1.0] * 3, [False] * 3
        _C.hmc_leapfrog_(*lists, chain, ones, flags, base, 3, 2, 1, 1, 0, 0.0, 0.0, True, False)
        drawn.append(torch.cat(lists[2]).double())
    assert torch.equal(drawn[1], drawn[0]) and torch.equal(drawn[2], drawn[0])
    assert drawn[0].unique().numel() > 4000
