"""Saliency proposals from a feature map: two images of one batch, one of them padded."""

import torch

from sprompt.ops import resize_masks, saliency_masks

# (B, D, H, W): the features of a frozen backbone. Here a background and two objects have a direction each.
generator = torch.Generator().manual_seed(0)
features = 0.1 * torch.rand(2, 64, 24, 40, generator=generator)
features[:, :16] += 1.0
for rows, columns, channels in (
    (slice(4, 12), slice(5, 15), slice(16, 32)),
    (slice(10, 21), slice(22, 34), slice(32, 48)),
):
    features[:, :16, rows, columns] -= 1.0
    features[:, channels, rows, columns] += 1.0

valid = torch.ones(2, 24, 40, dtype=torch.bool)
valid[1, :, 36:] = False  # the second image is narrower: its last four columns are padding

found = saliency_masks(features, max_masks=5, valid=valid, return_soft=True)
for image in range(2):
    good = found.scores[image] >= 0.7  # proposals with lower scores repeat better ones
    print(f"image {image}: {int(good.sum())} proposals")
    # Bits at the size of the picture, straight from the soft maps; no dense float mask is made.
    width = int(valid[image, 0].sum())
    pixels = resize_masks(found.soft[image, good], (24 * 16, width * 16), threshold=0.5, crop=(24.0, float(width)))
    for score, seed, box in zip(
        found.scores[image, good].tolist(), found.seeds[image, good].tolist(), pixels.boxes().tolist(), strict=True
    ):
        print(f"  score {score:.3f}  seed (scale, row, column) {seed}  box {box}")
