"""The rows of `benchmarks.programs` on Mask Auto-Labeler: labels of a picture's boxes, and a training step with and without the encoder.

A step has the forward passes of student and teacher, the refinement, the losses, the gradients, and the teacher's new weights. The
optimiser is torch's on both sides and is left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import released_mal
from benchmarks.measure import Call
from benchmarks.rivals import Program, Rivals, Step, regions, same_step, step
from sprompt.data.boxes import read_boxes
from sprompt.data.colour import normalised
from sprompt.data.synthetic import scene
from sprompt.masks import BitMasks, Size
from sprompt.methods.auto_labeler.config import AutoLabelerConfig, LabelConfig, NetworkConfig
from sprompt.methods.auto_labeler.label import label, normalised_crops, paste, probabilities
from sprompt.methods.auto_labeler.network import build_network
from sprompt.methods.auto_labeler.samples import (
    LABEL_MARGINS,
    CropBatch,
    box_profiles,
    box_targets,
    cut,
    window_of,
)
from sprompt.methods.auto_labeler.task import AutoLabeler
from sprompt.nn.mask_labeler import SIZE_CLASSES, STRIDE, MaskLabeler, size_class
from sprompt.nn.vit import VitConfig
from sprompt.testing.spec import random

#: (network, crops, size classes) -> logits
Logits = Callable[[Any, Tensor, Sequence[int]], Tensor]


class GivenMaps(nn.Module):
    """In place of an encoder: its map is an input."""

    strides = (STRIDE,)

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.given, self.channels = maps, [maps.shape[1]]

    def forward(self, crops: Tensor) -> list[Tensor]:
        return [self.given]


class GivenLogits(nn.Module):
    """In place of a whole network."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.given = nn.Parameter(logits)

    def forward(self, crops: Tensor, classes: Sequence[int]) -> Tensor:
        return self.given


@torch.no_grad()
def decided(network: MaskLabeler, crops: Tensor) -> MaskLabeler:
    """Scales the vectors of objects so that half of the logits of these crops are positive, with a deviation of 4."""
    features = network.backbone(crops)[-1]
    pixels, last = network.pixel_head(features, 1.0), network.instance_head[2]

    def logits() -> Tensor:
        return torch.einsum("bc,bchw->bhw", network.instance_head(features.mean((2, 3))), pixels)

    mean = pixels.mean((0, 2, 3))
    last.bias.sub_(mean * logits().mean() / mean.square().sum())
    scale = 4 / logits().std()
    last.weight.mul_(scale)
    last.bias.mul_(scale)
    return network


# -- training


