"""The prompts ops in plain PyTorch. Sums are in float32 (float64 for float64)."""

import torch
from torch import Tensor

from sprompt.ops.masks.reference import unpack_masks

#: max(norm, EPSILON) in the cosine.
EPSILON = 1e-8
#: Places that the prompts of one image share in the assignments that do not look at them.
SLOTS = 20


def box_cells(boxes: Tensor, height: int, width: int) -> Tensor:
    """Which cells a box covers, bool (B, L, H, W): floor and ceil, at least one cell, those outside moved to the edge."""
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
    return unpack_masks(words, height * width).unflatten(-1, (height, width))


def real(counts: Tensor, length: int) -> Tensor:
    """Which entries of a padded row are real, bool (B, length)."""
    return torch.arange(length, device=counts.device) < counts[:, None]


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def cell_mean(features: Tensor, cells: Tensor) -> Tensor:
    """Mean of (B, C, H, W) over each of the cells (B, L, H, W), 0 where there are none; other cells are not looked at."""
    values = wide(features).contiguous()  # one order of summation for every layout
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


def region_mean(features: Tensor, boxes: Tensor, counts: Tensor | None) -> Tensor:
    return cell_mean(features, region_cells(boxes, counts, *features.shape[2:]))


def region_mean_backward(grad: Tensor, boxes: Tensor, counts: Tensor | None, height: int, width: int) -> Tensor:
    return cell_mean_backward(grad, region_cells(boxes, counts, height, width))


def mask_mean(features: Tensor, words: Tensor) -> Tensor:
    return cell_mean(features, mask_cells(words, *features.shape[2:]))


def mask_mean_backward(grad: Tensor, words: Tensor, height: int, width: int) -> Tensor:
    return cell_mean_backward(grad, mask_cells(words, height, width))


def cosine(kernels: Tensor, prompts: Tensor) -> Tensor:
    """E (B, N, L), every entry summed in the same order, so that equal prompts tie."""
    k, p = wide(kernels), wide(prompts)
    dot = torch.stack([(k * p[:, l, None]).sum(-1) for l in range(p.shape[1])], -1)
    norm_k, norm_p = (x.square().sum(-1).sqrt().clamp(min=EPSILON) for x in (k, p))
    return dot / (norm_k[..., None] * norm_p[:, None])


def slot_prompts(order: Tensor, counts: Tensor) -> Tensor:
    """Prompt of each kernel, (B, N): kernel n reads slot ⌊order[n] · 20 / N⌋, the slots being shared by counts[b] prompts."""
    slot = order * SLOTS // max(order.shape[0], 1)
    length = counts.clamp(min=1)[:, None]
    each = SLOTS // length
    return torch.where(slot < each * length, slot // each.clamp(min=1), slot - each * length)


def prompt_match(
    kernels: Tensor, prompts: Tensor, counts: Tensor | None, keep: Tensor | None, order: Tensor | None, by_cosine: bool
) -> tuple[Tensor, Tensor]:
    batch, length, channels = prompts.shape
    number = kernels.shape[-2]
    kernels = kernels.expand(batch, number, channels)
    if length == 0:
        return kernels.clone(memory_format=torch.contiguous_format), prompts.new_full(
            (batch, number), -1, dtype=torch.int64
        )
    if counts is None:
        counts = torch.full((batch,), length, device=prompts.device)
    if by_cosine:
        similarity = cosine(kernels, prompts)
        similarity = similarity.masked_fill(similarity.isnan() | ~real(counts, length)[:, None], -torch.inf)
        # argmax may return any of several largest entries; the first of them is wanted.
        best = similarity == similarity.amax(-1, keepdim=True)
        index = torch.where(best, torch.arange(length, device=prompts.device), length).amin(-1)
    else:
        turn = torch.arange(number, device=prompts.device) if order is None else order
        index = slot_prompts(turn, counts)
    index = index.masked_fill((counts == 0)[:, None], -1)
    if keep is not None:
        index = index.masked_fill(~keep, -1)
    chosen = prompts.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, channels))
    return torch.where(index[..., None] >= 0, kernels + chosen, kernels), index


def prompt_match_backward(grad: Tensor, index: Tensor, prompts: int) -> Tensor:
    out = wide(grad).new_zeros((grad.shape[0], prompts, grad.shape[2]))
    for l in range(prompts):
        out[:, l] = torch.where((index == l)[..., None], wide(grad), 0).sum(1)
    return out.to(grad.dtype)
