"""A seed's vector, read from the training view, equals the vector that the proposal was made with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from sprompt.data.coco import CocoDataset
from sprompt.data.folder import PictureFolder
from sprompt.data.pictures import png
from sprompt.data.transforms import Augment, collate
from sprompt.methods.saliency_prompt import ProposalConfig, generate, propose, view
from sprompt.methods.saliency_prompt.seeds import pooled_at, windows_at
from sprompt.methods.saliency_prompt.supervision import seed_vectors


class Cells(nn.Module):
    """Mean colour of the cells of stride 4 to 32, mixed into 8 channels: mirrored images give mirrored maps."""

    channels = (8, 8, 8, 8)
    strides = (4, 8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [avg_pool2d(images, stride) for stride in self.strides]
        return [torch.einsum("dc,bchw->bdhw", self.mix, m).relu() + 0.1 for m in maps]


def pyramid(x: Tensor) -> list[Tensor]:
    """Maps (D, h, w) of the scales, by the definition: bilinear resize to ½ and ¼ of the cells."""
    height, width = x.shape[1] // 4 * 4, x.shape[2] // 4 * 4
    sizes = [(x.shape[1] // 2, x.shape[2] // 2), (height // 4, width // 4)]
    return [
        x,
        *(
            torch.nn.functional.interpolate(x[None, :, : s * h, : s * w], scale_factor=1 / s, mode="bilinear")[0]
            for s, (h, w) in zip((2, 4), sizes, strict=True)
            if h and w
        ),
    ]


@pytest.mark.parametrize("size", [(8, 12), (9, 11), (5, 6), (2, 3), (1, 1)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_address_to_point_to_vector(size: tuple[int, int], mirrored: bool) -> None:
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
    maps = pyramid(x[0])
    addresses = [(s, r, c) for s, m in enumerate(maps) for r in range(m.shape[1]) for c in range(m.shape[2])]
    wanted = torch.stack([maps[s][:, r, c] for s, r, c in addresses])
    points = torch.tensor([[(c + 0.5) * 2**s, (r + 0.5) * 2**s] for s, r, c in addresses])
    if mirrored:
        x, points[:, 0] = x.flip(3), size[1] - points[:, 0]
    scales = torch.tensor([[s for s, _, _ in addresses]])
    torch.testing.assert_close(pooled_at(x, points[None], scales)[0], wanted, atol=1e-6, rtol=0)


def test_points_of_a_table() -> None:
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    table = [
        ((0.0, 0.0, 0), 0.0), ((5.99, 3.99, 0), 23.0), ((6.0, 4.0, 0), 23.0),  # on the border: the nearest cell
        ((2.5, 1.5, 0), 8.0), ((2.0, 1.0, 0), 8.0),
        ((1.0, 1.0, 1), 3.5), ((1.4, 0.6, 1), 3.5), ((0.1, 0.1, 1), 3.5), ((1.6, 2.6, 1), 16.5),  # around the crossing (1, 1)
        ((3.0, 2.0, 1), 11.5), ((2.0, 2.0, 2), 10.5), ((6.0, 4.0, 2), 19.5),
    ]  # fmt: skip
    points = torch.tensor([[p[:2] for p, _ in table]])
    scales = torch.tensor([[p[2] for p, _ in table]])
    assert pooled_at(x, points, scales)[0, :, 0].tolist() == [v for _, v in table]


@pytest.mark.parametrize("grid", [(3, 4), (5, 7), (1, 1), (9, 11), (12, 13)])
def test_windows_are_those_of_adaptive_pooling(grid: tuple[int, int]) -> None:
    x = torch.randn(1, 4, 9, 11, generator=torch.Generator().manual_seed(2))
    padded = torch.nn.functional.pad(x, (0, 3, 0, 2), value=9.0)
    wanted = adaptive_avg_pool2d(x, grid)[0].flatten(1).T
    points = torch.tensor(
        [[(c + 0.5) * 11 / grid[1], (r + 0.5) * 9 / grid[0]] for r in range(grid[0]) for c in range(grid[1])]
    )
    valid = torch.zeros(1, 11, 14, dtype=torch.bool)
    valid[:, :9, :11] = True
    got = windows_at(padded, points[None], grid, torch.tensor([[9, 11]]), valid)[0]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("seeds", ["pyramid", (2, 3)])
@pytest.mark.parametrize("level", ["C5", "C4"])
def test_from_a_picture_through_a_file_to_the_same_vector(
    tmp_path: Path, mirrored: bool, seeds: object, level: str
) -> None:
    """Pictures -> proposal file with vectors -> samples, flipped or not, in one padded batch -> the same vectors."""
    generator = torch.Generator().manual_seed(3)
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate([(64, 96), (96, 64), (64, 64)]):
        coarse = torch.randint(0, 256, (1, 3, 3, 4), generator=generator).float()
        image = torch.nn.functional.interpolate(coarse, size, mode="nearest")[0].to(torch.uint8)
        (folder / f"{i}.png").write_bytes(png(image))
    config = ProposalConfig(
        short=128, long=192, level=level, seeds=seeds, min_score=0.0, centre=0.0, max_width=2.0  # type: ignore[arg-type]  # a str
    )  # fmt: skip
    pictures = PictureFolder(folder)
    backbone = Cells()
    found = {}
    for i in range(3):
        (own,) = propose(backbone, collate([view(pictures[i], config)]), config, vectors=True)
        found[i] = own
    generate(pictures, backbone, config, tmp_path / "proposals.json")

    dataset = CocoDataset(folder, tmp_path / "proposals.json", class_agnostic=True)
    augment = Augment(128, 192, flip=float(mirrored))
    batch = collate([augment(dataset[i], generator) for i in range(len(dataset))])
    assert batch.images.shape[2:] == (192, 192)
    features = backbone(batch.images)[("C2", "C3", "C4", "C5").index(level)]
    vectors = seed_vectors(features, batch, config)
    scales = set()
    for b, image_id in enumerate(batch.image_ids):
        wanted = found[image_id].vectors
        assert wanted is not None
        assert int(batch.counts[b]) == len(wanted) > 0
        torch.testing.assert_close(vectors[b, : len(wanted)], wanted, atol=1e-4, rtol=0)
        scales |= set(found[image_id].seeds[:, 0].tolist())
    if seeds == "pyramid":
        assert len(scales) > 1, "seeds of more than one scale were compared"


@pytest.mark.parametrize(
    ("keep", "address", "point"),
    [
        (True, [0, 0, 0], (8, 8)),
        (True, [1, 0, 2], (80, 16)),
        (False, [0, 0, 0], (16, 12)),
        (False, [1, 1, 1], (96, 72)),
    ],
)
def test_points_in_the_picture(tmp_path: Path, keep: bool, address: list[int], point: tuple[float, float]) -> None:
    """A picture of 96 × 192 pixels seen at 192 × 384, its own ratio, or stretched to 128 × 192."""
    (tmp_path / "a.png").write_bytes(png(torch.zeros(3, 96, 192, dtype=torch.uint8)))
    config = ProposalConfig(short=192, long=384) if keep else ProposalConfig(short=128, long=192, keep_ratio=False)
    mask = {"size": [96, 192], "counts": [0, 96 * 192]}
    data = {
        "info": {"proposals": config.record()},
        "images": [{"id": 0, "file_name": "a.png", "height": 96, "width": 192}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "iscrowd": 0, "segmentation": mask, "seed": address}
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
    (sample,) = [CocoDataset.from_dict(tmp_path, data, "proposals")[0]]
    assert sample.seeds is not None
    assert sample.seeds.tolist() == [[*point, address[0]]]
