"""A batch in microbatches: accumulate inside the closure, so that every pass sees the whole batch."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = torch.nn.Linear(64, 10)
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=0.5, num_samples=3, radius=1.0, tilt=20.0, seed=0)


def closure():
    total = 0.0
    for part_x, part_y in zip(x.split(512), y.split(512), strict=True):
        loss = cross_entropy(model(part_x), part_y, reduction="sum") / len(x)
        loss.backward()
        total += loss.detach()
    return total


losses = []
for _ in range(20):
    optimizer.zero_grad()
    losses.append(optimizer.step(closure).item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
