"""The programs that `benchmarks.programs` measures, each with its rivals, on random weights and synthetic pictures."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import released_knet
from benchmarks.deformable_rows import DEFORMABLE
from benchmarks.fastinst_rows import FASTINST
from benchmarks.mal_rows import AUTO_LABELER
from benchmarks.mask2former_rows import MASK2FORMER
from benchmarks.measure import Call
from benchmarks.open_world_rows import OPEN_WORLD
from benchmarks.patched_rows import PATCHED
from benchmarks.queryinst_rows import QUERYINST
from benchmarks.rivals import Made, Program, Rivals, Step, regions, same_step, step
from benchmarks.segprompt_rows import SEGPROMPT
from sprompt import use_backend
from sprompt.data.sample import Sample
from sprompt.data.synthetic import scene
from sprompt.data.transforms import collate
from sprompt.masks import BitMasks, Size
from sprompt.methods.saliency_prompt.config import ProposalConfig
from sprompt.methods.saliency_prompt.proposals import Proposals, propose, view
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.knet.outputs import Outputs
from sprompt.models.protocol import Features
from sprompt.nn.resnet import ResNet
from sprompt.ops import pack_masks
from sprompt.testing.spec import blobs, random

# -- a step of training


class _Given(nn.Module):
    """Replaces the semantic FPN: its two maps are the inputs."""

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(maps)


def head_step(
    device: torch.device, *, images: int, decoder: bool, size: Size = (800, 1344), targets: int = 15, **config: Any
) -> Rivals:
    """Forward, matching, losses and backward of K-Net's head at initialisation.

    With `decoder` the inputs are the maps after the semantic FPN, and a gradient flows to them. Otherwise they are the maps of
    the pyramid, without a gradient.
    """
    torch.manual_seed(0)
    model = KNet(KNetConfig(num_classes=1, **config))
    model.backbone, model.neck = nn.Identity(), nn.Identity()  # type: ignore[assignment]  # the head starts from given maps
    model = model.to(device).train()
    if decoder:
        model.rpn_head.localization_fpn = _Given()  # type: ignore[assignment]  # it stands in for a SemanticFPN
        shapes = [(size[0] // 8, size[1] // 8)] * 2
    else:
        shapes = [(size[0] // stride, size[1] // stride) for stride in (4, 8, 16, 32)]
    maps = [regions(model.channels, shape, images, seed).to(device) for seed, shape in enumerate(shapes)]
    if decoder:
        maps = [each.relu_().requires_grad_() for each in maps]
    leaves = [*model.parameters(), *(each for each in maps if each.requires_grad)]

    dense = [(blobs(targets, *size, seed) > 0.5).to(device) for seed in range(images)]
    bits = BitMasks.stack([pack_masks(each) for each in dense])
    bytes_ = [each.to(torch.uint8) for each in dense]
    labels = torch.zeros(images, targets, dtype=torch.int64, device=device)
    counts = torch.full((images,), targets, device=device)

    def ours() -> dict[str, Tensor]:
        return model.losses(model.decode(Features([], maps)), bits, labels, counts).terms

    def released() -> dict[str, Tensor]:
        return released_knet.losses(model, maps, bytes_, list(labels))

    def reference() -> Step:
        with use_backend("reference"):
            return step(ours(), leaves)

    calls: dict[str, Call] = {"ours": lambda: step(ours(), leaves), "released": lambda: step(released(), leaves)}
    if decoder:  # ours and the released code differ in the decoder only
        calls["reference"] = reference

    def check() -> str:
        found = calls["ours"]()
        for rival in list(calls)[1:]:
            same_step(found, calls[rival](), rival)
        with torch.no_grad():
            masks = model.decode(Features([], maps)).masks
        shares = ", ".join(f"{float((logits > 0).float().mean()):.0%}" for logits in masks)
        return f"{targets} targets an image; set pixels of the head and the stages {shares}"

    return Rivals(calls, check)


# -- results


def prediction_dump(
    device: torch.device, *, view: Size = (800, 1333), picture: Size = (800, 1333), kernels: int = 100
) -> Rivals:
    """From the decoder's outputs of one image to COCO results: RLEs of masks at the picture's size, scores and classes."""
    padded = (-view[0] % 32 + view[0], -view[1] % 32 + view[1])
    model = KNet(KNetConfig(depth=18, backbone_width=8, channels=32, feedforward=32, kernels=kernels, num_classes=1))
    soft = blobs(kernels, padded[0] // 8, padded[1] // 8, 0, device).clamp(1e-4, 1 - 1e-4)
    logits = 4 * soft.logit()[None]
    classes = torch.randn(1, kernels, 1, generator=random(1)).to(device)
    outputs = Outputs([logits], [classes], [], logits[:, :1])

    def ours() -> tuple[list[dict[str, Any]], list[float], list[int]]:
        (result,) = model.predictions(outputs, padded, [view], [picture])
        return result.masks.rle(), result.scores.tolist(), result.labels.tolist()

    def released() -> tuple[list[dict[str, Any]], list[float], list[int]]:
        return released_knet.results(logits[0], classes[0], padded, view, picture)

    def check() -> str:
        rles, scores, labels = ours()
        expected = released()
        assert labels == expected[2], "classes differ from the released ones"
        assert scores == expected[1], "scores differ from the released ones"
        size = (picture[0], picture[1])
        mine, theirs = BitMasks.from_rle(rles, size), BitMasks.from_rle(expected[0], size)
        same = mine.area() + theirs.area() == 0
        worst = float(torch.where(same, 1, mine.iou(theirs).diagonal()).min())
        assert worst >= 0.99, f"a mask has IoU {worst:.3f} with the released one"
        return f"IoU with the released masks at least {worst:.4f}"

    return Rivals({"ours": ours, "released": released}, check)


# -- proposals


def proposals(device: torch.device, *, depth: int, width: int, size: Size) -> Rivals:
    """Saliency proposals of one picture, as masks of its size. Two parts are timed too: the backbone, and all steps after
    it."""
    config = ProposalConfig(short=min(size), long=max(size), min_score=0, max_width=9, centre=0)  # no filter
    image, *_ = scene(0, 0, size)
    nothing, none = BitMasks.from_dense(torch.zeros(0, *size)), torch.zeros(0, dtype=torch.int64)
    batch = collate([view(Sample(image, nothing, none, 0, "a scene", size), config)]).to(device)
    torch.manual_seed(0)
    backbone = ResNet(depth, width=width).to(device).eval()
    with torch.no_grad():
        maps = backbone(batch.images)

    made = Made(maps)

    def ours(network: nn.Module = backbone) -> list[Proposals]:
        return propose(network, batch, config)

    def features() -> list[Tensor]:
        with torch.no_grad():
            return backbone(batch.images)

    def check() -> str:
        (found,) = ours()
        with use_backend("reference"):
            (plain,) = ours(made)
        assert len(found.masks) == len(plain.masks), f"{len(found.masks)} proposals, reference {len(plain.masks)}"
        assert torch.equal(found.seeds, plain.seeds), "seeds differ from those of the reference"
        return f"{len(found.masks)} proposals"

    return Rivals({"ours": ours, "backbone": features, "kernels": lambda: ours(made)}, check)


_SMALL: dict[str, Any] = {"size": (96, 128), "targets": 4, "channels": 32, "heads": 4, "feedforward": 64, "kernels": 12}
_STEP = "K-Net head step"
_DUMP = "Prediction dump"

PROGRAMS = [
    *(
        Program(
            _STEP,
            f"{'decoder' if decoder else 'whole head'}, {images} of 800x1344",
            partial(head_step, images=images, decoder=decoder),
            partial(head_step, images=images, decoder=decoder, **_SMALL),
            {"time": 2, "memory": 2} if decoder else {},
            images,
            captures=True,
        )
        for decoder in (True, False)
        for images in (1, 2)
    ),
    *(
        Program(
            _DUMP,
            f"100 masks, {view[0]}x{view[1]} -> {picture[0]}x{picture[1]}",
            partial(prediction_dump, view=view, picture=picture),
            partial(prediction_dump, view=(60, 100), picture=(70, 90), kernels=10),
            {"time": 5, "memory": 10},
        )
        for view, picture in (((800, 1333), (800, 1333)), ((800, 1067), (480, 640)))
    ),
    *(
        Program(
            "Proposals",
            f"{name}, 1 of {size[0]}x{size[1]}",
            partial(proposals, depth=depth, width=width, size=size),
            partial(proposals, depth=18, width=8, size=(96, 128)),
            goals,
        )
        for name, depth, width, size, goals in (
            ("ResNet-50", 50, 64, (800, 1333), {"share": 0.1}),
            ("ResNet-18 of width 16", 18, 16, (240, 320), {}),
        )
    ),
    *MASK2FORMER,
    *FASTINST,
    *QUERYINST,
    *SEGPROMPT,
    *DEFORMABLE,
    *PATCHED,
    *OPEN_WORLD,
    *AUTO_LABELER,
]
