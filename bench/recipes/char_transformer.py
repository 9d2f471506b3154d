"""A transformer that learns the next character of Python's help pages, with AdamW and dropout.

All passes of a step drop the same units, as the random generators go back before each.
"""

from pydoc_data.topics import topics

import torch
from torch.nn.functional import cross_entropy

from tsam_ext import TSAM

torch.manual_seed(0)
text = "".join(topics[name] for name in sorted(topics))
letters = sorted(set(text))
data = torch.tensor([letters.index(letter) for letter in text[:100_000]])
LENGTH, WIDTH = 32, 32


class Characters(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.letter, self.place = torch.nn.Embedding(len(letters), WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.body = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, len(letters))
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x):
        return self.head(self.body(self.letter(x) + self.place.weight, mask=self.mask, is_causal=True))


model = Characters()
optimizer = TSAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.05, num_samples=3, radius=1.0, tilt=20.0, seed=0)
losses = []
for _ in range(60):
    starts = torch.randint(len(data) - LENGTH, (16, 1))
    rows = data[starts + torch.arange(LENGTH + 1)]

    def closure():
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        return loss

    losses.append(optimizer.step(closure).item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
