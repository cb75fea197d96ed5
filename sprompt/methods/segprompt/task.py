"""The training task: three groups of queries through one decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sprompt.data.sample import Batch
from sprompt.masks import BitMasks
from sprompt.methods.segprompt.choice import Choice, Lists, choose
from sprompt.methods.segprompt.config import SegPromptConfig
from sprompt.methods.segprompt.prompts import PromptCache
from sprompt.methods.supervised import summed
from sprompt.models.protocol import (
    NOTHING,
    OBJECT,
    GroupModel,
    ParameterGroup,
    QueryGroup,
    Slots,
    Targets,
    checked_model,
    features_of,
)
from sprompt.seeding import generator

PROMPT, EXTRACT = 0, 1  # the groups, in order


class SegPrompt(nn.Module):
    """The task of a class-agnostic model and labelled pictures.

    The model's own queries learn every object as one class. Extraction queries read the pixels of one object each; what they become
    is kept for each category, as its prompt. Prompt queries start from the prompt of a category, and must find the objects of this
    category. The own queries attend to neither group, so the trained model predicts without them. In evaluation mode the loss is that
    of the own queries alone.

    Args:
        model: an nn.Module that is a `GroupModel` of one class.
        vocabulary: number of classes of the labels.
        lists: {image id: what the labels of the picture say about categories as a whole}.
        seed: seed of all random draws, together with the step and the picture.
    """

    Config = SegPromptConfig

    def __init__(
        self, model: nn.Module, config: SegPromptConfig | None = None, *, vocabulary: int,
        lists: Mapping[int, Lists] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = checked_model(model)
        self.config = config = config or SegPromptConfig()
        self.vocabulary, self.lists, self.seed = vocabulary, dict(lists or {}), seed
        if not isinstance(model, GroupModel):
            raise ValueError(
                f"--model: must be one that takes groups of queries, as mask2former, got {type(model).__name__}"
            )
        if self.network.num_classes != 1:
            raise ValueError(f"model: must have 1 class, object, got {self.network.num_classes}; set num_classes 1")
        if config.copies > self.network.num_queries:
            raise ValueError(
                f"--method.copies: must be at most the model's {self.network.num_queries} queries, got {config.copies}"
            )
        width = self.network.channels
        self.content = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(vocabulary, width)
        self.cache = PromptCache(vocabulary, width, config.momentum)

    @staticmethod
    def classes(config: SegPromptConfig, dataset: Any) -> list[str]:
        return ["object"]

    @classmethod
    def on(cls, model: nn.Module, config: SegPromptConfig, dataset: Any, seed: int) -> SegPrompt:
        lists = {image: Lists(*map(frozenset, pair)) for image, pair in dataset.category_lists().items()}
        return cls(model, config, vocabulary=len(dataset.classes), lists=lists, seed=seed)

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        return [
            *self.network.parameter_groups(),
            ParameterGroup([*self.content.parameters(), *self.position.parameters()], decay=0),
        ]

    def watch(self, dataset: Any, augment: Any, out: Path) -> None:
        return None

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.network
        choices = self._choices(batch, step)
        features = features_of(model, batch.images, batch.sizes)
        own = chosen(batch, [c.own for c in choices])
        groups: list[QueryGroup] = []
        if self.training:
            extracted = chosen(batch, [c.extracted for c in choices], self.config.instances)
            groups = self._groups(choices, extracted.masks, step)
        outputs = model.decode(features, None, Targets(own.masks, torch.zeros_like(own.labels), own.counts, groups))
        found = model.losses(outputs, own.masks, torch.zeros_like(own.labels), own.counts)
        terms = dict(found.terms)
        if self.training:
            prompted = chosen(batch, [c.prompted for c in choices])
            for name, group, part, slots in (
                ("prompt", PROMPT, prompted, self._prompt_slots(choices, prompted)),
                ("extract", EXTRACT, extracted, self._extraction_slots(extracted)),
            ):
                losses = model.group_losses(outputs, group, part.masks, part.counts, slots)
                terms |= {f"{name}/{term}": loss for term, loss in losses.items()}
            real = torch.arange(self.config.instances, device=extracted.counts.device) < extracted.counts[:, None]
            self.cache.update(model.group_states(outputs, EXTRACT), extracted.labels, real)
        return summed(terms.values()), {name: term.detach() for name, term in terms.items()}

    @property
    def network(self) -> GroupModel:
        return cast(GroupModel, self.model)

    def _choices(self, batch: Batch, step: int) -> list[Choice]:
        """The choice of each picture. It waits for the device once: before the forward pass begins."""
        areas = batch.masks.area()
        rows = torch.cat([batch.labels, areas, batch.counts[:, None]], 1).tolist()
        places = batch.labels.shape[1]
        return [
            choose(
                row[: row[-1]], row[places : places + row[-1]], self.vocabulary, self.config,
                generator(self.seed, step, image), self.lists.get(image),
            )
            for row, image in zip(rows, batch.image_ids, strict=True)
        ]  # fmt: skip

    def _groups(self, choices: Sequence[Choice], extracted: BitMasks, step: int) -> list[QueryGroup]:
        """The prompt queries and the extraction queries."""
        content, position = self.network.learned_queries()
        device, own, batch = content.device, len(content), len(choices)
        copies, instances = self.config.copies, self.config.instances
        blocks = len(choices[0].categories)
        random = generator(self.seed, step)
        # The copies of a category start from learned queries, the same ones for every picture.
        drawn = torch.cat([torch.randperm(own, generator=random)[:copies] for _ in range(blocks)]).to(device)
        category = torch.tensor([c.categories for c in choices], device=device).repeat_interleave(copies, 1)
        prompt = self.cache.prompts[category]
        prompts = blocks * copies
        sees = torch.zeros(prompts + instances, own + prompts + instances, dtype=torch.bool, device=device)
        block = torch.arange(prompts, device=device) // copies
        sees[:prompts, :own] = True
        sees[:prompts, own : own + prompts] = block[:, None] == block
        sees[prompts:, own + prompts :] = True
        nothing = prompt.new_zeros(batch, instances, prompt.shape[2])
        return [
            QueryGroup(
                prompt + self.content(category) + content[drawn], prompt + self.position(category) + position[drawn],
                sees[:prompts],
            ),
            QueryGroup(nothing, None, sees[prompts:], extracted),
        ]  # fmt: skip

    def _prompt_slots(self, choices: Sequence[Choice], targets: Chosen) -> Slots:
        device, copies = targets.labels.device, self.config.copies
        classes, truth = (
            torch.tensor(rows, device=device).repeat_interleave(copies, 1)
            for rows in ([c.categories for c in choices], [c.truth for c in choices])
        )
        taught = torch.zeros(len(choices), self.vocabulary, dtype=torch.bool)
        for row, choice in zip(taught, choices, strict=True):
            row[list(choice.supervised)] = True
        compared = taught.to(device, non_blocking=True).gather(1, targets.labels)
        return Slots(classes, targets.labels, truth, compared)

    def _extraction_slots(self, targets: Chosen) -> Slots:
        places = torch.arange(self.config.instances, device=targets.counts.device)
        real = places < targets.counts[:, None]
        truth = torch.where(real, OBJECT, NOTHING)
        rows = torch.where(real, places, -1)
        return Slots(targets.labels, targets.labels, truth, real, rows)


class Chosen(NamedTuple):
    """Some targets of each image."""

    masks: BitMasks  # (B, G), empty behind counts
    labels: Tensor  # (B, G) int64
    counts: Tensor  # (B,) int64


def chosen(batch: Batch, places: Sequence[Sequence[int]], width: int | None = None) -> Chosen:
    """The targets at these places of each image. `width` is the number G, by default the longest list's length."""
    width = max(map(len, places), default=0) if width is None else width
    device = batch.labels.device
    index = torch.tensor([[*row, *[-1] * (width - len(row))] for row in places], dtype=torch.int64)
    index = index.reshape(len(places), width).to(device, non_blocking=True)
    counts = torch.tensor([len(row) for row in places], dtype=torch.int64).to(device, non_blocking=True)
    if batch.labels.shape[1] == 0:
        words = batch.masks.words.new_zeros(len(places), width, batch.masks.words.shape[2])
        return Chosen(BitMasks(words, batch.masks.size), index.clamp(min=0), counts)
    taken, real = index.clamp(min=0), index >= 0
    words = batch.masks.words.gather(1, taken[..., None].expand(-1, -1, batch.masks.words.shape[2]))
    words = torch.where(real[..., None], words, 0)
    return Chosen(BitMasks(words, batch.masks.size), torch.where(real, batch.labels.gather(1, taken), 0), counts)
