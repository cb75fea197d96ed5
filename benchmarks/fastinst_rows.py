"""The rows of `benchmarks.programs` on FastInst: from a decoded picture to its masks, and the last part of that alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.released_fastinst import Released, results
from benchmarks.rivals import Program, Rivals, regions
from sprompt.data.sample import Sample
from sprompt.data.synthetic import scene
from sprompt.data.transforms import Augment, collate
from sprompt.masks import BitMasks, Size
from sprompt.models import query_inference
from sprompt.models.fastinst import FastInst, FastInstConfig
from sprompt.models.protocol import Prediction
from sprompt.testing.spec import blobs, random

#: RLEs, scores and classes.
Found = tuple[list[dict[str, Any]], Tensor, Tensor]


def inference(device: torch.device, *, picture: Size, short: int, long: int, **config: Any) -> Rivals:
    """From a decoded picture to RLEs at its size. Both resize and normalise it by the library's transform."""
    image, *_ = scene(0, 0, picture)
    nothing, none = BitMasks.from_dense(torch.zeros(0, *picture)), torch.zeros(0, dtype=torch.int64)
    sample = Sample(image, nothing, none, 0, "a scene", picture)
    view = Augment(short, long, flip=0.0)

    def read() -> tuple[Tensor, Size]:
        batch = collate([view(sample, torch.Generator())], divisor=32)
        return batch.images.to(device), batch.sizes[0]

    images, size = read()
    padded = (images.shape[2], images.shape[3])
    model = network(FastInstConfig(**config), images)
    other = Released(model).eval()
    with torch.inference_mode():
        maps = model.backbone(images)
        features = model.encode(images)
        outputs = model.decode(features)

    def written(found: list[Prediction]) -> Found:
        return found[0].masks.rle(), found[0].scores, found[0].labels

    @torch.inference_mode()
    def ours() -> Found:
        images, size = read()
        return written(model.predictions(model(images), padded, [size], [picture]))

    @torch.inference_mode()
    def released() -> Found:
        images, size = read()
        return results(*other(images), padded, size, picture)

    def check() -> str:
        return f"masks of {size[0]}x{size[1]} -> {picture[0]}x{picture[1]}; {same(ours(), released(), picture)}"

    parts = {
        "picture": read,
        "backbone": torch.inference_mode()(lambda: model.backbone(images)),
        "pixel decoder": torch.inference_mode()(lambda: model.pixel_decoder(maps[1:])),
        "decoder": torch.inference_mode()(lambda: model.decode(features)),
        "masks": lambda: written(model.predictions(outputs, padded, [size], [picture])),
    }
    return Rivals({"ours": ours, "released": released}, check, parts)


@torch.no_grad()
def network(config: FastInstConfig, images: Tensor) -> FastInst:
    """Random weights, of such sizes that queries differ in their classes, and with masks of about half of these images."""
    torch.manual_seed(0)
    model = FastInst(config).to(images.device).eval()
    model.positions.normal_()
    model.proposal_predictor[2].weight.mul_(8)
    features = model.encode(images)
    head: Any  # a Head, which a ModuleList does not say
    for number, head in enumerate(model.decoder.heads):
        for block in head.class_predictor:
            block[0].weight.mul_(3)
        mean = model.decode(features).decoded.predicted[number].features.mean((0, 2, 3))
        head.mask_features.bias.sub_(mean)
    return model


def masks(device: torch.device, *, view: Size, picture: Size, queries: int = 100, channels: int = 256) -> Rivals:
    """From the last head's features, embeddings and classes to RLEs."""
    padded = (-view[0] % 32 + view[0], -view[1] % 32 + view[1])
    cells = (padded[0] // 8, padded[1] // 8)
    features = regions(channels, cells, 1, 0).to(device)
    features[0, :queries] = 4 * blobs(queries, *cells, 0, device).clamp(1e-4, 1 - 1e-4).logit()
    embeddings = torch.eye(queries, channels, device=device)[None]  # so that the logits are the first maps
    classes = 3 * torch.randn(1, queries, 81, generator=random(1)).to(device)

    @torch.inference_mode()
    def ours() -> Found:
        (found,) = query_inference.predictions(
            "FastInst", features, embeddings, classes, padded, [view], [picture], threshold=0.5, max_per_image=100
        )
        return found.masks.rle(), found.scores, found.labels

    @torch.inference_mode()
    def released() -> Found:
        logits = torch.einsum("qc,chw->qhw", embeddings[0], features[0])
        return results(classes[0], logits, padded, view, picture)

    return Rivals({"ours": ours, "released": released}, lambda: same(ours(), released(), picture))


def same(found: Found, expected: Found, size: Size) -> str:
    """Asserts that two results are equal, when both are listed by score, and says how close they are."""
    (rles, scores, labels), (theirs, known, classes) = found, expected
    known, order = known.sort(descending=True)
    off = float((scores - known).abs().max())
    assert off <= 1e-4, f"a score is {off:.1g} from the released one"
    assert torch.equal(labels, classes[order]), "classes differ from the released ones"
    mine, other = BitMasks.from_rle(rles, size), BitMasks.from_rle([theirs[i] for i in order.tolist()], size)
    alike = torch.where(mine.area() + other.area() == 0, 1, mine.iou(other).diagonal())
    assert alike.min() >= 0.99, f"a mask has IoU {float(alike.min()):.3f} with the released one"
    share = float(mine.area().sum()) / (len(rles) * size[0] * size[1])
    return f"{len(rles)} masks, set pixels {share:.0%}; IoU with the released masks at least {float(alike.min()):.4f}"


_SMALL: dict[str, Any] = {
    "picture": (60, 81), "short": 90, "long": 122, "depth": 18, "backbone_width": 8, "channels": 32, "queries": 12, "heads": 4,
    "auxiliary_queries": 3, "decoder_feedforward": 48, "num_classes": 5,
}  # fmt: skip
_NAME, _MASKS = "FastInst inference", "FastInst's masks"

FASTINST = [
    *(
        Program(
            _NAME,
            f"D{layers} with ResNet-50, 1 of {padded}",
            partial(inference, picture=picture, short=short, long=long, decoder_layers=layers),
            partial(inference, decoder_layers=layers, **_SMALL),
            {"time": 2},
        )
        for layers, picture, short, long, padded in (
            (1, (427, 576), 576, 777, "576x800"),
            (3, (480, 640), 640, 853, "640x864"),
        )
    ),
    *(
        Program(
            _MASKS,
            f"100 of {view[0]}x{view[1]} -> {picture[0]}x{picture[1]}",
            partial(masks, view=view, picture=picture),
            partial(masks, view=(60, 100), picture=(70, 90), queries=10, channels=16),
            {"time": 10, "memory": 10},
        )
        for view, picture in (((576, 777), (427, 576)), ((640, 853), (480, 640)))
    ),
]
