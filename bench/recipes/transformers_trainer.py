"""transformers' Trainer: microbatches, its own clip on the aggregate, and a resumed run with the same bits.

training_step collects the microbatches; at the last it makes the estimate, and the Trainer clips and steps.
"""

import tempfile

import torch
import transformers
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM


class Digits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(64, 10))

    def forward(self, x, labels):
        return {"loss": cross_entropy(self.net(x), labels)}


class Trainer(transformers.Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts, self.losses = [], []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.parts.append(inputs)
        if not self.accelerator.sync_gradients:  # the last microbatch speaks for all
            return torch.zeros((), device=self.args.device)
        one = super().training_step  # backward too, and divides by the number of microbatches
        tsam = self.optimizer.optimizer
        loss = tsam.estimate_gradient(lambda: sum(one(model, part, num_items_in_batch) for part in self.parts))
        self.losses.append(loss.item())
        self.parts = []
        return loss


def train(folder, resume=None):
    torch.manual_seed(0)
    model = Digits()
    options = {"max_steps": 20, "save_steps": 10, "max_grad_norm": 0.2, "gradient_accumulation_steps": 4}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "logging_strategy": "no"}
    batches = {"per_device_train_batch_size": 112, "lr_scheduler_type": "constant"}
    arguments = transformers.TrainingArguments(folder, **batches, **options, **quiet)
    optimizer = TSAM(
        model.parameters(),
        torch.optim.SGD,
        lr=1.0,
        momentum=0.5,
        num_samples=3,
        radius=1.0,
        tilt=20.0,
        seed=None if resume else 0,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


images, labels = load_digits(return_X_y=True)
rows = [{"x": torch.tensor(x / 16, dtype=torch.float32), "labels": int(y)} for x, y in zip(images, labels, strict=True)]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(folder)
        resumed = train(folder, f"{folder}/checkpoint-10")
    losses = trainer.losses
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, resumed {resumed.losses[-1]:.6f}, was {losses[-1]:.6f}")
