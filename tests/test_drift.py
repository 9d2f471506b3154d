"""The laws of both drifts of HMC, on csrc/core itself.

Layout: many starts at once, u and v of shape [n, 5], a start of fewer dimensions padded with zeros. Coordinates are
multiples of 2^-24 where a tolerance of 1e-12 is asked: the three dot products are then exact. Where they are not, a
rounding ε of u·u shifts w/|v| = ω by ε/ω, hence the count of chords in a path of L radii by Lε/2ω³ and the normal
velocity by Lε/ω²: that is how well the exact map itself is conditioned, and what ``tolerance`` allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from core_library import SANITIZED, Array, Core

from tsam_ext import reference

EPSILON = 2.0**-53


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Core:
    return Core(tmp_path_factory.mktemp("drift") / "drift.so", ["-O3"])


def norm(x: Array) -> Array:
    return np.sqrt((x * x).sum(1))


def simulate(u: Array, v: Array, h: Array) -> tuple[Array, Array, Array]:
    """Straight lines and single reflections, one after another, in extended precision; also counts the hits."""
    u, v, rest = (x.astype(np.longdouble) for x in (u, v, h))
    square, at_wall = (v * v).sum(1), np.zeros(len(u), bool)
    counts, active = np.zeros(len(u)), square > 0
    while active.any():
        uv, gap = (u * v).sum(1), np.minimum((u * u).sum(1) - 1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            root = np.sqrt(uv * uv - square * gap)
            until = np.where(at_wall, -2 * uv / square, np.where(uv > 0, -gap / (uv + root), (root - uv) / square))
        active &= until < rest
        u[active] += until[active, None] * v[active]
        u[active] /= norm(u[active])[:, None]
        v[active] -= 2 * (u * v).sum(1)[active, None] * u[active]
        rest[active] -= until[active]
        counts[active] += 1
        at_wall |= active
    return u + rest[:, None] * v, v, counts


def grid(x: Array) -> Array:
    return np.round(x * 2.0**24) / 2.0**24


def pad(x: Array) -> Array:
    return np.pad(x, ((0, 0), (0, 5 - x.shape[1])))


def interior(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array, Array]:
    """Uniform in the ball, normal momentum, paths of up to 20 diameters."""
    z = rng.standard_normal((n, d))
    u = grid(z / norm(z)[:, None] * rng.random((n, 1)) ** (1 / d) * (1 - 2.0**-20))
    v = grid(rng.standard_normal((n, d)))
    return pad(u), pad(v), 40 * rng.random(n) / np.maximum(norm(v), 1e-3)


def special(rng: np.random.Generator, kind: str, n: int, d: int) -> tuple[Array, Array, Array]:
    """Starts where a formula could break, with exact dot products."""
    u, v, h = interior(rng, n, d)
    v = np.round(v * 2.0**22) / 2.0**22  # leaves the digits that halves of it need
    axis = np.zeros_like(u)
    if d == 4:
        axis[:, :4] = np.where(rng.random((n, 4)) < 0.5, 0.5, -0.5)
    else:
        axis[:, 0] = 1.0
    tangent = v - (axis * v).sum(1)[:, None] * axis
    tiny = 2.0 ** -rng.integers(4, 11, (n, 1)) * np.where(rng.random((n, 1)) < 0.5, 1.0, -1.0)
    if kind == "centre":
        return np.zeros_like(u), v, h
    if kind == "rest":
        return u, np.zeros_like(v), 10 * rng.random(n)
    if kind == "wall":
        normal = v - tangent
        return axis, grid(v + np.where((normal * axis).sum(1)[:, None] < 0, -1.0, 1.0) * axis / 64), h
    if kind == "graze":
        return axis, tangent + tiny * axis, h / 4
    if kind == "barely":  # a thousandth to 1e-11 of the speed, and some hundred hits
        normal = tiny * 2.0 ** -rng.integers(4, 27, (n, 1))
        return axis, tangent + normal * axis, 800 * np.abs(normal[:, 0]) / np.maximum((v * v).sum(1), 1e-3)
    if kind == "radial":  # q/|v| = 1e-9: rounding makes it 0, but not the angle that twenty diameters turn by
        u = axis * rng.integers(-60, 60, (n, 1)) / 64
        v = axis * rng.integers(16, 128, (n, 1)) / 64 + np.roll(np.abs(axis), 1, 1) * 2.0**-28
        return u, v, 40 * rng.random(n) / norm(v)
    assert kind == "near wall"
    return axis * (1 - np.abs(tiny) / 256), tangent, h / 4


def starts() -> Iterator[tuple[str, tuple[Array, Array, Array]]]:
    rng = np.random.default_rng(20241022)
    for d in range(1, 6):
        yield f"interior d={d}", interior(rng, 700, d)
        for kind in ("centre", "rest", "wall", "graze", "barely", "radial", "near wall"):
            if (d > 1 and (d != 4 or kind != "radial")) or kind in {"centre", "rest", "wall"}:
                yield f"{kind} d={d}", special(rng, kind, 60, d)


def wall_speed(u: Array, v: Array) -> Array:
    """ω = w/|v|, the sine of the angle at which the path meets the wall."""
    cosine = (u * v).sum(1) / norm(v)
    return np.sqrt(cosine**2 + np.maximum(1 - (u * u).sum(1), 0))


def tolerance(u: Array, v: Array, length: Array) -> Array:
    """What rounded dot products cost a path of ``length`` radii: at grazing angles, and near the centre."""
    return 1e-14 + 24 * EPSILON * (1 + length) * (length + wall_speed(u, v) ** -2)


def error(got: tuple[Array, ...], expected: tuple[Array, ...]) -> Array:
    """The larger of the errors of u (the ball has radius 1) and of v relative to |v|."""
    speed = np.maximum(norm(expected[1]), 1e-300)
    return np.maximum(norm(got[0] - expected[0]), norm(got[1] - expected[1]) / speed).astype(float)


def test_ball_agrees_with_reflection_after_reflection(core: Core) -> None:
    """To 1e-12: measured 1e-13 at worst, after 11,000 hits, where the simulation is the worse of the two."""
    cases = 0
    for name, (u, v, h) in starts():
        got, expected = core.ball(u, v, h), simulate(u, v, h)
        assert error(got, expected).max() < 1e-12, name
        # At the very moment of a hit the count may differ, and nothing else.
        assert (got[2] == expected[2]).mean() > 0.98, name
        assert "rest" in name or got[2].max() > 5, name
        cases += len(u)
    assert cases > 3000


def test_tangent_starts_slide_along_the_great_circle(core: Core) -> None:
    """On the wall with w = 0, the limit of ever more and ever shorter chords."""
    for d in (2, 3, 4):
        axis, v, h = special(np.random.default_rng(d), "graze", 50, d)
        v -= (axis * v).sum(1)[:, None] * axis
        speed = norm(v)
        angle = (h * speed)[:, None]
        u1, v1, counts = core.ball(axis, v, h)
        turned = np.cos(angle) * axis + np.sin(angle) * v / speed[:, None]
        expected = turned, np.cos(angle) * v - np.sin(angle) * speed[:, None] * axis
        assert error((u1, v1), expected).max() < 1e-13
        assert (counts == 1).all()
        for tilt in (1e-15, -1e-15, 0.999e-14, 1.001e-14, -1.001e-14, 1e-12):
            near = core.ball(axis, v + tilt * speed[:, None] * axis, h)
            assert error(near[:2], expected).max() < 4 * abs(tilt) + 1e-13, tilt


def test_degenerate_arguments(core: Core) -> None:
    straight = core.coefficients(0.25, 0.1, 0.0, 2.0)
    assert straight.tolist() == [1, 2, 0, 1, 0]  # no momentum
    assert core.coefficients(0.25, 0.0, 1.0, 0.1).tolist() == [1, 0.1, 0, 1, 0]  # before the hit
    tau = math.sqrt(0.75)
    assert core.coefficients(0.25, 0.0, 1.0, tau).tolist() == [1, tau, 0, 1, 0]  # at it
    assert core.coefficients(1.0, 0.0, 1.0, 0.0).tolist() == [1, 0, 0, 1, 0]
    assert core.coefficients(1.0, 0.5, 1.0, 0.1)[4] == 1  # outward at the wall: at once
    assert core.coefficients(1.0, -0.5, 1.0, 0.1)[4] == 0
    # A hit some 1e-12 away, on time to 1e-6 of that.
    for uv in (0.3, 0.7, 1.1):
        gap = 2.0**-40
        tau = gap / (uv + math.sqrt(uv * uv + gap))
        for factor, hits in ((1 - 1e-6, 0), (1 + 1e-6, 1)):
            assert core.coefficients(1 - gap, uv, 1.0, factor * tau)[4] == hits
    # Rounding outside is the wall, for u and for q.
    assert core.coefficients(1.0 + 1e-9, 0.5, 1.0, 0.1).tolist() == core.coefficients(1.0, 0.5, 1.0, 0.1).tolist()
    for position in range(4):
        for bad in (math.nan, math.inf):
            arguments = [0.25, 0.1, 1.0, 2.0]
            arguments[position] = bad
            if (position, bad) != (0, math.inf):
                assert np.isnan(core.coefficients(*arguments)[:4]).any(), arguments


def test_ball_is_reversible(core: Core) -> None:
    """Drift, negate v, drift, negate v; over ten radii at most, where ``tolerance`` is mostly below 1e-12."""
    for name, (u, v, h) in starts():
        if "rest" in name:
            continue
        h = h / 4
        allowed = tolerance(u, v, h * norm(v))
        u1, v1, _ = core.ball(u, v, h)
        u2, v2, _ = core.ball(u1, -v1, h)
        off = error((u2, -v2), (u, v))
        if name.startswith(("wall", "graze", "barely")):
            # The way back ends at the moment of a hit: the velocity from before it is as good.
            mirrored = v - 2 * (u * v).sum(1)[:, None] * u
            off = np.minimum(off, error((u2, -v2), (u, mirrored)))
        assert (off < allowed).all(), name
        assert np.median(allowed) < 1e-12 or not name.startswith("interior")


def test_ball_keeps_its_invariants(core: Core) -> None:
    """To 1e-12: a few roundings, and nothing that grows faster than the path."""
    for name, (u, v, h) in starts():
        if "rest" in name:
            continue
        u1, v1, _ = core.ball(u, v, h)
        assert (norm(u1) <= 1 + 1e-12).all(), name
        assert (np.abs(norm(v1) / norm(v) - 1) < 1e-12).all(), name
        before, after = (x[:, :, None] * y[:, None, :] for x, y in ((u, v), (u1, v1)))
        momentum = np.abs((after - after.swapaxes(1, 2)) - (before - before.swapaxes(1, 2))).max((1, 2))
        assert (momentum / norm(v) < 1e-12).all(), f"{name}: angular momentum"
        # The speed at which every hit meets the wall; squared, as a rounding of u.u is one of its square.
        squared = np.abs(wall_speed(u1, v1) ** 2 - wall_speed(u, v) ** 2)
        assert (squared < 1e-12).all(), f"{name}: normal speed"


def test_drifts_compose(core: Core) -> None:
    """h1 and then h2 is h1 + h2."""
    rng = np.random.default_rng(5)
    for name, (u, v, h) in starts():
        if "rest" in name:
            continue
        h1, h2 = h / 4 * rng.random((2, len(h)))
        u1, v1, count1 = core.ball(u, v, h1)
        u2, v2, count2 = core.ball(u1, v1, h2)
        u3, v3, count3 = core.ball(u, v, h1 + h2)
        assert (error((u2, v2), (u3, v3)) < tolerance(u, v, (h1 + h2) * norm(v))).all(), name
        # Below 1e-5 of the speed rounded dot products no longer say how many hits there are.
        assert (np.abs(count1 + count2 - count3) <= 1).all() or name.startswith("barely"), name


def test_ball_preserves_volume(core: Core) -> None:
    """The determinant of (u, v) -> (u', v') is +1, its coefficients differentiated too.

    Central differences of fourth order at 1e-3: the map's fifth derivative leaves 1e-6 for angles to the wall above
    0.4 and at most six hits.
    """
    rng = np.random.default_rng(6)
    step, weights = 1e-3, {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}
    for d in (1, 2, 3):
        u, v, h = interior(rng, 400, d)
        h /= 8
        keep = (wall_speed(u, v) > 0.4) & (norm(v) > 0.5) & (norm(u) < 0.95)
        u, v, h = u[keep], v[keep], h[keep]
        _, _, counts = core.ball(u, v, h)
        smooth, jacobian = counts <= 6, np.zeros((len(u), 2 * d, 2 * d))
        for column in range(2 * d):
            for k, weight in weights.items():
                moved = np.concatenate([u[:, :d], v[:, :d]], 1)
                moved[:, column] += k * step
                u1, v1, hits = core.ball(pad(moved[:, :d]), pad(moved[:, d:]), h)
                jacobian[:, :, column] += weight / step * np.concatenate([u1[:, :d], v1[:, :d]], 1)
                smooth &= hits == counts
        determinant = np.linalg.det(jacobian[smooth])
        assert (counts[smooth] > 0).sum() > 100
        assert np.abs(determinant - 1).max() < 1e-5, d


def test_rotation(core: Core) -> None:
    rng = np.random.default_rng(7)
    x, p = rng.standard_normal((2, 1000))
    for h in (0.0, 1e-3, 0.7, math.pi / 2, 5.0):
        x1, p1 = core.rotate(x, p, h)
        np.testing.assert_allclose(x1 + 1j * p1, (x + 1j * p) * np.exp(-1j * h), rtol=0, atol=1e-14)
        np.testing.assert_allclose(x1**2 + p1**2, x**2 + p**2, rtol=1e-14)
        x2, p2 = core.rotate(x1, -p1, h)
        np.testing.assert_allclose([x2, -p2], [x, p], rtol=0, atol=1e-14)
        np.testing.assert_allclose(core.rotate(x1, p1, 0.3), core.rotate(x, p, h + 0.3), rtol=0, atol=1e-14)
    # x' = p after a quarter turn: the direction of time.
    np.testing.assert_allclose(core.rotate(x, p, math.pi / 2), [p, -x], atol=1e-15)


def test_float32_drifts_round_elements_but_not_coefficients(core: Core) -> None:
    """One element and sixteen lanes have the same bits. Two roundings an element, and nothing that all share.

    A rounded coefficient would be off by the same number for all elements, about 1e-8. The error has no such part: its
    regression on u and v is the mean of 6,400 roundings, below six times 2^-24 / sqrt(6400).
    """
    rng = np.random.default_rng(8)
    u, v = rng.standard_normal((2, 6400)).astype(np.float32)
    drift = core.coefficients(1 - 3e-7, 0.8, 4e6, 1.5 / 2000)
    one, lanes = (u.copy(), v.copy()), (u.copy(), v.copy())
    core.library.apply_float1(drift, len(u), *one)
    core.library.apply_float_lanes(drift, len(u), *lanes)
    for row, (x, y) in enumerate(zip(one, lanes, strict=True)):
        np.testing.assert_array_equal(x, y)
        first, second = drift[2 * row] * u.astype(float), drift[2 * row + 1] * v.astype(float)
        error = x - (first + second)
        assert (np.abs(error) <= 2.0**-24 * 1.001 * (np.abs(second) + np.abs(first + second))).all()
        scale = np.abs(drift[2 * row : 2 * row + 2]).max()
        for of in (u, v):
            assert abs(error @ of / (of.astype(float) @ of)) < scale * 6 * 2.0**-24 / math.sqrt(len(u))


def test_float32_lanes_stay_in_the_ball_through_thousands_of_reflections(core: Core) -> None:
    """d = 4e6, where a typical gap 1 - |u| is 2e-7. Rounding every coordinate moves |u|^2 by 3e-11: to 1e-9."""
    d, rng = 4_000_000, np.random.default_rng(9)
    u = rng.standard_normal(d, dtype=np.float32)
    u *= np.float32((1 - 1e-7) / np.linalg.norm(u.astype(float)))
    reflections = []
    for _ in range(20):
        v = rng.standard_normal(d, dtype=np.float32)
        x, y = u.astype(float), v.astype(float)
        uu, uv, vv = x @ x, x @ y, y @ y
        assert uu <= 1 + 1e-9
        assert uu > 1 - 1e-5, "typical states lie near the wall"
        drift = core.coefficients(uu, uv, vv, math.pi / 2 / math.sqrt(d))
        reflections.append(drift[4])
        core.library.apply_float_lanes(drift, d, u, v)
        y = v.astype(float)
        assert abs(y @ y / vv - 1) < 1e-9
    assert np.mean(reflections) > 500
    assert max(reflections) > 1000


def test_reference_agrees(core: Core) -> None:
    """Lists of two tensors are one vector; to ``tolerance``, as the reference sums in another order."""
    rng = np.random.default_rng(10)
    for d in (2, 3, 5):
        u, v, h = interior(rng, 60, d)
        u1, v1, _ = core.ball(u, v, h)
        allowed = tolerance(u, v, h * norm(v))
        for i in range(len(u)):
            lists = [[torch.tensor(z[i, :2]), torch.tensor(z[i, 2:])] for z in (u, v)]
            position, momentum = reference.ball_drift(lists[0], lists[1], h[i])
            got = torch.cat(position).numpy()[None], torch.cat(momentum).numpy()[None]
            assert error(got, (u1[i : i + 1], v1[i : i + 1]))[0] < allowed[i]
        turned = reference.rotation_drift([torch.tensor(u)], [torch.tensor(v)], 0.7)
        np.testing.assert_allclose([z[0].numpy() for z in turned], core.rotate(u, v, 0.7), rtol=0, atol=1e-15)
    slide = reference.ball_drift([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 2.0])], math.pi / 4)
    torch.testing.assert_close(slide, ([torch.tensor([0.0, 1.0])], [torch.tensor([-2.0, 0.0])]))


def test_no_undefined_behaviour(tmp_path: Path, capfd: pytest.CaptureFixture[str], core: Core) -> None:
    """The same bits under the sanitizer, which has nothing to say, also where arguments are degenerate."""
    sanitized = Core(tmp_path / "sanitized.so", SANITIZED)
    squares = (0.0, 1e-310, 1e-300, 1e-17, 0.5, 1.0, 1 + 1e-15, 4e6, 1e300, math.inf, math.nan)
    for uu in squares:
        for uv in (*squares, *(-x for x in squares)):
            for vv in squares:
                for h in (0.0, 0.3, 1e9):
                    arguments = uu, uv, vv, h
                    expected = core.coefficients(*arguments)
                    np.testing.assert_array_equal(sanitized.coefficients(*arguments), expected, str(arguments))
    assert "runtime error" not in capfd.readouterr().err
