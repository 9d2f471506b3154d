"""A convolutional net with BatchNorm: model=model makes the running statistics move once a step, not once a pass."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)[:512], torch.tensor(labels)[:512]
convolution = torch.nn.Conv2d(1, 8, 3, stride=2, bias=False)
norm = torch.nn.BatchNorm2d(8)
model = torch.nn.Sequential(convolution, norm, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(72, 10))
optimizer = TSAM(model.parameters(), torch.optim.SGD, lr=0.5, model=model, num_samples=3, radius=1.0, tilt=20.0, seed=0)


def closure():
    loss = cross_entropy(model(x), y)
    loss.backward()
    return loss


losses = []
for _ in range(20):
    optimizer.zero_grad()
    losses.append(optimizer.step(closure).item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, statistics moved {int(norm.num_batches_tracked)} times")
