"""BatchNorm: model=model makes the running statistics move as in one forward pass, though a step runs several."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=0.5, model=model, seed=0)


def closure():
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss


losses = []
for _ in range(20):
    optimizer.zero_grad()
    losses.append(optimizer.step(closure).item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, statistics moved {int(model[1].num_batches_tracked)} times")
