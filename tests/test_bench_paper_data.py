"""What the paper's runs train on: archives, folders, label noise, the held-out part, crops, flips and cutout.

Laws: what was written is read, bit for bit; a pickle can name arrays alone; what is wrong is named; each image of a
batch is one of those that crop, flip and cutout can make of it, and all of them come; a generator decides every bit.
Statistical ones: fixed seeds, a false alarm below one in a million (5.5 standard errors, or what is said there).
"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.paper import archives
from bench.paper.archives import ArraysOnly, python2, read_cifar, read_folder, write_cifar
from bench.paper.images import Augmentation, crop, cutout, flip, mean_and_std
from bench.paper.task import Rows, Task, held_out, with_label_noise


def rows(n: int, side: int = 32, classes: int = 10, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    return Rows(images, torch.arange(n) % classes)


def same(a: Rows, b: Rows) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels) and a.inputs.dtype == b.inputs.dtype


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_an_archive_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    """Packed or unpacked, by its folder or itself."""
    train, test = rows(13), rows(4, seed=1)
    path = write_cifar(tmp_path, name, train, test)
    assert path.name == f"cifar-{name.removeprefix('cifar')}-python.tar.gz"
    places = [tmp_path, path]
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    places += [tmp_path / "unpacked", tmp_path / "unpacked" / archives.CIFAR[name].folder]
    for place in places:
        found = read_cifar(place, name)
        assert same(found[0], train) and same(found[1], test)
        found[0].inputs[0] = 0  # the memory is ours


def test_a_pickle_by_python_2_has_bytes_for_strings() -> None:
    """As its own unpickler reads it, and with the memo that a real one has."""
    images = rows(2).inputs.flatten(1).numpy()
    text = b"\x80\x02" + python2({b"data": images, b"labels": [3, 1], b"more": (None, True, False)}) + b"."
    found = pickle.loads(text, encoding="bytes")
    assert list(found) == [b"data", b"labels", b"more"] and (found[b"data"] == images).all()
    assert found[b"labels"] == [3, 1] and found[b"more"] == (None, True, False)
    memo = b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(K\x03K\x01eU\x04sameh\x03u."
    found = ArraysOnly(io.BytesIO(memo), encoding="bytes").load()
    assert found[b"labels"] == [3, 1] and found[b"same"] is found[b"labels"]


def test_an_array_of_columns_is_read_by_rows(tmp_path: Path) -> None:
    """NumPy pickles one in Fortran's order as it lies."""
    content = {b"data": np.asfortranarray(rows(3).inputs.flatten(1).numpy()), b"fine_labels": [0, 1, 2]}
    for part in ("train", "test"):
        (tmp_path / part).write_bytes(pickle.dumps(content, protocol=4))
    assert same(read_cifar(tmp_path, "cifar100")[1], rows(3))


