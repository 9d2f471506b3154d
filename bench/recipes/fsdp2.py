"""fully_shard (FSDP2): each process holds half of every parameter; a clip of the aggregate; a sharded checkpoint.

torchrun --nproc-per-node 2 bench/recipes/fsdp2.py

A fresh model and optimizer go on from the checkpoint with the bits of those that never stopped.
"""

import shutil
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh("cpu", (size,))
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images / 16, dtype=torch.float32)[:1792][rank::size]  # this rank's rows
y = torch.tensor(labels)[:1792][rank::size]


def build(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model, TSAM(
        model.parameters(), torch.optim.AdamW, lr=0.01, num_samples=3, radius=1.0, tilt=20.0, model=model
    )


def train(model, optimizer, steps):
    def closure():
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(optimizer.estimate_gradient(closure).item())  # the mean over all ranks
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.5)  # of the whole gradient
        optimizer.apply()
    return losses


model, optimizer = build(0)
losses = train(model, optimizer, 20)
shared = [tempfile.mkdtemp() if rank == 0 else None]
dist.broadcast_object_list(shared)
weights, state = get_state_dict(model, optimizer)
dcp.save({"weights": weights, "state": state}, checkpoint_id=shared[0])

resumed, its_optimizer = build(1)
weights, state = get_state_dict(resumed, its_optimizer)
kept = {"weights": weights, "state": state}
dcp.load(kept, checkpoint_id=shared[0])  # into the tensors that are there
set_state_dict(resumed, its_optimizer, model_state_dict=kept["weights"], optim_state_dict=kept["state"])

losses += train(model, optimizer, 20)
again = train(resumed, its_optimizer, 20)
pairs = zip(model.parameters(), resumed.parameters(), strict=True)
same = all(torch.equal(p.to_local(), q.to_local()) for p, q in pairs)
everywhere = [None] * size
dist.all_gather_object(everywhere, (same, losses))
if rank == 0:
    shutil.rmtree(shared[0])
    same = all(mine and its == losses for mine, its in everywhere)
    print(f"loss {losses[0]:.6f} -> {losses[-1]:.6f}, resumed {again[-1]:.6f}, {size} ranks, same weights: {same}")
dist.destroy_process_group()
