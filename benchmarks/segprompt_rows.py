"""The row of `benchmarks.programs` on a training step of SegPrompt: all queries through the decoder, the losses, the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import released_segprompt
from benchmarks.released_segprompt import Uniform
from benchmarks.rivals import Made, Program, Rivals, Step, regions, same_step
from sprompt.data.sample import Batch
from sprompt.masks import BitMasks, Size
from sprompt.methods.segprompt import SegPrompt, SegPromptConfig
from sprompt.models.mask2former import Mask2Former, Mask2FormerConfig
from sprompt.ops.points.philox import draw
from sprompt.testing.spec import blobs, random


class AtSeeds(Uniform):
    """The points of this library, from its seeds in order."""

    def __init__(self, seeds: list[Tensor]) -> None:
        super().__init__(seeds[0].device)
        self.seeds = iter(seeds)

    def of_costs(self, images: int, number: int) -> Tensor:
        return draw(next(self.seeds), images, torch.arange(number, device=self.device))

    def of_losses(self, pairs: list[list[int]], number: int) -> Iterator[Tensor]:
        """The heads share a seed, as the rows have few targets. Pairs are counted by image, head and target."""
        by_image = list(zip(*pairs, strict=True))
        points = draw(next(self.seeds), sum(map(sum, pairs)), torch.arange(number, device=self.device))
        parts = [
            of_image.split(own)
            for of_image, own in zip(points.split([sum(n) for n in by_image]), by_image, strict=True)
        ]
        return (torch.cat(of_head) for of_head in zip(*parts, strict=True))


@contextmanager
def recorded_seeds() -> Iterator[list[Tensor]]:
    """The seeds of the points that this library draws while the block runs."""
    seeds: list[Tensor] = []
    randint = torch.randint

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        seeds.append(randint(*args, **kwargs))
        return seeds[-1]

    with mock.patch.object(torch, "randint", recorded):
        yield seeds


def block_masks(number: int, size: Size, seed: int) -> Tensor:
    """bool (number, H, W): masks of whole blocks of 32x32 pixels, at least one."""
    coarse = blobs(number, size[0] // 32, size[1] // 32, seed)
    blocks = coarse >= coarse.amax((1, 2), keepdim=True).clamp(max=0.5)
    return blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)


def training_step(
    device: torch.device, *, images: int = 1, size: Size = (1024, 1024), targets: int = 15, vocabulary: int = 1203,
    categories: int = 30, copies: int = 10, **config: Any,
) -> Rivals:  # fmt: skip
    """Decoder, matching, losses and backward on given maps with gradient, and the new prompts. A category has two targets of an image."""
    torch.manual_seed(0)
    model = Mask2Former(Mask2FormerConfig(num_classes=1, **config))
    maps = [
        regions(model.channels, (size[0] // stride, size[1] // stride), images, seed).to(device).requires_grad_()
        for seed, stride in enumerate((4, 8, 16, 32))
    ]
    model.backbone, model.pixel_decoder = nn.Identity(), Made(maps)  # type: ignore[assignment]  # the decoder starts from given maps
    task = SegPrompt(model, SegPromptConfig(categories=categories, copies=copies), vocabulary=vocabulary)
    task = task.to(device).train()
    task.cache.prompts.copy_(torch.randn(task.cache.prompts.shape, generator=random(1)))
    task.cache.seen.fill_(True)
    before = {name: tensor.clone() for name, tensor in task.cache.state_dict().items()}
    leaves = [*maps, *task.parameters()]

    dense = [block_masks(targets, size, seed).to(device) for seed in range(images)]
    labels = torch.arange(targets, device=device).remainder((targets + 1) // 2).expand(images, -1)
    counts = torch.full((images,), targets, device=device)
    pictures, names = torch.zeros(images, 3, *size, device=device), list(map(str, range(images)))
    bits = BitMasks.stack([BitMasks.from_dense(each) for each in dense])
    batch = Batch(pictures, bits, labels, counts, [size] * images, list(range(images)), names, [size] * images)

    def gradients(total: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the leaves that the loss depends on."""
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return tuple(each for each in found if each is not None)

    def ours() -> Step:
        total, terms = task(batch, 0)
        return terms, gradients(total)

    def released(points: Uniform) -> Step:
        terms = released_segprompt.losses(task, maps, batch, dense, 0, points)
        return {name: term.detach() for name, term in terms.items()}, gradients(torch.stack(list(terms.values())).sum())

    def check() -> str:
        kept = []
        with recorded_seeds() as seeds:
            for each in (ours, lambda: released(AtSeeds(seeds))):
                task.cache.load_state_dict(before)
                kept.append((*each(), task.cache.prompts.clone()))
        (terms, own, prompts), (known, theirs, wanted) = kept
        same_step((terms, own), (known, theirs), "released")
        worst = max(abs(float(value - known[term]) / float(known[term])) for term, value in terms.items())
        off = float((prompts - wanted).abs().max())
        assert off <= 1e-3, f"a prompt is {off:.1e} from the released one"
        return f"{targets} targets an image; at the same points each loss is within {worst:.0e}"

    return Rivals({"ours": ours, "released": lambda: released(Uniform(device))}, check)


_SMALL: dict[str, Any] = {
    "images": 2, "size": (96, 128), "targets": 4, "vocabulary": 9, "categories": 6, "copies": 3, "channels": 32, "heads": 4, "queries": 12,
    "encoder_layers": 1, "encoder_feedforward": 48, "decoder_layers": 4, "decoder_feedforward": 48, "points": 64,
    "depth": 18, "backbone_width": 8,
}  # fmt: skip

SEGPROMPT = [
    Program(
        "SegPrompt step",
        "405 queries, decoder and losses on given maps, 1 of 1024x1024",
        training_step,
        partial(training_step, **_SMALL),
        {"time": 2, "memory": 4},
    )
]
