"""The oracle against facts from outside: published vectors, exact integers, autograd and limits.

Nothing compiled is used here. Statistical bounds hold with a false-alarm rate below 1e-6 for any seed.
"""

from __future__ import annotations

import math
import random
import struct

import pytest
import torch
from torch import Tensor

from tsam_ext import reference
from tsam_ext.reference import StreamingTilt, normal, philox4x32, unit_noise
from tsam_ext.reference.noise import SIGNS, signs

INF = math.inf
TILTS = [0.0, 1.0, -3.0, 20.0, 1e-12, -1e-12, 1e4, -1e4, INF, -INF]


def integer_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 again, in Python's unbounded integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        low = (1 << 32) - 1
        a, b, c, d = (q >> 32) ^ b ^ k, q & low, (p >> 32) ^ d ^ m, p & low
        k, m = (k + 0x9E3779B9) & low, (m + 0xBB67AE85) & low
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_random123_known_answers(counter: str, key: str, expected: str) -> None:
    words = [torch.tensor(int(word, 16)) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox4x32(words, (k0, k1))] == expected.split()


def test_philox_agrees_with_integers() -> None:
    source = random.Random(1)
    counters = [[source.getrandbits(32) for _ in range(4)] for _ in range(200)]
    columns = [torch.tensor(column) for column in zip(*counters, strict=True)]
    key = [source.getrandbits(32), source.getrandbits(32)]
    words = torch.stack(philox4x32(columns, (key[0], key[1])), 1)
    assert words.tolist() == [integer_philox(counter, key) for counter in counters]


def float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def test_normals_follow_the_written_scheme() -> None:
    """Element, seed, step, purpose and sample each land in their own word, the high halves too."""
    seed, step, sample, purpose = 0xDEADBEEF_12345678, 7 + (5 << 32), 9, 3
    base = (1 << 40) + 2  # quads beyond 2^32, and not aligned
    expected = []
    for element in range(base, base + 11):
        quad, lane = divmod(element, 4)
        counter = [quad & 0xFFFFFFFF, quad >> 32, 7, purpose << 28 | sample]
        x = integer_philox(counter, [seed & 0xFFFFFFFF, seed >> 32])[lane // 2 * 2 :]
        angle = 2 * math.pi * x[1] / 2**32
        u = float32((float32(x[0]) + 0.5) / 2**32)  # a float32, rounded once as x and once as u
        length = math.sqrt(-2 * math.log(u))
        expected.append(length * (math.sin(angle) if lane % 2 else math.cos(angle)))
    drawn = normal(11, base, seed, step, sample, purpose)
    torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_slice_of_the_stream_is_the_stream() -> None:
    whole = normal(64, 100, 3, 4, 5)
    for begin in range(9):
        for length in range(9):
            assert torch.equal(normal(length, 100 + begin, 3, 4, 5), whole[begin : begin + length])


def test_uniform_is_the_last_element() -> None:
    seed, step, sample = 11 << 32 | 12, 13, 14
    counter = [0xFFFFFFFF, 0x3FFFFFFF, step, 3 << 28 | sample]
    word = integer_philox(counter, [12, 11])[3]
    assert reference.uniform(seed, step, sample) == (word + 0.5) / 2**32


def kolmogorov(values: Tensor, distribution: Tensor) -> float:
    """sqrt(n) sup |F_n - F| of sorted values under their distribution function."""
    n = len(values)
    grid = torch.arange(n, dtype=torch.float64) / n
    return math.sqrt(n) * float((distribution - grid).abs().max())


def test_noise_is_normal_and_independent_across_counters() -> None:
    # Kolmogorov: P(sqrt(n) D > 2.8) < 2 exp(-2 * 2.8^2) = 3e-7. A correlation of n pairs times sqrt(n) and the
    # standardised moments are standard normal here; 5.5 is exceeded with probability 4e-8 each.
    n = 1 << 17
    z = normal(n, 0, 1, 2, 3)
    z_sorted = z.sort().values
    assert kolmogorov(z_sorted, 0.5 * torch.erfc(-z_sorted / math.sqrt(2))) < 2.8
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - mean) * math.sqrt(n / variance) < 5.5
    others = [normal(n, n, 1, 2, 3), normal(n, 0, 2, 2, 3), normal(n, 0, 1 << 32, 2, 3)]
    others += [normal(n, 0, 1, 3, 3), normal(n, 0, 1, 2, 4), normal(n, 0, 1, 2, 3, purpose=1)]
    others += [z.roll(lag) for lag in (1, 2, 3, 4)]
    for other in others:
        for f, g in ((z, other), (z**2 - 1, (other**2 - 1) / 2)):
            assert abs(float((f * g).mean())) * math.sqrt(n) < 5.5
    u = torch.tensor([reference.uniform(1, k, 0) for k in range(2000)], dtype=torch.float64)
    u = u.sort().values
    assert kolmogorov(u, u) < 2.8


