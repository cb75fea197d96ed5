"""The views of a model in the gallery: the prompt of each kernel, and the mean mask of each kernel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sprompt.data.coco import CocoDataset
from sprompt.data.transforms import resize
from sprompt.methods.saliency_prompt import SaliencyPromptConfig
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.protocol import Features
from sprompt.normalisation import MEAN, STD
from sprompt.report.activation import activation_maps, placed, read_activation, save_activation, scatter, spread
from sprompt.report.prompts import prompt_matches


@pytest.fixture
def dataset(disk: Any) -> CocoDataset:
    data = json.loads(disk.proposals.read_text())
    extra = dict(data["annotations"][0], id=9)
    data["annotations"].insert(
        1, extra | {"segmentation": json.loads(disk.labels.read_text())["annotations"][1]["segmentation"]}
    )
    disk.proposals.write_text(json.dumps(data))
    return CocoDataset(disk.images, disk.proposals, class_agnostic=True)


def test_matches_are_the_nearest_prompts_by_cosine(dataset: CocoDataset) -> None:
    torch.manual_seed(0)
    config = KNetConfig(
        depth=18, backbone_width=8, channels=16, kernels=11, num_classes=1, stages=1, heads=2, feedforward=16
    )
    model = KNet(config).eval()
    found = prompt_matches(model, dataset, SaliencyPromptConfig(dropout=0.9), 5, short=80, long=160)
    assert [m.name for m in found] == ["p1.png", "p2.png"] and [len(m.masks) for m in found] == [2, 1]

    sample = dataset[0]  # 40x64, seen at 80x128, padded to 96x128
    image = F.interpolate(sample.image[None].float(), (80, 128), mode="bilinear", antialias=True, align_corners=False)
    image = image.round()
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    padded = F.pad((image - mean) / std, (0, 0, 0, 16))
    with torch.no_grad():
        p5 = model.encode(padded).maps[-1][0]
        prompts = [
            p5[:, 0:2, 0:2].mean((1, 2)),
            p5[:, 0:2, 1:4].mean((1, 2)),
        ]  # boxes 8..40 x 8..40 and 60..120 x 20..60
        kernels = model.rpn_head.kernels(1)[0]
        similarity = torch.stack([F.cosine_similarity(kernels, p[None], dim=1) for p in prompts], 1)
    assert found[0].kernels == similarity.argmax(1).tolist()
    assert set(found[1].kernels) == {0}  # one prompt, none dropped
    assert [m.name for m in prompt_matches(model, dataset, limit=1, short=80, long=160)] == ["p1.png"]
    assert prompt_matches(model, dataset, replace(SaliencyPromptConfig(), assign="none")) == []


class Stub(nn.Module):
    """Its two kernels respond to the red of the picture, and to its width; padding gets extreme values."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))

    def encode(self, images: Tensor) -> Features:
        return Features([], [images])

    def decode(self, features: Features) -> Any:
        (images,) = features.maps
        red = F.avg_pool2d(images[:, :1], 8)
        ramp = torch.linspace(-3, 3, red.shape[3]).expand_as(red)
        return torch.cat([red, ramp], 1)

    def mask_logits(self, outputs: Tensor) -> Tensor:
        return outputs


def test_activation_is_the_mean_sigmoid_of_the_last_masks_without_padding(dataset: CocoDataset) -> None:
    maps = activation_maps(Stub(), dataset, short=80, long=128)
    assert maps.shape == (2, 200, 200) and maps.dtype == torch.float32
    truth = torch.zeros(2, 200, 200)
    for k in range(2):
        sample = dataset[k]
        size = (80, 128) if k == 0 else (128, 80)
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        padded = F.pad((resize(sample, size).image[None] - mean) / std, (0, -size[1] % 32, 0, -size[0] % 32))
        logits = Stub().decode(Features([], [padded])).sigmoid()
        for n, y, x in [(n, y, x) for n in range(2) for y in range(0, 200, 37) for x in range(0, 200, 41)]:
            row, column = (y + 0.5) / 200 * size[0] / 8 - 0.5, (x + 0.5) / 200 * size[1] / 8 - 0.5
            row, column = (min(max(v, 0), top - 1) for v, top in ((row, logits.shape[2]), (column, logits.shape[3])))
            r, c = int(row), int(column)
            r1, c1 = min(r + 1, logits.shape[2] - 1), min(c + 1, logits.shape[3] - 1)
            a, b = row - r, column - c
            m = logits[0, n]
            truth[n, y, x] += 0.5 * (
                (1 - a) * ((1 - b) * m[r, c] + b * m[r, c1]) + a * ((1 - b) * m[r1, c] + b * m[r1, c1])
            )
    there = truth > 0
    assert there.sum() == 2 * 6 * 5
    torch.testing.assert_close(maps[there], truth[there], atol=1e-4, rtol=0)
    one = activation_maps(Stub(), dataset, 1, short=80, long=128)
    assert not torch.equal(one, maps)
    with pytest.raises(ValueError, match="at least one picture"):
        activation_maps(Stub(), [])


def test_activation_files(tmp_path: Path) -> None:
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1))
    save_activation(tmp_path / "a.npz", maps)
    np.testing.assert_allclose(read_activation(tmp_path / "a.npz"), maps.numpy(), atol=1e-3)
    np.testing.assert_array_equal(read_activation(maps), maps.numpy())


def test_spread_is_the_distance_from_the_own_centre() -> None:
    maps = np.zeros((5, 40, 40))
    maps[0] = 1  # uniform: √(1/12 + 1/12), up to the size of a cell
    maps[1, 3, 7] = 0.5  # one cell
    maps[2, 0, 0] = maps[2, 0, 20] = 2.0  # half a width apart
    maps[4, 1:3, 1:3] = np.nan
    expected = [np.sqrt((1 - 1 / 40**2) / 6), 0, 0.25, np.inf, np.inf]
    np.testing.assert_allclose(spread(maps), expected, atol=1e-9)


def test_scatter_is_how_far_centres_lie_from_each_other() -> None:
    maps = np.zeros((5, 40, 40))
    maps[0, 0, 0] = maps[1, 0, 20] = 3.0  # half a width apart: each a quarter from their mean
    assert scatter(maps) == pytest.approx(0.25)  # maps without activation have no centre
    maps[2, 30, 10] = 0.1  # y: 0, 0, 3/4 with variance 1/8, x: 0, 1/2, 1/4 with variance 1/24
    assert scatter(maps) == pytest.approx(np.sqrt(1 / 8 + 1 / 24))
    assert scatter(np.ones((7, 4, 4))) == pytest.approx(0) and np.isnan(scatter(np.zeros((2, 4, 4))))
    assert placed(maps) == "median spread 0.00, centres scattered by 0.41" and placed(np.zeros((2, 4, 4))) == ""
