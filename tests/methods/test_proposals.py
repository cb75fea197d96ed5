"""Proposals of pictures, compared with an independent float64 implementation of §2.2–2.9, and properties that must hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

from sprompt.data.sample import Batch, Sample
from sprompt.data.transforms import collate
from sprompt.masks import BitMasks
from sprompt.methods.saliency_prompt import ProposalConfig, propose, view
from sprompt.methods.saliency_prompt.precision import exact_products
from sprompt.methods.saliency_prompt.proposals import image_level, valid_cells, view_size

OPEN = {"centre": 0.0, "max_width": 2.0, "min_score": 0.0}  # no filter of whole pictures


class Maps(nn.Module):
    """A backbone that returns one fixed map for all of its levels and all images."""

    def __init__(self, features: Tensor, strides: tuple[int, ...] = (4, 8, 16, 32)) -> None:
        super().__init__()
        self.features, self.strides = features, strides

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.features] * len(self.strides)


def batch_of(cells: tuple[int, int], size: tuple[int, int], original: tuple[int, int], number: int = 1) -> Batch:
    """A batch of blank images; its map of stride 32 has `cells` cells."""
    return Batch(
        images=torch.zeros(number, 3, 32 * cells[0], 32 * cells[1]),
        masks=BitMasks.from_dense(torch.zeros(number, 0, 32 * cells[0], 32 * cells[1])),
        labels=torch.zeros(number, 0, dtype=torch.int64),
        counts=torch.zeros(number, dtype=torch.int64),
        sizes=[size] * number,
        image_ids=list(range(number)),
        names=[""] * number,
        original_sizes=[original] * number,
    )


def smooth(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Blobs, as features of a network are: positive, smooth, of a few directions."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, channels, 4, 5, generator=generator) ** 3
    fine = torch.rand(1, channels, height, width, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(min=0) + 0.05 * fine


# -- the independent implementation -----------------------------------------------------------------------------------------------


def resized_half_pixel(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear values of x (h, w) at fractional places; edges are repeated."""
    grid = np.meshgrid(np.clip(rows, 0, x.shape[0] - 1), np.clip(columns, 0, x.shape[1] - 1), indexing="ij")
    return map_coordinates(x, grid, order=1, mode="nearest")