def test_base_offsets_round_every_size_up() -> None:
    assert reference.base_offsets([5, 0, 4, 1, 3]) == [0, 8, 8, 12, 16]


def test_a_sign_is_a_bit_of_its_block() -> None:
    """By the definition, one element after the other."""
    base, seed, step, sample = (1 << 39) - 200, 0x1234567_89ABCDEF, 77, 3
    drawn = signs(500, base, seed, step, sample)
    for i in range(500):
        block, e = divmod(base + i, 128)
        counter = [block & 0xFFFFFFFF, block >> 32, step, SIGNS << 28 | sample]
        word = integer_philox(counter, [seed & 0xFFFFFFFF, seed >> 32])[e // 32]
        assert drawn[i] == (-1.0 if word >> e % 32 & 1 else 1.0)


def test_unit_noise_norms_order_and_antithesis() -> None:
    tensors = [torch.empty(3, 2, 4, 5).to(memory_format=torch.channels_last), torch.empty(7)]
    d, where = 127, {"seed": 5, "step": 6}
    for noise in ("gaussian", "sphere", "ball", "rademacher"):
        nu = unit_noise(tensors, [0, 120], sample=3, noise=noise, **where)
        draw = signs if noise == "rademacher" else normal
        z = torch.cat([draw(120, 0, 5, 6, 3), draw(7, 120, 5, 6, 3)])
        scale = {
            "gaussian": d**-0.5,
            "rademacher": d**-0.5,
            "sphere": 1 / float(z.norm()),
            "ball": reference.uniform(5, 6, 3) ** (1 / d) / float(z.norm()),
        }[noise]
        stored = [torch.as_strided(part, (part.numel(),), (1,)) for part in nu]
        torch.testing.assert_close(torch.cat(stored), z * scale, rtol=1e-13, atol=0)
        assert nu[0].stride() == tensors[0].stride()
        minus = unit_noise(tensors, [0, 120], sample=3, noise=noise, antithetic=True, **where)
        plus = unit_noise(tensors, [0, 120], sample=2, noise=noise, antithetic=True, **where)
        assert all(torch.equal(a, -b) for a, b in zip(minus, plus, strict=True))
        assert torch.equal(plus[1], unit_noise(tensors, [0, 120], sample=2, noise=noise, **where)[1])


# Tilted losses.


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("tilt", [0.0, 1.0, -3.0, 20.0, 1e-9])
def test_tilted_functions_are_differentiable_twice(tilt: float) -> None:
    losses = doubles(0.3, -0.1, 0.9).requires_grad_()
    values = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (lambda x: reference.tilted_loss(x, tilt), (losses,)),
        (lambda x: reference.tilted_weights(x, tilt), (losses,)),
        (lambda x, v: reference.tilted_reduce(x, v, tilt), (losses, values)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("sizes", [None, doubles(2, 1, 3, 1)])
def test_weights_are_the_gradient_of_the_tilted_loss(tilt: float, sizes: Tensor | None) -> None:
    losses = doubles(0.5, 2.0, -1.0, 1.25).requires_grad_()
    (gradient,) = torch.autograd.grad(reference.tilted_loss(losses, tilt, sizes), losses)
    torch.testing.assert_close(gradient, reference.tilted_weights(losses.detach(), tilt, sizes))
    assert float(gradient.sum()) == pytest.approx(1.0, abs=1e-12)


def test_tilted_loss_limits_and_laws() -> None:
    losses = doubles(0.5, 2.0, -1.0, 1.25)
    mean, variance = float(losses.mean()), float(losses.var(correction=0))
    assert float(reference.tilted_loss(losses, 0.0)) == mean
    assert float(reference.tilted_loss(losses, INF)) == 2.0
    assert float(reference.tilted_loss(losses, -INF)) == -1.0
    for tilt in (1e-3, 1e-6, -1e-6):
        excess = (float(reference.tilted_loss(losses, tilt)) - mean) / tilt
        assert excess == pytest.approx(variance / 2, rel=abs(tilt) * 2 + 1e-15 / abs(tilt))
    # Far out: max + log(1/s)/t, the other samples being exp(-7500) smaller.
    far = float(reference.tilted_loss(losses, 1e4))
    assert far == pytest.approx(2.0 - math.log(4) / 1e4, abs=1e-12)
    ladder = [float(reference.tilted_loss(losses, t)) for t in (-INF, -9, -1, 0.0, 1e-7, 1, 9, INF)]
    assert ladder == sorted(ladder)
    assert len(set(ladder)) == len(ladder)
    shifted = reference.tilted_loss(losses + 5.0, 3.0) - reference.tilted_loss(losses, 3.0)
    assert float(shifted) == pytest.approx(5.0, abs=1e-12)
    weights = reference.tilted_weights(losses + 5.0, 3.0)
    torch.testing.assert_close(weights, reference.tilted_weights(losses, 3.0))


@pytest.mark.parametrize("tilt", TILTS)
def test_sizes_are_repetitions(tilt: float) -> None:
    losses, sizes = doubles(0.5, 2.0, 2.0), doubles(3, 1, 2)
    repeated = losses.repeat_interleave(sizes.long())
    a = reference.tilted_loss(losses, tilt, sizes)
    torch.testing.assert_close(a, reference.tilted_loss(repeated, tilt))
    weights = reference.tilted_weights(repeated, tilt)
    grouped = torch.stack([weights[:3].sum(), weights[3:4].sum(), weights[4:].sum()])
    torch.testing.assert_close(reference.tilted_weights(losses, tilt, sizes), grouped)


def test_equal_extremes_share_the_weight() -> None:
    assert reference.tilted_weights(doubles(1, 3, 3), INF).tolist() == [0.0, 0.5, 0.5]
    assert reference.tilted_weights(doubles(1, 3, 1), -INF).tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e3, 1e8])
