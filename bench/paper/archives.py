"""Images as they are shipped, read into memory: CIFAR's official pickles, packed or not, and folders of image files.

Layout: images uint8 [n, 3, side, side], labels int64 [n]. A CIFAR file is a dict with b"data" uint8 [n, 3072] and a
list of labels, pickled by Python 2 (A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).
Invariant: a pickle may name NumPy's arrays and nothing else, so that reading runs no code; nothing is unpacked to disk.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .task import Rows

SIDE = 32
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
# What numpy pickles an array as; the first is private, and has moved between NumPy's modules.
ALLOWED = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}
MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")


@dataclass(frozen=True)
class Archive:
    """The names inside an official archive, and its sizes."""

    file: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    classes: int
    rows: tuple[int, int] = (50_000, 10_000)


CIFAR = {
    "cifar10": Archive(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        b"labels",
        10,
    ),
    "cifar100": Archive("cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test", b"fine_labels", 100),
}


class ArraysOnly(pickle.Unpickler):
    """Bytes, numbers, lists, dicts and NumPy arrays; anything else that a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """The three names that an array is made of."""
        if module not in MODULES or name not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, expected arrays, bytes, lists and dicts alone")
        return ALLOWED[name]


def read_cifar(root: Path, name: str) -> tuple[Rows, Rows]:
    """Training and test rows of ``cifar10`` or ``cifar100``.

    ``root`` is the archive, the folder that holds it, the folder in which it was unpacked, or the unpacked folder.

    Raises:
        FileNotFoundError: if none of these is there, or a file is missing in it.
        ValueError: if a file is no such pickle, or its shapes or labels are wrong, naming the file.
    """
    archive = CIFAR[name]
    found: dict[str, bytes] = {}
    unpacked = [folder for folder in (root / archive.folder, root) if (folder / archive.test).is_file()]
    packed = [file for file in (root / archive.file, root) if file.is_file()]
    names = (*archive.train, archive.test)
    if unpacked:
        found = {part: (unpacked[0] / part).read_bytes() for part in names if (unpacked[0] / part).is_file()}
    elif packed:
        try:
            with tarfile.open(packed[0]) as tar:
                for member in tar:
                    folder, _, part = member.name.removeprefix("./").rpartition("/")
                    if folder == archive.folder and part in names and (file := tar.extractfile(member)) is not None:
                        found[part] = file.read()
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{packed[0]}: no readable tar archive ({error})") from error
    else:
        raise FileNotFoundError(f"--root: got {root}, expected {archive.file} or {archive.folder} in it")
    for part in names:
        if part not in found:
            raise FileNotFoundError(f"--root: {part} is missing in {(unpacked or packed)[0]}")
    parts = [_rows(found[part], part, archive) for part in names]
    train = Rows(torch.cat([p.inputs for p in parts[:-1]]), torch.cat([p.labels for p in parts[:-1]]))
    return train, parts[-1]


def _rows(text: bytes, part: str, archive: Archive) -> Rows:
    """One file's rows, checked."""
    try:
        found = ArraysOnly(io.BytesIO(text), encoding="bytes").load()
    except Exception as error:  # a broken pickle may raise nearly anything
        raise ValueError(f"{part}: {error}") from error
    if not isinstance(found, dict) or not {b"data", archive.labels} <= found.keys():
        keys = sorted(map(repr, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{part}: got {keys}, expected a dict with b'data' and {archive.labels!r}")
    data, labels = found[b"data"], found[archive.labels]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * SIDE**2:
        came = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{part}: b'data': got {came}, expected uint8 [n, {3 * SIDE**2}]")
    if not isinstance(labels, list) or len(labels) != len(data):
        came = f"{len(labels)} labels" if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"{part}: {archive.labels!r}: got {came}, expected a list of {len(data)}, one for each image")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < archive.classes]
    if wrong:
        wanted = f"whole numbers below {archive.classes}"
        raise ValueError(f"{part}: {archive.labels!r}: got {wrong[0]!r} among them, expected {wanted}")
    images = torch.from_numpy(np.array(data)).view(-1, 3, SIDE, SIDE)  # a copy: a pickled array lies in its bytes
    return Rows(images, torch.tensor(labels, dtype=torch.int64))