def oracle_seeds(x: np.ndarray, config: ProposalConfig) -> list[tuple[tuple[int, int, int], np.ndarray]]:
    """The seeds of a map (D, h, w) without padding."""
    depth, height, width = x.shape
    seeds = []
    if config.seeds != "pyramid":
        gh, gw = config.seeds
        for r in range(gh):
            for c in range(gw):
                rows = slice(r * height // gh, -(-(r + 1) * height // gh))
                columns = slice(c * width // gw, -(-(c + 1) * width // gw))
                seeds.append(((0, r, c), x[:, rows, columns].reshape(depth, -1).mean(1)))
        return seeds
    for scale in range(3):
        factor = 2**scale
        rows = (np.arange(height // factor) + 0.5) * factor - 0.5
        columns = (np.arange(width // factor) + 0.5) * factor - 0.5
        maps = np.stack([resized_half_pixel(channel, rows, columns) for channel in x])
        for r in range(len(rows)):
            for c in range(len(columns)):
                seeds.append(((scale, r, c), maps[:, r, c]))
    return seeds


def oracle(
    x: np.ndarray, config: ProposalConfig, size: tuple[int, int], original: tuple[int, int], stride: int = 32
) -> list[dict]:
    """§2.2–2.9 for one picture with a view of size `size` and the map x (D, h, w) of this stride, without padded cells."""
    pixels = x.reshape(len(x), -1)
    found = []
    for address, seed in oracle_seeds(x, config):
        y = seed @ pixels
        if config.similarity == "cosine":
            y = y / (max(np.linalg.norm(seed), 1e-12) * np.maximum(np.linalg.norm(pixels, axis=0), 1e-12))
        if y.max() - y.min() < 1e-6:
            continue
        soft = (y - y.min()) / (y.max() - y.min())
        binary = soft >= config.threshold
        if binary.sum() >= config.min_area:
            found.append({"seed": address, "soft": soft, "binary": binary, "score": soft[binary].mean()})
    found.sort(key=lambda f: -f["score"])
    if not found:
        return []
    b = np.stack([f["binary"] for f in found]).astype(float)
    inter = b @ b.T
    iou = inter / (b.sum(1)[:, None] + b.sum(1) - inter)
    if config.nms.startswith("matrix"):
        above = np.triu(iou, 1)
        most = above.max(0)
        for j in range(len(found)):
            if config.nms == "matrix":
                decay = [
                    np.exp(-config.sigma * iou[i, j] ** 2) / np.exp(-config.sigma * most[i] ** 2) for i in range(j)
                ]
            else:
                decay = [(1 - iou[i, j]) / max(1 - most[i], 1e-6) for i in range(j)]
            found[j]["score"] *= min(decay, default=1.0)
        found.sort(key=lambda f: -f["score"])
    else:
        kept: list[int] = []
        for j in range(len(found)):
            if not any(iou[i, j] > config.iou_threshold for i in kept):
                kept.append(j)
        found = [found[j] for j in kept]
    results = []
    height, width = original
    for f in found[: config.max_masks]:
        grid = f["soft"].reshape(x.shape[1:])
        rows = (np.arange(height) + 0.5) * (size[0] / stride) / height - 0.5
        columns = (np.arange(width) + 0.5) * (size[1] / stride) / width - 0.5
        full = resized_half_pixel(grid, rows, columns)
        mask = full >= config.threshold
        if not mask.any():
            continue
        ys, xs = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        if not (ys.mean() > config.centre * height and xs[-1] + 1 - xs[0] < config.max_width * width):
            continue
        if f["score"] >= config.min_score:
            results.append({**f, "mask": mask, "unsure": np.abs(full - config.threshold) < 1e-5})
    return results


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("nms", ["matrix", "matrix_linear", "greedy"])
@pytest.mark.parametrize("seeds", ["pyramid", (3, 4)])
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (14,)], ids=["four maps", "one map"])
def test_proposals_are_those_of_an_independent_implementation(
    similarity: str, nms: str, seeds: object, strides: tuple[int, ...]
) -> None:
    config = ProposalConfig(similarity=similarity, nms=nms, seeds=seeds, min_score=0.1, max_width=1.01)  # type: ignore[arg-type]  # a str
    compared = 0
    for seed in range(6):
        x = smooth(seed, 6, 9, 12)
        # padding cuts into the last cells, whose centre stays valid
        size, original = (9 * strides[-1] - strides[-1] // 3, 12 * strides[-1] - strides[-1] // 4), (130, 170)
        (got,) = propose(Maps(x, strides), batch_of((9, 12), size, original), config, vectors=True)
        want = oracle(x[0].double().numpy(), config, size, original, strides[-1])
        assert got.scores.tolist() == sorted(got.scores.tolist(), reverse=True)
        by_seed = {tuple(s): i for i, s in enumerate(got.seeds.tolist())}
        assert set(by_seed) == {f["seed"] for f in want}
        vectors = dict(oracle_seeds(x[0].double().numpy(), config))
        assert got.vectors is not None
        for f in want:
            i = by_seed[f["seed"]]
            assert float(got.scores[i]) == pytest.approx(f["score"], abs=2e-5)
            different = got.masks[i].to_dense().numpy() != f["mask"]
            assert not (different & ~f["unsure"]).any()
            np.testing.assert_allclose(got.vectors[i].numpy(), vectors[f["seed"]], atol=1e-6)
            compared += 1
    assert compared >= 3


def test_a_level_that_the_backbone_lacks() -> None:
    with pytest.raises(ValueError, match="ProposalConfig: level must be C5 for a backbone with one map, got C4"):
        propose(Maps(torch.zeros(1, 2, 4, 4), (16,)), batch_of((4, 4), (64, 64), (64, 64)), ProposalConfig(level="C4"))


# -- §16 --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_two_orthogonal_halves_give_two_proposals_of_score_1(similarity: str) -> None:
    x = torch.zeros(1, 5, 24, 40)
    x[:, 1, :, :20] = x[:, 3, :, 20:] = 2.0
    config = ProposalConfig(similarity=similarity)  # type: ignore[arg-type]  # a str
    (found,) = propose(Maps(x), batch_of((24, 40), (768, 1280), (240, 400)), config)
    assert found.scores.tolist() == [1.0, 1.0]
    assert sorted(found.masks.boxes().tolist()) == [[0, 0, 200, 240], [200, 0, 400, 240]]
    assert found.masks.area().tolist() == [200 * 240] * 2


def test_duplicate_seeds_leave_one_proposal() -> None:
    """All cells of a half are duplicates: after the first, e⁻² of the score is left, which is below min_score."""
    x = torch.zeros(1, 2, 6, 8)
    x[:, 0, :, :3] = x[:, 1, :, 3:] = 1.0
    (cut,) = propose(Maps(x), batch_of((6, 8), (192, 256), (60, 80)), ProposalConfig())
    (uncut,) = propose(Maps(x), batch_of((6, 8), (192, 256), (60, 80)), ProposalConfig(min_score=0.0))
    assert len(cut.scores) == 2
    assert len(uncut.scores) == 20
    torch.testing.assert_close(uncut.scores[2:], torch.full((18,), float(np.exp(-2))))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("scale", [2.0**-6, 2.0**5])
def test_scaling_all_features_changes_nothing(similarity: str, scale: float) -> None:
    x = smooth(5, 8, 12, 16)
    config = ProposalConfig(similarity=similarity, min_score=0.1)  # type: ignore[arg-type]  # a str
    batch = batch_of((12, 16), (384, 512), (100, 140))
    (a,), (b,) = propose(Maps(x), batch, config), propose(Maps(scale * x), batch, config)
    assert len(a.scores) > 0
    assert torch.equal(a.masks.words, b.masks.words)
    assert torch.equal(a.seeds, b.seeds)
    torch.testing.assert_close(a.scores, b.scores)


def test_scaling_one_pixel_changes_dot_only() -> None:
    """Seeds of scale 1 only: a grid as fine as the map."""
    x = smooth(6, 8, 10, 12)
    scaled = x.clone()
    scaled[:, :, 4, 7] *= 8
    batch = batch_of((10, 12), (320, 384), (100, 120))
    same = {}
    for similarity in ("cosine", "dot"):
        config = ProposalConfig(similarity=similarity, seeds=(10, 12), **OPEN)  # type: ignore[arg-type]  # options of any type
        (a,), (b,) = propose(Maps(x), batch, config), propose(Maps(scaled), batch, config)
        same[similarity] = torch.equal(a.masks.words, b.masks.words)
    assert same == {"cosine": True, "dot": False}


# -- padding, sizes, filters ------------------------------------------------------------------------------------------------------


def test_padding_is_neither_seed_nor_pixel() -> None:
    """A picture gives the same proposals alone, and padded with whole cells of any values."""
    x = smooth(7, 6, 8, 8)
    wide = torch.cat([x, 50 * torch.rand(1, 6, 8, 4)], 3)
    config = ProposalConfig(**OPEN)  # type: ignore[arg-type]  # options of any type
    (a,) = propose(Maps(x), batch_of((8, 8), (256, 256), (90, 90)), config)
    (b,) = propose(Maps(wide), batch_of((8, 12), (256, 256), (90, 90)), config)
    assert len(a.scores) > 0
    assert torch.equal(a.seeds, b.seeds)
    torch.testing.assert_close(a.scores, b.scores)
    assert torch.equal(a.masks.to_dense(), b.masks.to_dense())


def test_a_mask_reaches_the_edge_of_the_picture() -> None:
    """480×640 becomes 800×1067. Its last 11 columns lie in a cell that is not valid; they belong to the mask nevertheless."""
    x = torch.zeros(1, 2, 25, 34)
    x[:, 0], x[:, 1, :, 17:] = 1 - (torch.arange(34) >= 17).float(), 1
    config = ProposalConfig(nms="greedy", centre=0.0)
    (found,) = propose(Maps(x), batch_of((25, 34), (800, 1067), (480, 640)), config)
    boxes = sorted(found.masks.boxes().tolist())
    assert len(boxes) == 2 and boxes[0][0] == 0 and boxes[1][2] == 640
    assert [box[1::2] for box in boxes] == [[0, 480]] * 2


@pytest.mark.parametrize(
    ("width", "cells", "stride"),
    [(1333, 42, 32), (1328, 41, 32), (1329, 42, 32), (1333, 83, 16), (64, 2, 32), (1, 0, 32)],
)
def test_a_cell_is_valid_where_its_centre_is_in_the_image(width: int, cells: int, stride: int) -> None:
    valid = valid_cells([(64, width)], (64 // stride, 1344 // stride), stride)[0]
    assert valid.sum(1).tolist() == [cells] * (64 // stride)


@pytest.mark.parametrize(
    ("size", "keep", "expected"),
    [((480, 640), True, (800, 1067)), ((480, 640), False, (800, 1333)), ((1000, 300), True, (1333, 400))],
)
def test_size_of_the_view(size: tuple[int, int], keep: bool, expected: tuple[int, int]) -> None:
    assert view_size(size, ProposalConfig(keep_ratio=keep)) == expected
    image = torch.zeros(3, *size, dtype=torch.uint8)
    sample = Sample(image, BitMasks.from_dense(torch.zeros(0, *size)), torch.zeros(0, dtype=torch.int64), 0, "", size)
    batch = collate([view(sample, ProposalConfig(keep_ratio=keep))])
    assert batch.sizes == [expected]
    assert batch.original_sizes == [size]


def test_threshold_is_reached_not_passed() -> None:
    """The upper half of the map is exactly τ after normalisation, at cells and at pixels."""
    x = torch.tensor([1.0, 0.5, 0.5, 0.0]).reshape(1, 1, 4, 1).expand(1, 1, 4, 4)
    x = torch.cat([x, torch.zeros_like(x)], 1)
    config = ProposalConfig(similarity="dot", seeds=(1, 1), **OPEN)
    (found,) = propose(Maps(x), batch_of((4, 4), (128, 128), (4, 4)), config)
    assert found.masks.to_dense()[0, :, 0].tolist() == [True, True, True, False]


def masks_of(*boxes: tuple[int, int, int, int]) -> BitMasks:
    dense = torch.zeros(len(boxes), 100, 200)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        dense[i, y1:y2, x1:x2] = 1
    return BitMasks.from_dense(dense)


def test_filters_of_whole_pictures() -> None:
    masks = masks_of(
        (10, 10, 60, 60),  # stays
        (10, 0, 60, 41),  # rows 0 to 40, mean 20: not below a fifth
        (10, 0, 60, 42),  # mean 20.5
        (0, 50, 190, 60),  # 190 = 0.95 of 200 columns
        (0, 50, 189, 60),
        (10, 10, 60, 60),  # score too low
        (0, 0, 0, 0),
    )
    scores = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.8, 0.69, 0.9])
    assert image_level(masks, scores, ProposalConfig()).tolist() == [0, 2, 4]
    assert image_level(masks, scores, ProposalConfig(min_score=0.95)).tolist() == []
    assert image_level(masks, scores, ProposalConfig(min_score=0.95, keep_best=True)).tolist() == [0]
    assert image_level(masks[6:], scores[6:], ProposalConfig(keep_best=True)).tolist() == []


def test_masks_along_the_border_are_removed() -> None:
    """A picture of 60 x 100 pixels; the band of 0.05 is 3 pixels wide, since pixels 0, 1 and 2 have their centres below 3."""

    def kept(*boxes: tuple[int, int, int, int], border: float = 0.05) -> list[bool]:
        """Whether the union of rectangles x1, y1, x2, y2 stays."""
        dense = torch.zeros(1, 60, 100, dtype=torch.bool)
        for x1, y1, x2, y2 in boxes:
            dense[0, y1:y2, x1:x2] = True
        config = ProposalConfig(**{**OPEN, "border": border})
        return bool(len(image_level(BitMasks.from_dense(dense), torch.ones(1), config)))

    assert not kept((0, 10, 2, 50)) and kept((0, 10, 2, 50), border=0.0)  # a strip on the left
    assert not kept((0, 0, 100, 3), (97, 0, 100, 60))  # an L at the top and on the right
    assert not kept((0, 0, 100, 60), border=0.5)
    assert kept((0, 30, 6, 40)) and not kept((0, 30, 5, 40))  # half of the pixels in the band; more than half
    assert kept((30, 57, 40, 60), border=0.02) and not kept(
        (30, 57, 40, 60)
    )  # a third of the pixels in the band; all of them
    assert kept((1, 10, 3, 50)) and kept((40, 1, 60, 3))  # near the border, but not at it
    assert kept((0, 30, 20, 60))  # a corner of an object


def test_a_map_that_is_flat_or_has_nan_gives_no_proposals() -> None:
    for x in (torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), torch.nan)):
        (found,) = propose(Maps(x), batch_of((8, 8), (256, 256), (50, 60)), ProposalConfig(), vectors=True)
        assert (len(found.masks), len(found.scores), found.seeds.shape) == (0, 0, (0, 3))
        assert found.vectors is not None and found.vectors.shape == (0, 3)


def test_one_zero_pixel_spoils_nothing() -> None:
    x = torch.zeros(1, 2, 8, 8)
    x[:, 0, :, :4] = x[:, 1, :, 4:] = 1.0
    x[:, :, 0, 0] = 0.0
    (found,) = propose(Maps(x), batch_of((8, 8), (256, 256), (80, 80)), ProposalConfig())
    assert len(found.scores) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("short", 0), ("long", 5), ("level", "C6"), ("seeds", (0, 3)), ("seeds", "grid"), ("similarity", "l2"), ("threshold", 0.0),
     ("nms", "soft"), ("min_area", 0), ("max_masks", True), ("sigma", float("nan")), ("min_score", 1.5), ("border", 0.6)],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"ProposalConfig: {name} must .*, got"):
        replace(ProposalConfig(), **{name: value})  # type: ignore[arg-type]  # options of any type


def test_settings_survive_the_record() -> None:
    config = ProposalConfig(short=96, seeds=(3, 5), level="C4", border=0.1, keep_best=True)
    assert ProposalConfig.from_record({**config.record(), "seeds": [3, 5], "backbone": "x"}) == config
    assert config.record()["stride"] == 16
    assert (
        "border" not in ProposalConfig().record() and ProposalConfig.from_record(ProposalConfig().record()).border == 0
    )


def state() -> list[object]:
    cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn
    found: list[object] = [cuda.fp32_precision, mkldnn.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]
    try:
        return [*found, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
    except RuntimeError:
        return [*found, "mixed"]


@pytest.mark.parametrize("user", ["nothing", "old", "new"])
def test_switches_of_precision_are_put_back(user: str) -> None:
    start = state()
    try:
        if user == "old":
            torch.set_float32_matmul_precision("medium")
        if user == "new":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        before = state()
        with pytest.raises(KeyError), exact_products(torch.device("cpu")):
            raise KeyError
        assert state() == before
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_products(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert state()[:3] == ["ieee", "ieee", "ieee"]
            assert torch.get_float32_matmul_precision() == "highest"
        assert state() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = start[0]  # type: ignore[assignment]  # saved as Any
        torch.backends.mkldnn.matmul.fp32_precision = start[1]  # type: ignore[assignment]  # saved as Any
    assert state() == start
