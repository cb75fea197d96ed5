"""From queries with a softmax over the classes to the masks of a picture: Mask2Former and FastInst."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sprompt.masks import Size
from sprompt.models.protocol import Prediction
from sprompt.nn.conv import full_precision
from sprompt.ops import mask_conv, resize_masks


def predictions(
    model: str, mask_features: Tensor, embeddings: Tensor, classes: Tensor, input_size: Size, sizes: Sequence[Size],
    original_sizes: Sequence[Size], threshold: float, max_per_image: int,
) -> list[Prediction]:  # fmt: skip
    """The best max_per_image pairs of a query and a class of every image, with the query's mask at the picture's own size.

    Logits are resized to the padded input, cut to the image, and resized to the picture. A mask is where their probability is above
    `threshold`. A score is the probability of the class times the mean probability of the mask's own pixels. Pairs are chosen by the
    probability of the class, and listed by score.

    Args:
        model: its name, for messages.
        mask_features: (B, C, h, w). embeddings: (B, Q, C). classes: (B, Q, K + 1).
    """
    if not len(sizes) == len(original_sizes) == len(mask_features):
        raise ValueError(
            f"{model}.predictions: sizes and original_sizes must have one entry per image, {len(mask_features)}, got "
            f"{len(sizes)} and {len(original_sizes)}"
        )
    number = classes.shape[2] - 1
    probability, order = (
        full_precision(classes).softmax(-1)[..., :-1].flatten(1).sort(dim=1, descending=True, stable=True)
    )
    logit = float(torch.tensor(threshold, dtype=torch.float64).clamp(0, 1).logit())
    results = []
    for image, (size, original) in enumerate(zip(sizes, original_sizes, strict=True)):
        best = order[image, :max_per_image]
        queries, place = torch.unique(best // number, return_inverse=True)  # a query can appear with several classes
        logits = full_precision(mask_conv(mask_features[image : image + 1], embeddings[image : image + 1, queries]))[0]
        found = resize_masks(logits, original, threshold=logit, via=input_size, crop=size, sums=True)
        scores = probability[image, :max_per_image] * (found.sums / (found.areas + 1e-6))[place]
        scores, final = scores.sort(descending=True, stable=True)
        results.append(Prediction(found.masks[place[final]], scores.float(), (best % number)[final]))
    return results
