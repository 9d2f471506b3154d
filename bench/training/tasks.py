"""The tasks: data, a net, a loss, and what is measured on held-out rows.

A task is named data or data-net: mnist (a perceptron), mnist-cnn, digits, digits-cnn, mnist1d, text (a transformer),
diabetes (regression), segments (segmentation), long-tail (few rows of some classes), transfer (fine-tuning).
Invariant: the initial weights depend on the task and the seed alone, so they are the same for every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from .data import CLASSES, TEXT_LENGTH, all_rows, text_characters

WIDTH, CNN_WIDTH, TEXT_WIDTH = 64, 16, 32
PRETRAINING_STEPS = 300
TEMPERATURES = [5.0 ** (i / 12 - 1) for i in range(25)]

Measures = dict[str, float]


def mlp(inputs: int, outputs: int = CLASSES) -> nn.Module:
    """A perceptron of two hidden layers."""
    hidden = [nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(WIDTH, outputs))


def cnn(side: int) -> nn.Module:
    """A small convolutional net with GroupNorm for images of ``side`` × ``side``."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        return [convolution, nn.AvgPool2d(2), nn.GroupNorm(4, outputs), nn.ReLU()]

    rest, width = side // 4, CNN_WIDTH
    layers = [*block(1, width), *block(width, 2 * width), nn.Flatten(), nn.Linear(2 * width * rest * rest, CLASSES)]
    return nn.Sequential(*layers)


class Characters(nn.Module):
    """A transformer of one layer that reads characters and predicts at each the next one."""

    def __init__(self) -> None:
        super().__init__()
        letters = len(text_characters())
        self.letter, self.place = nn.Embedding(letters, TEXT_WIDTH), nn.Embedding(TEXT_LENGTH, TEXT_WIDTH)
        self.body = nn.TransformerEncoderLayer(
            TEXT_WIDTH, 4, 2 * TEXT_WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm, self.head = nn.LayerNorm(TEXT_WIDTH), nn.Linear(TEXT_WIDTH, letters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(TEXT_LENGTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next characters [n, letters, length]."""
        seen = self.body(self.letter(x) + self.place.weight, self.mask, is_causal=True)
        scores: Tensor = self.head(self.norm(seen)).transpose(1, 2)
        return scores


def segmenter() -> nn.Module:
    """Four convolutions that keep the size: scores of ground, disc and bar for each pixel."""

    def block(inputs: int, outputs: int, dilation: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation),
            nn.GroupNorm(2, outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(*block(1, 8, 1), *block(8, 8, 2), *block(8, 8, 4), nn.Conv2d(8, 3, 1))


def pretrained(seed: int) -> nn.Module:
    """The perceptron after training on the digits 0 to 4 alone, with a fresh last layer."""
    model = mlp(196)
    x, y = all_rows("mnist")
    x, y = x[y < 5], y[y < 5]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    for _ in range(PRETRAINING_STEPS):
        rows = torch.randint(0, len(x), (64,), generator=order)
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    torch.manual_seed(seed)
    last.reset_parameters()
    return model


def of_classes(outputs: Tensor, y: Tensor) -> Measures:
    """Accuracy in percent (all rows, mean over classes, worst class) and negative log likelihood (NLL) in nats.

    ``scaled nll``: at the best of 25 temperatures from 0.2 to 5, chosen on these rows: what is left of the NLL where a
    net's sureness is put right by hand.
    """
    right = (outputs.argmax(1) == y).double()
    by_class = [float(right[y == c].mean()) * 100 for c in range(outputs.shape[1]) if bool((y == c).any())]
    return {
        "accuracy": float(right.mean()) * 100,
        "nll": float(cross_entropy(outputs.double(), y)),
        "scaled nll": min(float(cross_entropy(outputs.double() / t, y)) for t in TEMPERATURES),
        "balanced accuracy": sum(by_class) / len(by_class),
        "worst class": min(by_class),
    }


def of_numbers(outputs: Tensor, y: Tensor) -> Measures:
    """Mean squared and mean absolute error."""
    return {"mse": float(mse_loss(outputs.double(), y.double())), "mae": float((outputs - y).double().abs().mean())}


def of_masks(outputs: Tensor, y: Tensor) -> Measures:
    """Mean over the classes of intersection over union, in percent, and accuracy of the pixels."""
    found = outputs.argmax(1)
    shares = [float(((found == c) & (y == c)).sum() / ((found == c) | (y == c)).sum().clamp(min=1)) for c in range(3)]
    return {
        "iou": 100 * sum(shares) / len(shares),
        "accuracy": float((found == y).double().mean()) * 100,
        "nll": float(cross_entropy(outputs.double(), y)),
    }


@dataclass(frozen=True)
class Task:
    """``metric`` is the measure that decides; ``higher`` says whether more of it is better.

    ``rate`` scales the learning rates of a search: outliers of a squared error make large gradients.
    """

    data: str
    network: Callable[[], nn.Module]
    epochs: int
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    measures: Callable[[Tensor, Tensor], Measures] = of_classes
    metric: str = "accuracy"
    higher: bool = True
    batch: int = 64
    rate: float = 1.0
    start: Callable[[int], nn.Module] | None = None

    def initial(self, seed: int) -> nn.Module:
        """The net with the initial weights of ``seed``."""
        torch.manual_seed(seed)
        return self.start(seed) if self.start is not None else self.network()

    def measure(self, model: nn.Module, x: Tensor, y: Tensor) -> Measures:
        """What is measured, in evaluation mode."""
        model.eval()
        with torch.no_grad():
            found = self.measures(model(x), y)
        model.train()
        return found


MNIST = Task("mnist", lambda: mlp(196), 40)
TASKS: dict[str, Task] = {
    "mnist": MNIST,
    "mnist-cnn": replace(MNIST, network=lambda: cnn(14)),
    "digits": Task("digits", lambda: mlp(64), 40),
    "digits-cnn": Task("digits", lambda: cnn(8), 40),
    "mnist1d": Task("mnist1d", lambda: mlp(40), 40),
    "text": Task("text", Characters, 12, batch=16),
    "diabetes": Task("diabetes", lambda: mlp(10, 1), 60, mse_loss, of_numbers, "mse", higher=False, batch=32, rate=0.2),
    "segments": Task("segments", segmenter, 20, cross_entropy, of_masks, "iou", batch=16),
    "long-tail": replace(MNIST, data="long-tail", metric="balanced accuracy"),
    "transfer": replace(MNIST, data="transfer", start=pretrained),
}