def test_streaming_is_batch(tilt: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(4)
    for s in (1, 2, 7):
        losses = scale * torch.rand(s, generator=generator, dtype=torch.float64)
        values = torch.randn(s, 16, generator=generator, dtype=torch.float64)
        values *= 10.0 ** torch.randint(-4, 5, (s, 1), generator=generator)
        sizes = torch.randint(1, 5, (s,), generator=generator).double()
        state, mean = StreamingTilt(tilt), torch.full((16,), math.nan, dtype=torch.float64)
        for loss, value, size in zip(losses, values, sizes, strict=True):
            state.blend(mean, value, *state.update(float(loss), math.log(size)))
        weights = reference.tilted_weights(losses, tilt, sizes)
        expected = reference.tilted_reduce(losses, values, tilt, sizes)
        # Relative to Σ w|g|. An exponent t L has a rounding error of |t L| eps, and so has its weight.
        exponent = 0.0 if math.isinf(tilt) else abs(tilt) * scale
        error = (mean - expected).abs() / reference.tilted_reduce(losses, values.abs(), tilt, sizes)
        assert float(error.max()) < 1e-14 * (s + exponent)
        assert state.ess == pytest.approx(1.0 / float(weights.square().sum()), rel=1e-14 * (4 + exponent))


def test_streaming_and_losses_that_are_not_finite() -> None:
    state, mean = StreamingTilt(2.0, skip_nonfinite_loss=True), torch.full((1,), math.nan)
    for loss in (math.nan, 1.0, INF, 1.0, -INF):
        state.blend(mean, torch.tensor([loss]), *state.update(loss))
    assert (float(mean), state.num_nonfinite, state.ess) == (1.0, 3, 2.0)
    for bad in (math.nan, INF, -INF):
        for tilt in (0.0, 2.0, INF, -INF):
            state, mean = StreamingTilt(tilt), torch.zeros(1)
            for loss in (1.0, bad, 5.0):
                state.blend(mean, torch.tensor([3.0]), *state.update(loss))
            assert math.isnan(float(mean))


def test_ascend_is_sam_and_asam() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,)]
    origins = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    gradients = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    g, theta = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, origins))
    for adaptive, step in (
        (False, g / g.norm()),
        (True, theta**2 * g / (theta.abs() * g).norm()),
    ):
        moved = [o.clone() for o in origins]
        norm = reference.ascend(moved, origins, gradients, [0.1, 0.1], [adaptive, adaptive])
        shift = torch.cat([(m - o).flatten() for m, o in zip(moved, origins, strict=True)])
        torch.testing.assert_close(shift, 0.1 * step, rtol=1e-12, atol=1e-15)
        assert float(norm) == pytest.approx(float((theta.abs() * g if adaptive else g).norm()))
    still = [o.clone() for o in origins]
    reference.ascend(still, origins, [torch.zeros_like(o) for o in origins], [1, 1], [False] * 2)
    assert all(torch.equal(a, b) for a, b in zip(still, origins, strict=True))


def test_torch_noise_of_the_baseline_obeys_the_same_laws(problem) -> None:
    for noise, norm in (("sphere", 1.0), ("ball", None), ("gaussian", None), ("rademacher", 1.0)):
        task = problem(dtype=torch.float32)
        origin, seen = task.copies(), []
        options = {"sampler": "noise", "noise": noise, "radius": 0.3, "num_samples": 4}
        optimizer = reference.ReferenceTSAM(task.parameters, lr=0.1, antithetic=True, rng="torch", **options)

        def closure(task=task, origin=origin, seen=seen) -> Tensor:
            seen.append([p.detach() - o for p, o in zip(task.parameters, origin, strict=True)])
            loss = task.loss()
            loss.backward()
            return loss

        optimizer.step(closure)
        lengths = [float(reference.global_norm(shift)) / 0.3 for shift in seen]
        assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
        assert lengths[0] != pytest.approx(lengths[2], rel=1e-6) or norm is not None
        for length in lengths:
            assert 0.6 < length < 1.4 if norm is None else length == pytest.approx(norm, rel=1e-4)
        for a, b in zip(seen[0], seen[1], strict=True):
            torch.testing.assert_close(a, -b, rtol=0, atol=1e-6)
