"""A split batch: each sample sees a part of the rows, so a step costs what two gradients of the whole batch cost."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = torch.nn.Linear(64, 10)
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=0.5, num_samples=4, batch="split", seed=0)


def closure():
    part_x, part_y = optimizer.part(x, y)
    loss = cross_entropy(model(part_x), part_y)
    loss.backward()
    return loss


losses = []
for _ in range(20):
    optimizer.zero_grad()
    losses.append(optimizer.step(closure).item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
