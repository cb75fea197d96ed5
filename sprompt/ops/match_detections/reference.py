"""match_detections in plain PyTorch: one detection after the other, with all lists and thresholds at once."""

import torch
from torch import Tensor

from sprompt.ops.declare import Args


def match_detections(a: Args) -> Tensor:
    """A match is the last of the largest scores. The score of a target is its IoU, or -inf where it cannot be taken."""
    D, G = a.iou.shape[-2:]
    none = a.iou.new_zeros((*a.iou.shape[:-2], G), dtype=torch.bool)
    crowd = none if a.crowd is None else a.crowd
    ignored = crowd if a.ignored is None else a.ignored | crowd
    least = torch.where(a.thresholds > 1 - 1e-10, 1 - 1e-10, a.thresholds)[:, None]
    free = ~none[..., None, :].repeat_interleave(len(least), -2)  # (..., T, G)
    match = []
    for d in range(D):
        iou = a.iou[..., d, None, :]
        open_ = (free | crowd[..., None, :]) & (iou >= least)
        real = open_ & ~ignored[..., None, :]
        target = torch.where(real.any(-1), _last_largest(iou, real), _last_largest(iou, open_))
        free = free & (torch.arange(G, device=iou.device) != target[..., None])
        match.append(target)
    return torch.stack(match, -1) if match else a.iou.new_zeros((*free.shape[:-1], 0), dtype=torch.int64)


def _last_largest(iou: Tensor, among: Tensor) -> Tensor:
    """int64 (..., T): the last target of largest IoU among some targets (..., T, G), -1 where there are none."""
    if among.shape[-1] == 0:
        return among.sum(-1) - 1
    score = torch.where(among, iou, -torch.inf)
    place = torch.arange(among.shape[-1], device=among.device)
    return torch.where(among & (score == score.amax(-1, keepdim=True)), place, -1).amax(-1)