class Command:
    """What a pickle runs that trusts itself."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "text",
    [b"cos\nsystem\n(S'true'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy\nload\n(S'x'\ntR.",
     b"cnumpy.core.multiarray\narray\n."],
)  # fmt: skip
def test_a_pickle_that_names_anything_but_arrays_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "train").write_bytes(text)
    (tmp_path / "test").write_bytes(text)
    with pytest.raises(ValueError, match=r"train: it names [\w.]+, expected arrays, bytes, lists and dicts alone"):
        read_cifar(tmp_path, "cifar100")


def test_a_pickle_that_runs_a_command_runs_none(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = pickle.dumps({b"data": Command(made)}, protocol=4)
    for part in ("train", "test"):
        (tmp_path / part).write_bytes(text)
    with pytest.raises(ValueError, match=r"it names posix\.mkdir"):
        read_cifar(tmp_path, "cifar100")
    assert not made.exists()
    pickle.loads(text)
    assert made.exists()  # so the text was a real one


good = rows(3).inputs.flatten(1).numpy()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({b"data": good[:, 1:].copy(), b"fine_labels": [0, 1, 2]},
         r"b'data': got uint8 \[3, 3071\], expected uint8 \[n, 3072\]"),
        ({b"data": good.astype("i2"), b"fine_labels": [0, 1, 2]}, r"b'data': got int16 \[3, 3072\]"),
        ({b"data": b"text", b"fine_labels": [0]}, r"b'data': got bytes"),
        ({b"data": good, b"fine_labels": [0, 1]}, "got 2 labels, expected a list of 3, one for each image"),
        ({b"data": good, b"fine_labels": [0, 1, 100]}, "got 100 among them, expected whole numbers below 100"),
        ({b"data": good, b"fine_labels": [0, 1, -1]}, "got -1 among them"),
        ({b"data": good, b"fine_labels": [0, 1, None]}, "got None among them"),
        ({b"data": good, b"labels": [0, 1, 2]}, r"got \[\"b'data'\", \"b'labels'\"\], expected a dict with b'data'"),
        ([1, 2], "got list, expected a dict"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_an_archive_is_named(content: Any, named: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).write_bytes(b"\x80\x02" + python2(content) + b".")
    with pytest.raises(ValueError, match=f"^train: .*{named}"):
        read_cifar(tmp_path, "cifar100")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected cifar-10-python\.tar\.gz or cifar-10-batches-py in it"):
        read_cifar(tmp_path, "cifar10")
    path = write_cifar(tmp_path, "cifar100", rows(2), rows(2))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="no readable tar archive"):
        read_cifar(tmp_path, "cifar100")
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(FileNotFoundError, match="train is missing in"):
        read_cifar(tmp_path, "cifar100")
    (tmp_path / "test").write_bytes(b"")
    (tmp_path / "train").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^train: "):
        read_cifar(tmp_path, "cifar100")


def folder(root: Path, data: Rows, of: str, *, tiny: bool) -> None:
    """Images as PNG files, in a folder for each class or, ``tiny``, as Tiny-ImageNet has them."""
    from PIL import Image

    lines = []
    for i, (image, label) in enumerate(zip(data.inputs, data.labels.tolist(), strict=True)):
        name = f"n{label:02}"
        place = root / of / name / ("images" if tiny else "")
        if tiny and of == "val":
            place = root / of / "images"
            lines.append(f"{i:03}.JPEG\t{name}\t0\t0\t7\t7\n")
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{i:03}.{'JPEG' if tiny else 'png'}"
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path, format="PNG")  # PNG is exact
    if lines:
        (root / of / "val_annotations.txt").write_text("".join(lines))


@pytest.mark.parametrize("tiny", [True, False])
def test_a_folder_of_images_is_read_class_by_class(tiny: bool, tmp_path: Path) -> None:
    train, test = rows(6, 8, 3), rows(4, 8, 3, seed=1)
    folder(tmp_path, train, "train", tiny=tiny)
    folder(tmp_path, test, "val" if tiny else "test", tiny=tiny)
    if tiny:
        (tmp_path / "test" / "images").mkdir(parents=True)  # its labels are not public
    found, held, names = read_folder(tmp_path)
    assert names == ["n00", "n01", "n02"]
    by_class = torch.argsort(train.labels, stable=True)
    assert same(found, train.take(by_class))
    assert same(held, test if tiny else test.take(torch.argsort(test.labels, stable=True)))
    assert read_folder(tmp_path, side=4)[0].inputs.shape == (6, 3, 4, 4)


def test_what_is_wrong_in_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the folders train and val \(or test\) in it"):
        read_folder(tmp_path)
    folder(tmp_path, rows(2, 8, 2), "train", tiny=False)
    (tmp_path / "test" / "n07").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="got 2 images in train, 0 in test"):
        read_folder(tmp_path)
    path = tmp_path / "test" / "n07" / "a.png"
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png: got the class 'n07', expected one of the 2 folders"):
        read_folder(tmp_path)
    path = path.rename(tmp_path / "train" / "n00" / "0.png")
    folder(tmp_path, rows(1, 4), "test", tiny=False)
    with pytest.raises(ValueError, match=r"0\.png: no readable image"):
        read_folder(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"000\.png: got 4 × 4, expected 8 × 8, as the first image; --side N fits"):
        read_folder(tmp_path)


def task(n: int = 4000, classes: int = 10) -> Task:
    data = Rows(torch.arange(n)[:, None], torch.arange(n) % classes)
    held = Rows(data.inputs[:50] - 50, data.labels[:50])
    return Task("numbers", data, held, classes, torch.nn.Module, lambda x, generator: x)


def test_label_noise_draws_labels_anew_and_touches_nothing_else() -> None:
    clean = task()
    noisy, again = with_label_noise(clean, 0.3), with_label_noise(clean, 0.3)
    assert with_label_noise(clean, 0.0) is clean
    assert same(noisy.train, again.train) and same(noisy.test, clean.test)
    assert torch.equal(noisy.train.inputs, clean.train.inputs)
    wrong = float((noisy.train.labels != clean.train.labels).double().mean())
    assert abs(wrong - 0.27) < 5.5 * (0.27 * 0.73 / 4000) ** 0.5  # one in ten drawn labels is right
    assert set(with_label_noise(clean, 1.0).train.labels.tolist()) == set(range(10))


def test_the_held_out_part_is_cut_from_the_training_rows() -> None:
    whole = with_label_noise(task(100), 0.5)
    cut = held_out(whole, 0.3)
    kept, held = (set(part.inputs.flatten().tolist()) for part in (cut.train, cut.test))
    assert len(kept) == 70 and len(held) == 30 and kept | held == set(range(100))
    for part in (cut.train, cut.test):
        assert torch.equal(part.labels, whole.train.labels[part.inputs.flatten()])  # noisy alike
    assert same(held_out(whole, 0.3).test, cut.test)
    for share in (0.0, 1.0, 0.001):
        with pytest.raises(ValueError, match=r"--holdout: got .* of 100 training rows, expected at least one row"):
            held_out(whole, share)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_crop_is_a_window_of_the_padded_image_and_every_window_comes() -> None:
    """81 windows, 4,000 crops: one that is possible is missed with probability 81 (80/81)⁴⁰⁰⁰ < 1e-19."""
    one = rows(1, 8).inputs
    images = one.expand(4000, -1, -1, -1)
    padded = torch.zeros(3, 16, 16, dtype=torch.uint8)
    padded[:, 4:12, 4:12] = one[0]
    windows = {padded[:, i : i + 8, j : j + 8].numpy().tobytes() for i in range(9) for j in range(9)}
    found = {image.contiguous().numpy().tobytes() for image in crop(images, 4, generator())}
    assert len(windows) == 81 and found == windows
    assert torch.equal(crop(images[:5], 0, generator()), images[:5])


def test_a_flip_mirrors_half_of_the_images() -> None:
    images = rows(4000, 4).inputs
    found = flip(images, generator())
    mirrored = (found == images.flip(-1)).flatten(1).all(1)
    assert ((found == images).flatten(1).all(1) | mirrored).all()
    assert abs(int(mirrored.sum()) - 2000) < 5.5 * 1000**0.5


@pytest.mark.parametrize("side", [32, 64])
def test_cutout_is_a_square_of_its_size_cut_by_the_border(side: int) -> None:
    n, size = 3000, 16
    images = torch.ones(n, 2, side, side)
    holes = cutout(images, size, 0.5, generator()) == 0
    assert torch.equal(holes[:, 0], holes[:, 1]) and bool((images == 1).all())
    holes = holes[:, 0]
    high, wide = holes.any(2), holes.any(1)
    assert torch.equal(holes, high[:, :, None] & wide[:, None, :])  # a rectangle
    chosen = holes.flatten(1).any(1)
    assert abs(int(chosen.sum()) - n / 2) < 5.5 * (n / 4) ** 0.5
    reached = [min(side, middle + size // 2) - max(0, middle - size // 2) for middle in range(side)]
    for along in (high[chosen], wide[chosen]):
        lengths, first = along.sum(1), along.int().argmax(1)
        assert (int(first.min()), int(first.max())) == (0, side - 1 - size // 2)  # the middle reaches both borders
        assert set(lengths.tolist()) == set(
            range(size // 2, size + 1)
        )  # one place each: missed with (63/64)¹⁴⁰⁰ < 1e-9
        mean, square = (sum(x**k for x in reached) / side for k in (1, 2))
        assert abs(float(lengths.double().mean()) - mean) < 5.5 * ((square - mean**2) / len(lengths)) ** 0.5
    assert int(holes.sum((1, 2)).max()) == size**2


def test_augmentation_is_a_function_of_the_generator_and_writes_nothing() -> None:
    images = rows(64).inputs
    kept, ready = images.clone(), Augmentation(*mean_and_std(images))
    first, second, other = (ready(images, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and first.shape == images.shape and torch.equal(images, kept)
    assert (first == 0).any() and not (Augmentation(*mean_and_std(images), size=0)(images, generator(1)) == 0).any()


def test_without_a_generator_images_are_normalised_and_nothing_else() -> None:
    images = rows(64).inputs
    ready = Augmentation(*mean_and_std(images))(images, None).double()
    torch.testing.assert_close(ready.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(ready.var((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)
    flat = torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    assert Augmentation(*mean_and_std(flat))(flat, None).isfinite().all()
