"""Training of Mask Auto-Labeler: a network that finds the mask of an object learns from boxes alone.

The student is trained by two losses. Its mask must reach every row and column of the box, and none outside (`projection_loss`). And it
must equal a refined mask: the mean of the masks of student and teacher, moved to the edges of colours inside of the box (`mean_field`).
The teacher's weights follow the student's slowly.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sprompt.masks import BitMasks
from sprompt.methods.auto_labeler.config import AutoLabelerConfig
from sprompt.methods.auto_labeler.samples import CropBatch
from sprompt.nn.mask_labeler import MASK_STRIDE, MaskLabeler
from sprompt.ops import mean_field, projection_loss

_SMOOTH = 0.002  # in the denominator of dice


class AutoLabeler(nn.Module):
    """(batch, step) -> (loss, values to log). The result of training is `student`.

    Args:
        accumulate: micro-batches of a step of the optimiser, which `step` counts.
    """

    def __init__(self, network: MaskLabeler, config: AutoLabelerConfig, accumulate: int = 1) -> None:
        super().__init__()
        self.config = config
        self.accumulate = accumulate
        self.student = network
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> AutoLabeler:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: CropBatch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """In training the teacher takes in the student's last step first."""
        done, part = divmod(step, self.accumulate)
        if self.training and part == 0 and done > 0:
            self._follow()
        logits = self.student(batch.student, batch.classes)
        with torch.no_grad():
            taught = self.teacher(batch.teacher, batch.classes).sigmoid()
        with torch.autocast(logits.device.type, enabled=False):
            masks = logits.sigmoid()
            refined = self._refined(batch, masks.detach(), taught)
            box_weight, refined_weight = self.weights(batch.epoch, done)
            terms = {
                "mil": box_weight * projection_loss(masks, batch.boxes).mean(),
                "crf": refined_weight * dice_loss(masks, refined.to_dense(torch.float32)).mean(),
            }
        logs = {name: term.detach() for name, term in terms.items()}
        inside = batch.boxes.sum()
        logs["monitor/foreground"] = masks.detach().sum() / inside
        logs["monitor/refined"] = refined.area().sum() / inside
        return terms["mil"] + terms["crf"], logs

    def weights(self, epoch: int, step: int) -> tuple[float, float]:
        """The weights of the two losses in a step. In the first epoch they rise."""
        config = self.config
        ramps = [1.0 if epoch or step >= ramp else step / ramp for ramp in (config.mil_ramp, config.crf_ramp)]
        return config.mil_weight * ramps[0], config.crf_weight * ramps[1]

    @torch.no_grad()
    def _refined(self, batch: CropBatch, masks: Tensor, taught: Tensor) -> BitMasks:
        """The refined masks (B,), by the colours that the student sees."""
        config = self.config
        return mean_field(
            sampled(batch.student), (masks + taught) / 2, batch.boxes,
            iterations=config.iterations, scale=config.scale, low=config.low, high=config.high,
        )  # fmt: skip

    @torch.no_grad()
    def _follow(self) -> None:
        """teacher = m · teacher + (1 − m) · student, for all weights. Running statistics of a ResNet never change."""
        old, new = ([weight.data for weight in network.parameters()] for network in (self.teacher, self.student))
        torch._foreach_lerp_(old, new, 1 - self.config.momentum)


def sampled(crops: Tensor) -> Tensor:
    """Crops (..., S, S) resized bilinearly to S/4, without antialias, so that texture counts. A value is the mean of the four pixels in the
    middle of a cell of 4 × 4; strided reads take a fifth of the time of `interpolate`."""
    low, high = MASK_STRIDE // 2 - 1, MASK_STRIDE // 2
    above, below = crops[..., low::MASK_STRIDE, :], crops[..., high::MASK_STRIDE, :]
    four = (x[..., start::MASK_STRIDE] for x in (above, below) for start in (low, high))
    return torch.stack(tuple(four)).mean(0)


def dice_loss(masks: Tensor, labels: Tensor) -> Tensor:
    """1 − 2 Σ m l / (Σ m² + Σ l² + 0.002) of each pair of maps (B, h, w): (B,)."""
    masks, labels = masks.flatten(1), labels.flatten(1)
    return 1 - 2 * (masks * labels).sum(1) / (masks.square().sum(1) + labels.square().sum(1) + _SMOOTH)
