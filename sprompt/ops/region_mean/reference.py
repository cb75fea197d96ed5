"""region_mean and mask_mean in plain PyTorch. Sums are in float32 (float64 for float64)."""

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.masks.reference import unpack
from sprompt.ops.region_mean.op import check_boxes


def box_cells(boxes: Tensor, height: int, width: int) -> Tensor:
    """The cells that a box covers, bool (B, L, H, W): from floor to ceil, at least one cell. Boxes outside are moved to the
    edge."""
    inside = []
    for axis, size in ((1, height), (0, width)):
        low, high = boxes[..., axis].double(), boxes[..., axis + 2].double()
        low = torch.nan_to_num(low, nan=0.0).floor().clamp(0, max(size - 1, 0))
        high = torch.nan_to_num(high, nan=0.0).ceil().clamp(max=size)
        high = torch.maximum(high, low + 1)
        cell = torch.arange(size, device=boxes.device)
        inside.append((cell >= low[..., None]) & (cell < high[..., None]))
    rows, columns = inside
    return rows[..., :, None] & columns[..., None, :]


def region_cells(boxes: Tensor, counts: Tensor | None, height: int, width: int) -> Tensor:
    """box_cells of the real boxes; padding covers nothing."""
    cells = box_cells(boxes, height, width)
    return cells if counts is None else cells & real(counts, boxes.shape[1])[..., None, None]


def mask_cells(words: Tensor, height: int, width: int) -> Tensor:
    return unpack(words, height * width).unflatten(-1, (height, width))


def real(counts: Tensor, length: int) -> Tensor:
    """Which entries of a padded row are real, bool (B, length)."""
    return torch.arange(length, device=counts.device) < counts[:, None]


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def cell_mean(features: Tensor, cells: Tensor) -> Tensor:
    """Mean of features (B, C, H, W) over each set of cells (B, L, H, W), 0 for an empty set. Other cells have no influence."""
    values = wide(features).contiguous()  # the same order of summation for every layout
    out = values.new_zeros((*cells.shape[:2], features.shape[1]))
    for l in range(cells.shape[1]):
        inside = cells[:, l, None]
        out[:, l] = torch.where(inside, values, 0).sum((-2, -1)) / inside.sum((-2, -1)).clamp(min=1)
    return out.to(features.dtype)


def cell_mean_backward(grad: Tensor, cells: Tensor) -> Tensor:
    height, width = cells.shape[-2:]
    out = wide(grad).new_zeros((grad.shape[0], grad.shape[2], height, width))
    for l in range(cells.shape[1]):
        inside = cells[:, l, None]
        share = wide(grad)[:, l, :, None, None] / inside.sum((-2, -1), keepdim=True).clamp(min=1)
        out += torch.where(inside, share, 0)
    return out.to(grad.dtype)


def region_mean(a: Args) -> Tensor:
    check_boxes(a.boxes, a.counts)
    return cell_mean(a.features, region_cells(a.boxes, a.counts, *a.features.shape[2:]))


def region_mean_backward(a: Args) -> Tensor:
    return cell_mean_backward(a.grad, region_cells(a.boxes, a.counts, a.height, a.width))


def mask_mean(a: Args) -> Tensor:
    return cell_mean(a.features, mask_cells(a.words, *a.features.shape[2:]))


def mask_mean_backward(a: Args) -> Tensor:
    return cell_mean_backward(a.grad, mask_cells(a.words, a.height, a.width))
