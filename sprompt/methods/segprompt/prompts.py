"""The prompts of the categories: means of extracted vectors, which follow the training slowly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sprompt.nn.distributed import all_sum


class PromptCache(nn.Module):
    """One vector for each category; zero before its first object. All processes hold the same vectors."""

    prompts: Tensor  # (V, C) float32
    seen: Tensor  # (V,) bool: categories that had an object

    def __init__(self, categories: int, channels: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("prompts", torch.zeros(categories, channels))
        self.register_buffer("seen", torch.zeros(categories, dtype=torch.bool))

    @torch.no_grad()
    def update(self, vectors: Tensor, labels: Tensor, real: Tensor) -> None:
        """Takes in vectors (B, M, C) of categories labels (B, M); `real`, bool (B, M), says which of them count.

        The mean vector of a category, over all processes, is its prompt if it had none before. Otherwise the prompt goes to
        momentum · prompt + (1 − momentum) · mean.
        """
        weight = real.to(torch.float32)[..., None]
        shares = torch.cat([torch.where(real[..., None], vectors.detach().float(), 0), weight], 2).flatten(0, 1)
        categories = len(self.prompts)
        member = (labels.flatten() == torch.arange(categories, device=labels.device)[:, None]).float()
        # A matrix product, since sums by scattering differ from run to run on a GPU.
        with torch.autocast(vectors.device.type, enabled=False):
            sums = all_sum(member @ shares)
        number = sums[:, -1:]
        mean = sums[:, :-1] / number.clamp(min=1)
        followed = torch.where(self.seen[:, None], self.prompts.lerp(mean, 1 - self.momentum), mean)
        self.prompts.copy_(torch.where(number > 0, followed, self.prompts))
        self.seen |= number[:, 0] > 0
