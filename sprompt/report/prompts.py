"""Which kernel takes which prompt, of a model in pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sprompt.data.coco import CocoDataset
from sprompt.data.sample import Sample
from sprompt.data.transforms import collate, resize, resized_size
from sprompt.masks import BitMasks
from sprompt.methods.saliency_prompt import Injection, SaliencyPromptConfig, prompts_of


@dataclass(frozen=True)
class Matches:
    """One picture, its proposals, and the prompt that each kernel takes."""

    name: str
    picture: Image.Image
    masks: BitMasks  # (L,) of the picture's size
    kernels: Sequence[int]  # (N,) place of the prompt in `masks`, -1 for none


@torch.no_grad()
def prompt_matches(
    model: Any, dataset: CocoDataset, config: SaliencyPromptConfig | None = None, limit: int = 12, *,
    short: int = 800, long: int = 1333,
) -> list[Matches]:  # fmt: skip
    """What the kernels of a `QueryModel` take on at most `limit` pictures of a proposal file, evenly from first to last.

    Pictures are seen as in pre-training, neither mirrored nor cropped, and no prompt is dropped. Empty where config.assign is
    "none": such a model was never prompted.
    """
    config = replace(config or SaliencyPromptConfig(), dropout=0.0)
    if config.assign == "none":
        return []
    count = min(limit, len(dataset))
    return [
        _matched(
            model, dataset[k * len(dataset) // count], config, short, long, dataset.image_ids[k * len(dataset) // count]
        )
        for k in range(count)
    ]


def _matched(model: Any, sample: Sample, config: SaliencyPromptConfig, short: int, long: int, image_id: int) -> Matches:
    batch = collate([resized(sample, short, long)]).to(device_of(model))
    features = model.encode(batch.images)
    injection = Injection(
        prompts_of(batch, features.maps, config), config, [image_id], sites=model.sites, seed=0, step=0
    )
    model.decode(features, injection)
    index: Tensor | None = injection.index
    kernels = [] if index is None else index[0].tolist()
    return Matches(_name(sample), picture_of(sample), sample.masks, kernels)


def resized(sample: Sample, short: int, long: int) -> Sample:
    """As evaluation sees it."""
    return resize(sample, resized_size((sample.image.shape[1], sample.image.shape[2]), short, long))


def picture_of(sample: Sample) -> Image.Image:
    return Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy())


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def _name(sample: Sample) -> str:
    return sample.name.replace("\\", "/").rsplit("/", 1)[-1]
