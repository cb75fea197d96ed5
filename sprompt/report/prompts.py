"""The prompt that each kernel of a model takes in pre-training."""

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
from sprompt.models.protocol import features_of


@dataclass(frozen=True)
class Matches:
    """One picture, its proposals, and the prompt of each kernel."""

    name: str
    picture: Image.Image
    masks: BitMasks  # (L,) of the picture's size
    kernels: Sequence[int]  # (N,) index in `masks` of the kernel's prompt, -1 for none


@torch.no_grad()
def prompt_matches(
    model: Any, dataset: CocoDataset, config: SaliencyPromptConfig | None = None, limit: int = 12, *,
    short: int = 800, long: int = 1333,
) -> list[Matches]:  # fmt: skip
    """The prompts of the kernels of a `QueryModel`, on at most `limit` pictures of a proposal file, spread evenly over it.

    Pictures are resized as in pre-training, but neither mirrored nor cropped, and no prompt is dropped. The result is empty if
    config.assign is "none", because such a model gets no prompts, or if config.level is "C5", because the layer that makes these
    prompts is not in the model's file.
    """
    config = replace(config or SaliencyPromptConfig(), dropout=0.0)
    if config.assign == "none" or config.level == "C5":
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
    features = features_of(model, batch.images, batch.sizes)
    injection = Injection(prompts_of(batch, features, config), config, [image_id], sites=model.sites, seed=0, step=0)
    model.decode(features, injection)
    index: Tensor | None = injection.index
    kernels = [] if index is None else index[0].tolist()
    return Matches(_name(sample), picture_of(sample), sample.masks, kernels)


def resized(sample: Sample, short: int, long: int) -> Sample:
    """The sample at the size of the evaluation: shorter side `short`, longer side at most `long`."""
    return resize(sample, resized_size((sample.image.shape[1], sample.image.shape[2]), short, long))


def picture_of(sample: Sample) -> Image.Image:
    return Image.fromarray(sample.image.permute(1, 2, 0).contiguous().numpy())


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def _name(sample: Sample) -> str:
    return sample.name.replace("\\", "/").rsplit("/", 1)[-1]