def write_cifar(root: Path, name: str, train: Rows, test: Rows) -> Path:
    """An archive of the official form with these rows; returns its path. For tests and ``--quick``."""
    archive = CIFAR[name]
    path = root / archive.file
    parts = [train.take(index) for index in torch.arange(len(train)).tensor_split(len(archive.train))]
    with tarfile.open(path, "w:gz") as tar:
        for part, rows in zip((*archive.train, archive.test), (*parts, test), strict=True):
            data = np.ascontiguousarray(rows.inputs.flatten(1).numpy())
            text = b"\x80\x02" + python2({b"data": data, archive.labels: rows.labels.tolist()}) + b"."
            entry = tarfile.TarInfo(f"{archive.folder}/{part}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return path


def python2(value: Any) -> bytes:
    """A value as Python 2 pickles it (protocol 2, without header and stop): its strings are bytes, also in arrays."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(python2, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(one) for key, one in value.items()) + b"u"
    kind = value.dtype.str[1:].encode()
    dtype = b"cnumpy\ndtype\n" + python2((kind, 0, 1)) + b"R" + python2((3, b"|", None, None, None, -1, -1, 0)) + b"b"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + python2((0,)) + python2(b"b") + b"tR"
    return empty + b"(" + python2(1) + python2(value.shape) + dtype + python2(False) + python2(value.tobytes()) + b"tb"


def read_folder(root: Path, side: int | None = None) -> tuple[Rows, Rows, list[str]]:
    """Training rows, test rows and class names of folders of image files, RGB.

    Training images lie in train/CLASS, at any depth (Tiny-ImageNet: train/CLASS/images). Test images lie in val, or in
    test where there is no val: also in a folder for each class, or all in val/images, with val/val_annotations.txt
    (lines: file, class, and more, by tabs). ``side``: images are fitted to it; ``None``: all have the first one's.

    Raises:
        FileNotFoundError: if a folder or an image is missing.
        ValueError: if an image is not readable or not of the first one's size, or a class is unknown, naming the file.
    """
    held = next((folder for folder in (root / "val", root / "test") if folder.is_dir()), None)
    if not (root / "train").is_dir() or held is None:
        raise FileNotFoundError(f"--root: got {root}, expected the folders train and val (or test) in it")
    classes = sorted(folder.name for folder in (root / "train").iterdir() if folder.is_dir())
    notes = held / "val_annotations.txt"
    if notes.is_file():
        words = [line.split("\t") for line in notes.read_text().splitlines() if line]
        tested = [(held / "images" / line[0], line[1] if len(line) > 1 else "") for line in words]
    else:
        tested = _in_class_folders(held, sorted(folder.name for folder in held.iterdir() if folder.is_dir()))
    trained = _in_class_folders(root / "train", classes)
    for path, name in tested:
        if name not in classes:
            raise ValueError(f"{path}: got the class {name!r}, expected one of the {len(classes)} folders of train")
    if not trained or not tested:
        raise FileNotFoundError(
            f"--root: got {len(trained)} images in train, {len(tested)} in {held.name}, expected some"
        )
    train, test = (_load(files, classes, side, trained[0][0]) for files in (trained, tested))
    return train, test, classes


def _in_class_folders(folder: Path, classes: Sequence[str]) -> list[tuple[Path, str]]:
    found = [(sorted((folder / name).rglob("*")), name) for name in classes]
    return [(path, name) for paths, name in found for path in paths if path.suffix.lower() in SUFFIXES]


def _load(files: Sequence[tuple[Path, str]], classes: Sequence[str], side: int | None, first: Path) -> Rows:
    numbers = {name: i for i, name in enumerate(classes)}
    shape = _image(first, side).shape
    images = np.empty((len(files), *shape), np.uint8)
    for place, (path, _) in zip(images, files, strict=True):
        image = _image(path, side)
        if image.shape != shape:
            came, wanted = (f"{one[1]} × {one[0]}" for one in (image.shape, shape))
            raise ValueError(f"{path}: got {came}, expected {wanted}, as the first image; --side N fits all")
        place[:] = image
    labels = torch.tensor([numbers[name] for _, name in files])
    return Rows(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)


def _image(path: Path, side: int | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [side, side, 3], RGB; None: [height, width, 3], as it is."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: no readable image") from error
    return np.asarray(image if side is None else ImageOps.fit(image, (side, side)))
