"""Kernel supervision: the loss pulls the kernel matched to a proposal towards the feature vector of the proposal's seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear, normalize

from sprompt.data.sample import Batch
from sprompt.methods.saliency_prompt.config import ProposalConfig
from sprompt.methods.saliency_prompt.proposals import padded_size, valid_cells
from sprompt.methods.saliency_prompt.seeds import pooled_at, windows_at
from sprompt.models.protocol import Matched
from sprompt.nn.distributed import all_sum, world
from sprompt.seeding import generator


@torch.no_grad()
def seed_vectors(features: Tensor, batch: Batch, config: ProposalConfig) -> Tensor:
    """Vectors (B, G, D) of the seeds of a batch's proposals, from `features`, the backbone's map of the same batch."""
    if batch.seeds is None:
        raise ValueError(
            "kernel supervision: the batch must hold seeds, got none; train on a file of `sprompt propose`, or with kernel_weight 0"
        )
    features = features.float()
    points = batch.seeds[..., :2] / config.stride
    if config.seeds == "pyramid":
        return pooled_at(features, points, batch.seeds[..., 2])
    extent = torch.tensor([padded_size(size) for size in batch.sizes]).reshape(-1, 2) // config.stride
    valid = valid_cells(batch.sizes, (features.shape[2], features.shape[3]), config.stride)
    there = (part.to(features.device, non_blocking=True) for part in (extent, valid))  # without waiting for a GPU
    return windows_at(features, points, config.seeds, *there)


class Projection(nn.Module):
    """A linear map W s from the width of the backbone to the width of the kernels, of seeds s of norm 1. It is needed in
    training only.

    "linear" is trained, with a bias; "linear_nobias" is trained, without a bias. Both start as a random rotation.
    "frozen_orthogonal" keeps such a rotation. "pca" is fitted once, to all cells of the first batch over all processes: W holds
    the principal components of the centred cells, the strongest first. Its rows are 0 if the batch spans fewer directions.
    """

    weight: Tensor
    bias: Tensor | None
    fitted: Tensor

    def __init__(self, inputs: int, outputs: int, kind: str = "linear_nobias", seed: int = 0) -> None:
        super().__init__()
        self.kind = kind
        weight = torch.empty(outputs, inputs)
        nn.init.orthogonal_(weight, generator=generator(seed))
        bias = torch.zeros(outputs) if kind in ("linear", "pca") else None
        if kind in ("linear", "linear_nobias"):
            self.weight = nn.Parameter(weight)
            self.bias = None if bias is None else nn.Parameter(bias)
        else:
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)
        if kind == "pca":
            self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self._ready = kind != "pca"

    def forward(self, seeds: Tensor) -> Tensor:
        """Targets (..., C) of seed vectors (..., D), in float32."""
        with torch.autocast(seeds.device.type, enabled=False):
            return linear(normalize(seeds.float(), dim=-1, eps=1e-12), self.weight, self.bias)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Fits kind "pca" to the cells of (B, D, H, W). Does nothing for other kinds, or if it is fitted."""
        if self._ready:
            return
        if not bool(self.fitted):  # reading it waits for a GPU; _ready spares all steps but the first
            cells = normalize(features.detach().double().flatten(2), dim=1, eps=1e-12)
            number = all_sum(cells.new_tensor(cells.shape[0] * cells.shape[2]))
            mean = all_sum(cells.sum((0, 2))) / number
            centred = cells - mean[:, None]
            values, vectors = torch.linalg.eigh(all_sum(torch.einsum("bdp,bep->de", centred, centred)).cpu())
            axes = torch.where(values > 1e-9 * values.max(), vectors, 0).T.flip(0)[: self.weight.shape[0]]
            largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
            self.weight.zero_()[: len(axes)] = (axes * largest.sign()).to(self.weight)
            assert self.bias is not None
            self.bias.copy_(-(self.weight.double() @ mean.to(self.weight.device)))
            self.fitted.fill_(True)
        self._ready = True


def kernel_loss(
    targets: Tensor,
    matched: Sequence[Matched],
    counts: Tensor,
    *,
    reduction: str = "mean",
    release_pairing: bool = False,
) -> Tensor:
    """Σ over the stages of 1 − cos(target, matched kernel), as the mean or the sum over the pairs of the batch.

    The mean is over the pairs of all processes. Without pairs the loss and its gradients are 0.

    Args:
        targets: (B, G, C) projected seeds.
        matched: of each stage the kernels (B, N, C), and the index of the kernel of each target (B, G), -1 for none.
        counts: (B,), number of real targets of each image.
        release_pairing: pair the l-th matched kernel, by its index, with the l-th target, although it was matched to another.
    """
    real = torch.arange(targets.shape[1], device=targets.device) < counts[:, None]
    total = targets.new_zeros(())
    for kernels, rows in matched:
        paired = (rows >= 0) & real
        if release_pairing:
            behind = kernels.shape[1]
            rows = torch.where(paired, rows, behind).sort(1).values
            paired = rows < behind
        index = rows.clamp(0, kernels.shape[1] - 1)[..., None].expand(-1, -1, kernels.shape[2])
        distance = 1 - cosine_similarity(targets, kernels.float().gather(1, index), dim=-1, eps=1e-8)
        loss = torch.where(paired, distance, 0).sum()
        pairs = all_sum(paired.sum()).clamp(min=1) if reduction == "mean" else 1
        total = total + loss * world() / pairs  # times world, since gradients are averaged over processes
    return total


@torch.no_grad()
def target_cosine(targets: Tensor, counts: Tensor) -> Tensor:
    """Mean cosine of all pairs of real targets (B, G, C) of the batch, 0 without pairs. Near 1 the targets have collapsed."""
    real = torch.arange(targets.shape[1], device=targets.device) < counts[:, None]
    units = torch.where(real[..., None], normalize(targets.float(), dim=-1), 0)
    number = real.sum()
    squared = units.sum((0, 1)).square().sum() - units.square().sum()
    return squared / (number * (number - 1)).clamp(min=1)