def crops_of(number: int, side: int, device: torch.device) -> CropBatch:
    """Crops of large and medium objects, in turn."""
    images = torch.stack([scene(0, index, (side, side)).image for index in range(number)]).float() / 255
    profiles = torch.zeros(number, 2, side, dtype=torch.uint8)
    for index, own in enumerate(profiles):
        own[0, side // 8 : side * 7 // 8 - 2 * index] = 1
        own[1, side // 6 + 3 * index : side * 4 // 5] = 1
    classes = [2 - index % 2 for index in range(number)]
    batch = CropBatch(normalised(0.9 * images), normalised(images), box_targets(profiles), classes, [""] * number, 1)
    return batch.to(device)


def steps(network: nn.Module, teacher: nn.Module, batch: CropBatch, leaves: Sequence[Tensor], theirs: Logits) -> Rivals:
    """Steps of a student and its teacher. `theirs` makes the logits of the released formulation."""
    task = AutoLabeler(network, AutoLabelerConfig())
    task.teacher = teacher.requires_grad_(False)
    task.train()
    known = copy.deepcopy(teacher)  # both sides change their own

    def ours() -> Step:
        loss, logs = task(batch, 1)
        return {name: logs[name] for name in ("mil", "crf")}, torch.autograd.grad(loss, leaves)

    def released() -> Step:
        released_mal.follow(known, network, task.config.momentum)
        logits = theirs(network, batch.student, batch.classes)
        with torch.no_grad():
            taught = theirs(known, batch.teacher, batch.classes)
        return step(released_mal.losses(task.config, batch, logits, taught), leaves)

    def check() -> str:
        same_step(ours(), released(), "released")
        _, logs = task(batch, 1)
        shares = (float(logs[f"monitor/{name}"]) for name in ("foreground", "refined"))
        return "masks {:.0%} and refined masks {:.0%} of their boxes".format(*shares)

    return Rivals({"ours": ours, "released": released}, check)


def losses(device: torch.device, *, crops: int, side: int) -> Rivals:
    """Refinement and losses of given logits."""
    batch = crops_of(crops, side, device)
    size = batch.boxes.shape[1:]
    student, teacher = (GivenLogits(2 * regions(crops, size, 1, seed)[0].to(device)) for seed in range(2))
    return steps(student, teacher, batch, [student.given], lambda network, *inputs: network(*inputs))


def training(
    device: torch.device, *, crops: int, side: int, vit: VitConfig | None = None, channels: int = 0, width: int = 256
) -> Rivals:
    """With an encoder, or on given maps that get a gradient. The student and the teacher differ."""
    batch = crops_of(crops, side, device)
    torch.manual_seed(0)
    if vit is not None:
        network = build_network(NetworkConfig(vit=vit, width=width, crop=side)).to(device)
        teacher = copy.deepcopy(network)
        given = []
    else:
        maps = [regions(channels, (side // STRIDE,) * 2, crops, seed).to(device) for seed in range(2)]
        given = [maps[0].requires_grad_()]
        network, teacher = (MaskLabeler(GivenMaps(own), width).to(device) for own in maps)
        teacher.load_state_dict(network.state_dict())
    for own, images in ((network, batch.student), (teacher, batch.teacher)):
        decided(own, images)
    leaves = [*network.parameters(), *given]
    found = steps(network, teacher, batch, leaves, released_mal.mask_logits)
    slopes = torch.randn(crops, side // 4, side // 4, generator=random(1)).to(device)
    parts: dict[str, Call] = {
        "student": lambda: torch.autograd.grad(network(batch.student, batch.classes), leaves, slopes),
        "teacher": torch.no_grad()(lambda: teacher(batch.teacher, batch.classes)),
        "refinement and losses": losses(device, crops=crops, side=side).calls["ours"],
    }
    return found._replace(parts=parts)


# -- labels


def labels(device: torch.device, *, picture: Size, objects: int, network: NetworkConfig, batch: int = 8) -> Rivals:
    """From the file of a picture to the file of its labels; the released code makes the run lengths only."""
    folder = TemporaryDirectory()
    path = Path(folder.name, "a.jpg")
    Image.fromarray(scene(0, 0, picture).image.permute(1, 2, 0).numpy()).save(path, quality=95)
    boxes = list(boxes_of(picture, objects))
    data = {
        "images": [{"id": 1, "file_name": path.name, "height": picture[0], "width": picture[1]}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)],
    }
    pictures = read_boxes(path.parent, data, "boxes")
    own, side, config = pictures.boxes[0], network.crop, LabelConfig()
    assert len(own) == objects
    (threshold,) = set(config.thresholds)
    classes = [size_class(box.area) for box in own]
    image, windows = pictures.image(0), [window_of(box, LABEL_MARGINS) for box in own]

    def read() -> tuple[Tensor, Tensor]:
        crops = torch.stack([cut(image, window, side) for window in windows])
        pairs = zip(own, windows, strict=True)
        return crops.to(device), torch.stack([box_profiles(*pair, picture, side) for pair in pairs]).to(device)

    crops, profiles = read()
    torch.manual_seed(0)
    model = decided(build_network(network).to(device), normalised_crops(crops)).eval()
    with torch.inference_mode():
        maps = model.backbone(normalised_crops(crops))[-1]
    heads = MaskLabeler(GivenMaps(maps), network.width).to(device).eval()
    heads.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("backbone")})
    soft = probabilities(heads, crops, profiles, classes)

    def pasted() -> BitMasks:
        return BitMasks.cat(
            [paste(each, window, picture, threshold) for each, window in zip(soft, windows, strict=True)]
        )

    masks = pasted()

    def ours() -> list[dict[str, Any]]:
        out = Path(folder.name, "labels.json")  # the folder stays as long as this call
        label(model, pictures, data, out, config, side=side, digest="", batch=batch, device=device)
        found = json.loads(out.read_text())["annotations"]
        out.unlink()
        return [record["segmentation"] for record in found]

    def released() -> list[dict[str, Any]]:
        return released_mal.labels(model, path, own, side, batch, threshold)

    def check() -> str:
        found = BitMasks.from_rle(ours(), picture).to_dense().numpy()
        assert len(found) == objects, f"{len(found)} of {objects} objects have a label"
        near = 0
        for mine, soft in zip(found, released_mal.float_pictures(model, path, own, side, batch), strict=True):
            sure = abs(soft - threshold) > 1e-4
            near += int((~sure).sum())
            off = int((mine != (soft > threshold))[sure].sum())
            assert not off, f"{off} pixels differ from the released ones"
        assert near <= 1e-4 * found.size, f"{near} pixels are near the threshold"
        kinds = ", ".join(f"{classes.count(kind)} {name}" for kind, name in enumerate(SIZE_CLASSES))
        return f"{kinds}; set pixels {found.sum() / sum(box.area for box in own):.0%} of the boxes"

    parts: dict[str, Call] = {
        "decode": lambda: pictures.image(0),
        "crop": read,
        "encoder": torch.inference_mode()(lambda: model.backbone(normalised_crops(crops))),
        "heads": lambda: probabilities(heads, crops, profiles, classes),
        "paste": pasted,
        "RLE": masks.rle,
    }
    return Rivals({"ours": ours, "released": released}, check, parts)


def boxes_of(picture: Size, number: int) -> Iterator[list[float]]:
    """[x, y, width, height] with sides from a twentieth to two thirds of the picture's."""
    g = random(0)
    for share in torch.linspace(0.05, 0.67, number).tolist():
        y, x = torch.rand(2, generator=g).tolist()
        height, width = share * picture[0], share * picture[1]
        yield [x * (picture[1] - width), y * (picture[0] - height), width, height]


_VIT_S: dict[str, Any] = {"width": 384, "heads": 6, "conv_stem": True, "grid": 32}
_TINY = VitConfig(width=32, depth=2, heads=2, conv_stem=True, grid=4)
_STEP = "Mask Auto-Labeler step"

AUTO_LABELER = [
    Program(
        "Mask Auto-Labeler labels",
        "8 objects of 480x640, ViT-S, crops of 512",
        partial(labels, picture=(480, 640), objects=8, network=NetworkConfig(vit=VitConfig(**_VIT_S))),
        partial(labels, picture=(60, 80), objects=5, network=NetworkConfig(vit=_TINY, width=16, crop=64), batch=2),
        images=8,
        unit="objects",
    ),
    Program(
        _STEP,
        "2 crops of 512, ViT-S",
        partial(training, crops=2, side=512, vit=VitConfig(**_VIT_S)),
        partial(training, crops=3, side=64, vit=_TINY, width=16),
        {"time": 2},
        2,
        unit="crops",
    ),
    Program(
        _STEP,
        "4 crops of 512, on given maps of ViT-B",
        partial(training, crops=4, side=512, channels=768),
        partial(training, crops=2, side=64, channels=24, width=16),
        {"time": 20},
        4,
        unit="crops",
    ),
    Program(
        _STEP,
        "4 crops of 512, on given logits",
        partial(losses, crops=4, side=512),
        partial(losses, crops=2, side=64),
        {"time": 20},
        4,
        unit="crops",
    ),
]
