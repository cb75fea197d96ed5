"""A model trains to the same losses on the compiled kernels and on the reference of the ops."""

from __future__ import annotations

import torch

import sprompt
from sprompt.data.sample import Sample
from sprompt.data.synthetic import scene
from sprompt.data.transforms import collate
from sprompt.masks import BitMasks
from sprompt.methods.saliency_prompt import Pretraining, SaliencyPromptConfig
from sprompt.models.knet import KNet, KNetConfig

SIZE = (64, 96)


def curve(steps: int = 6) -> list[float]:
    """Losses of a tiny K-Net in pre-training, with the objects of scenes as proposals."""
    torch.manual_seed(0)
    config = KNetConfig(
        depth=18, backbone_width=8, channels=32, kernels=12, num_classes=1, heads=2, feedforward=64, frozen_stages=4
    )
    task = Pretraining(KNet(config), SaliencyPromptConfig(dropout=0.3), seed=1).train()
    optimiser = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 1e-3)
    losses = []
    for step in range(steps):
        samples = []
        for i in (2 * step, 2 * step + 1):
            image, masks, labels = scene(3, i, SIZE)
            seeds = torch.tensor([[10.0 + 9 * k, 40.0, k % 3] for k in range(len(masks))]).reshape(-1, 3)
            samples.append(Sample(image, BitMasks.from_dense(masks), 0 * labels, i, str(i), SIZE, seeds))
        loss, _ = task(collate(samples), step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_the_loss_curve_does_not_depend_on_the_backend() -> None:
    native = curve()
    with sprompt.use_backend("reference"):
        reference = curve()
    torch.testing.assert_close(torch.tensor(native), torch.tensor(reference), rtol=1e-3, atol=0)
    assert native[-1] < native[0]
