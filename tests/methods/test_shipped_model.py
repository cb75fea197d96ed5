"""The backbone of the small model in the package finds objects in scenes that it was not trained on."""

from pathlib import Path

import torch
from torch.nn.functional import interpolate

import sprompt
from sprompt.data.synthetic import scene
from sprompt.nn.resnet import ResNet
from sprompt.nn.weights import open_backbone
from sprompt.normalisation import MEAN, STD
from sprompt.ops import saliency_masks

PATH = Path(sprompt.__file__).parent / "weights" / "scenes-knet.safetensors"


def best_overlaps(backbone: ResNet, count: int = 6) -> torch.Tensor:
    """The largest IoU of each object of `count` scenes with a proposal."""
    scenes = [scene(977, index) for index in range(count)]
    images = torch.stack(
        [(s.image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1) for s in scenes]
    )
    with torch.no_grad():
        maps = backbone(interpolate(images, size=(480, 480), mode="bilinear"))
    found = saliency_masks(maps[1], return_soft=True)
    soft = interpolate(found.soft * (found.scores >= 0.7)[..., None, None], size=(160, 160), mode="bilinear")
    overlaps = []
    for masks, s in zip(soft >= 0.5, scenes, strict=True):
        a, b = masks.flatten(1).double(), s.masks.flatten(1).double()
        shared = a @ b.T
        overlaps.append((shared / (a.sum(1)[:, None] + b.sum(1) - shared)).amax(0))
    return torch.cat(overlaps)


def test_finds_objects():
    assert PATH.stat().st_size <= 8e6
    backbone = open_backbone(PATH)
    assert (backbone.depth, backbone.width, backbone.training) == (18, 32, False)
    torch.manual_seed(0)
    untrained = ResNet(18, width=32).eval()
    trained, blind = best_overlaps(backbone), best_overlaps(untrained)
    # The committed weights have 0.4 and 0.13; the bounds are looser, for weights made on another machine.
    assert trained.mean() > 0.3
    assert trained.mean() > 2 * blind.mean()
