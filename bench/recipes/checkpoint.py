"""Save and resume: the resumed run goes on with the same noise, and ends at the same weights, bit for bit."""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def build(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(64, 10)
    return model, TSAM(model.parameters(), torch.optim.SGD, lr=0.5, momentum=0.9, num_samples=3, radius=1.0, tilt=20.0)


def train(model, optimizer, steps):
    def closure():
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.zero_grad()
        loss = optimizer.step(closure)
    return loss.item()


model, optimizer = build(0)
train(model, optimizer, 5)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    kept = torch.load(path)

resumed, its_optimizer = build(1)
resumed.load_state_dict(kept["model"])
its_optimizer.load_state_dict(kept["optimizer"])
print(f"loss {train(model, optimizer, 5):.6f}, resumed {train(resumed, its_optimizer, 5):.6f}")
