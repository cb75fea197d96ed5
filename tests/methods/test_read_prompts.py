"""Prompts from the model's maps: the cells of a box, and the map that is read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sprompt.masks import BitMasks
from sprompt.methods.saliency_prompt import SaliencyPromptConfig, read_prompts
from sprompt.methods.saliency_prompt.prompts import bits_at_centres


def maps_of(height: int, width: int, channels: int = 3, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, channels, height // s, width // s, generator=generator) for s in (4, 8, 16, 32)]


def box_mask(height: int, width: int, *boxes: tuple[int, int, int, int]) -> BitMasks:
    dense = torch.zeros(1, len(boxes), height, width)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        dense[0, i, y1:y2, x1:x2] = 1
    return BitMasks.from_dense(dense)


#: box in pixels of 96 x 160 -> columns and rows of stride 32 (3 x 5 cells), by c0 = ⌊x1/32⌋, c1 = max(⌈x2/32⌉, c0 + 1)
TABLE = [
    ((0, 0, 32, 32), (0, 1), (0, 1)),
    ((0, 0, 33, 32), (0, 2), (0, 1)),  # a cell counts if the box covers one pixel of it
    ((31, 31, 33, 33), (0, 2), (0, 2)),
    ((32, 64, 64, 96), (1, 2), (2, 3)),
    ((40, 40, 41, 41), (1, 2), (1, 2)),  # one pixel, one cell
    ((5, 10, 160, 96), (0, 5), (0, 3)),
    ((159, 95, 160, 96), (4, 5), (2, 3)),
    ((63, 0, 65, 96), (1, 3), (0, 3)),
]


def test_the_cells_of_boxes() -> None:
    maps = maps_of(96, 160)
    masks = box_mask(96, 160, *(box for box, _, _ in TABLE))
    prompts = read_prompts(maps, masks, torch.tensor([len(TABLE)]), SaliencyPromptConfig())
    for l, (_, (c0, c1), (r0, r1)) in enumerate(TABLE):
        torch.testing.assert_close(prompts.vectors[0, l], maps[-1][0, :, r0:r1, c0:c1].mean((1, 2)))


@pytest.mark.parametrize(("level", "stride"), [("P2", 4), ("P3", 8), ("P4", 16), ("P5", 32), ("coarsest", 32)])
def test_levels(level: str, stride: int) -> None:
    maps = maps_of(96, 160)
    masks = box_mask(96, 160, (13, 21, 90, 50))
    got = read_prompts(maps, masks, torch.tensor([1]), SaliencyPromptConfig(level=level)).vectors[0, 0]  # type: ignore[arg-type]  # a str
    rows, columns = slice(21 // stride, -(-50 // stride)), slice(13 // stride, -(-90 // stride))
    x = maps[(4, 8, 16, 32).index(stride)]
    torch.testing.assert_close(got, x[0, :, rows, columns].mean((1, 2)))


def test_level_by_size() -> None:
    """k = clamp(⌊log₂(√area / 56)⌋, 0, 3), of boxes on both sides of the bounds."""
    boxes = [(0, 0, 8, 8), (0, 0, 111, 111), (0, 0, 112, 112), (0, 0, 224, 56), (0, 0, 223, 224), (0, 0, 224, 224), (0, 0, 448, 448),
             (0, 0, 512, 480)]  # fmt: skip
    maps = maps_of(480, 512)
    got = read_prompts(maps, box_mask(480, 512, *boxes), torch.tensor([8]), SaliencyPromptConfig(level="auto")).vectors
    levels = []
    for l, (_, _, x2, y2) in enumerate(boxes):
        k = min(max(math.floor(math.log2(math.sqrt(x2 * y2) / 56)), 0), 3)
        s = 4 * 2**k
        levels.append(k)
        torch.testing.assert_close(got[0, l], maps[k][0, :, : -(-y2 // s), : -(-x2 // s)].mean((1, 2)))
    assert levels == [0, 0, 1, 1, 1, 2, 3, 3]


def test_a_level_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="level: must be one of P2 to P3"):
        read_prompts(
            maps_of(96, 160)[:2], box_mask(96, 160, (0, 0, 9, 9)), torch.tensor([1]), SaliencyPromptConfig(level="P5")
        )


def test_mask_pooling_takes_cells_whose_centre_is_in_the_mask() -> None:
    maps = maps_of(96, 160)
    generator = torch.Generator().manual_seed(1)
    dense = (
        torch.nn.functional.interpolate(torch.rand(1, 4, 6, 9, generator=generator), (96, 160), mode="bilinear") > 0.6
    )
    dense[0, 2] = 0
    dense[0, 2, 2:9, 40:50] = 1  # no centre: the box instead
    masks = BitMasks.from_dense(dense)
    centres = dense[:, :, 16::32, 16::32]
    assert torch.equal(bits_at_centres(masks, (3, 5)), centres)
    got = read_prompts(maps, masks, torch.tensor([4]), SaliencyPromptConfig(pooling="mask")).vectors[0]
    for l in range(4):
        cells = maps[-1][0][:, centres[0, l]] if l != 2 else maps[-1][0, :, 0, 1:2]
        assert cells.shape[1] > 0
        torch.testing.assert_close(got[l], cells.mean(1))


def test_empty_masks_and_padding_are_zero_prompts() -> None:
    maps = [torch.cat([m, m]) for m in maps_of(96, 160)]
    dense = torch.zeros(2, 2, 96, 160)
    dense[0, 0, 5:9, 5:9] = 1
    dense[0, 1, 0:40, 0:40] = 1
    prompts = read_prompts(maps, BitMasks.from_dense(dense), torch.tensor([1, 2]), SaliencyPromptConfig())
    assert prompts.vectors[0, 0].abs().sum() > 0
    assert not prompts.vectors[0, 1].any(), "behind counts"
    assert not prompts.vectors[1].any(), "empty"
    none = read_prompts(maps, BitMasks.from_dense(dense[:, :0]), torch.tensor([0, 0]), SaliencyPromptConfig())
    assert none.vectors.shape == (2, 0, 3)


def test_prompts_have_no_gradient() -> None:
    maps = [m.requires_grad_() for m in maps_of(96, 160)]
    prompts = read_prompts(
        maps, box_mask(96, 160, (3, 3, 70, 70)), torch.tensor([1]), SaliencyPromptConfig(level="auto")
    )
    assert not prompts.vectors.requires_grad
    assert np.isfinite(prompts.vectors.numpy()).all()


def test_the_cells_of_the_release() -> None:
    """⌊x1/32⌋ to ⌊x2/32⌋, or two cells if these are equal; the map cuts off cells outside."""
    boxes = [(0, 0, 33, 32), (40, 40, 41, 41), (5, 10, 160, 96), (131, 0, 159, 96)]
    cells = [((0, 1), (0, 1)), ((1, 3), (1, 3)), ((0, 5), (0, 3)), ((4, 5), (0, 3))]
    maps = maps_of(96, 160)
    config = SaliencyPromptConfig(pooling="release")
    prompts = read_prompts(maps, box_mask(96, 160, *boxes), torch.tensor([len(boxes)]), config)
    for l, ((c0, c1), (r0, r1)) in enumerate(cells):
        torch.testing.assert_close(prompts.vectors[0, l], maps[-1][0, :, r0:r1, c0:c1].mean((1, 2)))


def test_roi_align_with_one_bin() -> None:
    """Against samples taken one by one, in float64, from the bilinear interpolation of the map."""
    maps = maps_of(96, 160)
    boxes = [(0, 0, 32, 32), (40, 41, 47, 90), (5, 10, 160, 96), (31, 0, 33, 96), (159, 95, 160, 96)]
    got = read_prompts(
        maps, box_mask(96, 160, *boxes), torch.tensor([len(boxes)]), SaliencyPromptConfig(pooling="roi_align")
    ).vectors[0]
    x = maps[-1][0].double().numpy()
    for l, (x1, y1, x2, y2) in enumerate(np.array(boxes) / 32):
        ny, nx = math.ceil(y2 - y1), math.ceil(x2 - x1)
        total = np.zeros(len(x))
        for i in range(ny):
            for j in range(nx):
                row = min(max(y1 + (y2 - y1) * (i + 0.5) / ny - 0.5, 0), x.shape[1] - 1)
                column = min(max(x1 + (x2 - x1) * (j + 0.5) / nx - 0.5, 0), x.shape[2] - 1)
                r, c = min(int(row), x.shape[1] - 2), min(int(column), x.shape[2] - 2)
                u, v = row - r, column - c
                top, low = (x[:, k, c] * (1 - v) + x[:, k, c + 1] * v for k in (r, r + 1))
                total += top * (1 - u) + low * u
        np.testing.assert_allclose(got[l].numpy(), total / (ny * nx), atol=1e-5)


@pytest.mark.parametrize("level", ["P3", "auto", "features"])
def test_contrast_tells_by_the_angle(level: str) -> None:
    """⟨v − μ ‖v‖/‖μ‖, x⟩ > 0 where cos(x, v) > cos(x, μ); in float64, μ over the cells of the picture without its padding."""
    maps = [
        torch.randn(2, 5, 96 // s, 160 // s, generator=torch.Generator().manual_seed(s)) + 1 for s in (4, 8, 16, 32)
    ]
    x = maps[0] if level == "auto" else maps[1]  # boxes this small are read from P2
    own = maps if level != "features" else [x]
    boxes = [(8, 16, 40, 48), (64, 0, 96, 32)]
    masks = BitMasks.stack([box_mask(96, 160, *boxes)[0], box_mask(96, 160, *boxes)[0]])
    config = SaliencyPromptConfig(level=level, contrast=True)  # type: ignore[arg-type]  # a str
    got = read_prompts(own, masks, torch.tensor([2, 1]), config, [(96, 160), (80, 100)]).vectors.double()
    stride = 160 // x.shape[3]
    for b, (height, width) in enumerate([(96, 160), (80, 100)]):
        cells = x[b].double()
        mean = cells[:, : -(-height // stride), : -(-width // stride)].mean((1, 2))
        for l, (x1, y1, x2, y2) in enumerate(boxes[: 2 - b]):
            v = cells[:, y1 // stride : y2 // stride, x1 // stride : x2 // stride].mean((1, 2))
            torch.testing.assert_close(got[b, l], v - mean * v.norm() / mean.norm(), atol=1e-5, rtol=0)
            nearer = torch.cosine_similarity(cells, v[:, None, None], 0) - torch.cosine_similarity(
                cells, mean[:, None, None], 0
            )
            sure = nearer.abs() > 1e-5
            product = torch.einsum("c,chw->hw", got[b, l], cells)
            assert sure.float().mean() > 0.99 and 0.1 < (nearer > 0).float().mean() < 0.9
            assert torch.equal((product > 0)[sure], (nearer > 0)[sure])
    assert not got[1, 1].any(), "behind counts"


def test_contrast_with_a_picture_of_nothing() -> None:
    maps = [torch.zeros(1, 3, 3, 5)]
    maps[0][0, :, 0, 0], maps[0][0, :, 0, 1] = 1.0, -1.0  # the mean is 0
    got = read_prompts(maps, box_mask(96, 160, (0, 0, 32, 32)), torch.tensor([1]), SaliencyPromptConfig(contrast=True))
    assert torch.equal(got.vectors, torch.ones(1, 1, 3))
