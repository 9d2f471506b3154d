"""DistributedDataParallel: two processes, each with half of the rows, take the steps of one process with all of them.

torchrun --nproc-per-node 2 bench/recipes/ddp.py

With any number of processes a step sees the same 128 rows, and so the losses are the same.
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tsam_ext import TSAM

dist.init_process_group("gloo")
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32)[:1792], torch.tensor(labels)[:1792])
sampler = DistributedSampler(digits, shuffle=True, seed=0)
loader = DataLoader(digits, batch_size=128 // dist.get_world_size(), sampler=sampler)
net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
model = DistributedDataParallel(net)
optimizer = TSAM(
    model.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9, num_samples=3, radius=1.0, tilt=20.0, seed=0, model=model
)

losses = []
for epoch in range(3):
    sampler.set_epoch(epoch)
    for x, y in loader:

        def closure():
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.zero_grad()
        losses.append(optimizer.step(closure).item())  # the mean over all ranks

weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
of_all = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
dist.all_gather(of_all, weights)
if dist.get_rank() == 0:
    same = all(torch.equal(weights, other) for other in of_all)
    print(f"loss {losses[0]:.6f} -> {losses[-1]:.6f}, {len(of_all)} ranks, same weights: {same}")
model = optimizer = closure = None  # torch may abort at exit where a DistributedDataParallel outlives its group
dist.destroy_process_group()
