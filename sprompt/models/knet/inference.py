"""From logits to the masks of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.masks import BitMasks, Size
from sprompt.models.protocol import Prediction
from sprompt.nn.conv import full_precision
from sprompt.ops import resize_masks


@torch.no_grad()
def predictions(
    mask_logits: Tensor,
    class_logits: Tensor,
    input_size: Size,
    sizes: Sequence[Size],
    original_sizes: Sequence[Size],
    threshold: float,
    max_per_image: int,
) -> list[Prediction]:
    """The best max_per_image pairs of a kernel and a class of every image, with the kernel's mask at the picture's own size.

    Scores are the class probabilities; pairs of equal score keep the order of kernel, then class. Logits are upsampled twofold, to
    stride 4. Their probabilities are resampled once, from stride 4 straight to the picture; the padding is cut off in fractions of a cell.
    (The released code resamples twice: to the padded input, then to the picture. The IoU of the two results is at least 0.9995 on
    average, and 0.98 for masks below 100 pixels.) Images are computed one after the other, so the peak of memory is that of one image.

    Args:
        mask_logits: (B, N, h, w), stride 8. class_logits: (B, N, K).
        input_size: (8h, 8w), the size of the padded images.
        sizes: the size of every image before padding. original_sizes: the size of every picture.
    """
    batch, classes = len(mask_logits), class_logits.shape[2]
    if tuple(input_size) != (8 * mask_logits.shape[2], 8 * mask_logits.shape[3]):
        expected = (8 * mask_logits.shape[2], 8 * mask_logits.shape[3])
        raise ValueError(
            f"KNet.predictions: input_size must be {expected}, the size of the images, got {tuple(input_size)}"
        )
    if not len(sizes) == len(original_sizes) == batch:
        raise ValueError(
            f"KNet.predictions: sizes and original_sizes must have one entry an image, {batch}, got {len(sizes)} and "
            f"{len(original_sizes)}"
        )
    scores, order = full_precision(class_logits).sigmoid().flatten(1).sort(dim=1, descending=True, stable=True)
    results = []
    for image in range(batch):
        best = order[image, :max_per_image]
        kernels, place = torch.unique(best // classes, return_inverse=True)  # a kernel can appear with several classes
        masks = _masks(mask_logits[image, kernels], sizes[image], original_sizes[image], threshold)
        results.append(Prediction(masks[place], scores[image, :max_per_image].float(), best % classes))
    return results


def _masks(logits: Tensor, size: Size, original_size: Size, threshold: float) -> BitMasks:
    """(n, h, w) of stride 8 -> masks of the picture."""
    if len(logits) == 0:
        return BitMasks(
            logits.new_zeros((0, (original_size[0] * original_size[1] + 31) // 32), dtype=torch.int32), original_size
        )
    soft = F.interpolate(full_precision(logits)[None], scale_factor=2, mode="bilinear", align_corners=False)[
        0
    ].sigmoid_()
    return resize_masks(soft, original_size, threshold=threshold, crop=(size[0] / 4, size[1] / 4))
