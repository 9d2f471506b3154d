"""Accelerate over two processes: each has half of the rows of every microbatch; the clip is of the aggregate.

torchrun --nproc-per-node 2 bench/recipes/accelerate_ddp.py

prepare() puts the model into DistributedDataParallel, which TSAM finds when its forward runs.
With any number of processes a step sees the same 128 rows.
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from tsam_ext import TSAM

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32)[:1792], torch.tensor(labels)[:1792])
# The batch size counts the rows of all processes, and the order is the same for any number of them.
shared = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=shared)
net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = TSAM(net.parameters(), torch.optim.SGD, lr=0.5, momentum=0.5, num_samples=3, radius=1.0, tilt=20.0, seed=0)
model, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(digits, batch_size=64, shuffle=True))


def closure():
    total = 0.0
    for i, (x, y) in enumerate(parts, start=1):
        with nullcontext() if i == len(parts) else accelerator.no_sync(model):  # one reduction for all
            loss = cross_entropy(model(x), y)
            accelerator.backward(loss)  # divides by gradient_accumulation_steps
        total += loss.detach() / len(parts)
    return total


losses, parts = [], []
for _ in range(4):
    for batch in loader:
        with accelerator.accumulate(model):
            parts.append(batch)
            if accelerator.sync_gradients:
                losses.append(optimizer.optimizer.estimate_gradient(closure).item())  # the mean over all processes
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                parts.clear()

weights = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
size = accelerator.num_processes
same = bool((accelerator.gather(weights).reshape(size, -1) == weights).all())
accelerator.print(f"loss {losses[0]:.6f} -> {losses[-1]:.6f}, {size} ranks, same weights: {same}")
accelerator.end_training()
