"""A plain loop over a DataLoader, with a learning-rate schedule: only the closure is new."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
loader = DataLoader(digits, batch_size=128, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = TSAM(
    model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, num_samples=3, radius=1.0, tilt=20.0, seed=0
)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)

for epoch in range(3):
    for x, y in loader:

        def closure():
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.zero_grad()
        loss = optimizer.step(closure)
    scheduler.step()
    accuracy = (model(digits.tensors[0]).argmax(1) == digits.tensors[1]).float().mean()
    print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.1%}, ess {optimizer.diagnostics.ess:.2f} of 3")
