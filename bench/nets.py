"""The models whose parameter lists are timed, and the batches that whole steps run on: plain torch.nn, random weights.

ResNet-18 (He et al., CVPR 2016), WRN-16-8 (Zagoruyko and Komodakis, BMVC 2016; CIFAR size), ViT-B/16 (Dosovitskiy et
al., ICLR 2021), DistilBERT-base with a classifier (Sanh et al., 2019), and an MLP of 60 narrow layers. Two larger nets
are never built, only the sizes of their parameters are told.
Layout: inputs float32 [n, 3, side, side], token numbers int64 [n, 128], or float32 [n, 64]; outputs [n, classes].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

WORDS = 30_522  # DistilBERT's vocabulary
LENGTH = 128


class Basic(nn.Module):
    """A residual block of two 3×3 convolutions; ``first_norm``: norm and ReLU come before them (WRN), else after."""

    def __init__(self, inputs: int, outputs: int, stride: int, first_norm: bool) -> None:
        super().__init__()
        self.first_norm = first_norm
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(inputs if first_norm else outputs)
        self.norm_two = nn.BatchNorm2d(outputs)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None
        self.shortcut_norm = nn.BatchNorm2d(outputs) if changes and not first_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        if self.first_norm:
            inside = relu(self.norm_one(x))
            short = x if self.shortcut is None else self.shortcut(inside)
            result: Tensor = short + self.two(relu(self.norm_two(self.one(inside))))
            return result
        short = x if self.shortcut is None or self.shortcut_norm is None else self.shortcut_norm(self.shortcut(x))
        return relu(short + self.norm_two(self.two(relu(self.norm_one(self.one(x))))))


def resnet18(classes: int = 1000, *, small: bool = False, width: int = 64) -> nn.Module:
    """62 tensors, 11.7 M parameters, images of 224 × 224; ``small``: CIFAR's form, its stem one 3×3 convolution."""
    stem = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small else nn.Conv2d(3, width, 7, 2, 3, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    layers += [] if small else [nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Basic(inputs, outputs, stride, False), Basic(outputs, outputs, 1, False)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def wrn16_8(classes: int = 10) -> nn.Module:
    """44 tensors, 11.0 M parameters, images of 32 × 32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    inputs = 16
    for outputs, stride in ((128, 1), (256, 2), (512, 2)):
        layers += [Basic(inputs, outputs, stride, True), Basic(outputs, outputs, 1, True)]
        inputs = outputs
    layers += [nn.BatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)]
    return nn.Sequential(*layers)


class Transformer(nn.Module):
    """An encoder; what comes before it and its classifier are given."""

    def __init__(self, depth: int, width: int, heads: int, first_norm: bool, length: int, classes: int) -> None:
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        kind = {"activation": "gelu", "batch_first": True, "norm_first": first_norm}
        blocks = [nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, **kind) for _ in range(depth)]  # type: ignore[arg-type]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def encode(self, tokens: Tensor) -> Tensor:
        """[n, length, width] to [n, classes]."""
        result: Tensor = self.head(self.norm(self.blocks(tokens + self.position))[:, 0])
        return result


class VisionTransformer(Transformer):
    """152 tensors, 86.6 M parameters, images of 224 × 224."""

    def __init__(self) -> None:
        super().__init__(12, 768, 12, True, 197, 1000)
        self.patches = nn.Conv2d(3, 768, 16, 16)
        self.first = nn.Parameter(torch.zeros(1, 1, 768))

    def forward(self, x: Tensor) -> Tensor:
        """Images to classes."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return self.encode(torch.cat([self.first.expand(len(x), -1, -1), patches], 1))


class DistilBert(Transformer):
    """78 tensors, 66.1 M parameters, 128 tokens."""

    def __init__(self) -> None:
        super().__init__(6, 768, 12, False, LENGTH, 2)
        self.words = nn.Embedding(WORDS, 768)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers to classes."""
        return self.encode(self.words(tokens))


def small_mlp() -> nn.Module:
    """120 tensors, 0.22 M parameters, rows of 60: what a list costs where its elements cost nothing."""
    layers: list[nn.Module] = []
    for _ in range(59):
        layers += [nn.Linear(60, 60), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(60, 10))


def resnet50_sizes() -> tuple[int, ...]:
    """Elements of each parameter, in order (He et al., CVPR 2016): 25,557,032 in all."""
    sizes, inputs = [64 * 3 * 49, 64, 64], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for convolution, outputs in ((inputs * width, width), (9 * width**2, width), (4 * width**2, 4 * width)):
                sizes += [convolution, outputs, outputs]
            sizes += [] if block else [inputs * 4 * width, 4 * width, 4 * width]
            inputs = 4 * width
    return (*sizes, inputs * 1000, 1000)


def transformer_sizes() -> tuple[int, ...]:
    """Elements of each parameter, in order (LLaMA 7B, Touvron et al., 2023): 6,738,415,616 in all."""
    words, width, inner = 32_000, 4096, 11_008
    block = [*[width**2] * 4, *[width * inner] * 3, width, width]
    return (words * width, *block * 32, width, words * width)


@dataclass(frozen=True)
class Model:
    """A model by name: how it is built, and the shape of one input (None: tokens)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | None
    classes: int

    def shapes(self) -> list[torch.Size]:
        """The shapes of its parameters; nothing is allocated."""
        with torch.device("meta"):
            return [p.shape for p in self.build().parameters()]

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """Random inputs and labels."""
        generator = torch.Generator().manual_seed(3)
        labels = torch.randint(0, self.classes, (rows,), generator=generator)
        if self.shape is None:
            return torch.randint(0, WORDS, (rows, LENGTH), generator=generator), labels
        return torch.randn(rows, *self.shape, generator=generator), labels


NETS = {
    "mlp": Model(small_mlp, (60,), 10),
    "resnet18": Model(resnet18, (3, 224, 224), 1000),
    "wrn16-8": Model(wrn16_8, (3, 32, 32), 10),
    "vit-b16": Model(VisionTransformer, (3, 224, 224), 1000),
    "distilbert": Model(DistilBert, None, 2),
}
