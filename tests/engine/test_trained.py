"""A trained model in a program: any kind of picture, and results in the forms of other libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import sprompt
from sprompt.data.errors import DataError
from sprompt.data.given import as_rgb
from sprompt.engine.trained import Trained
from sprompt.masks import BitMasks
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.knet.checkpoint import export_checkpoint
from sprompt.models.saved import save_model

TINY = KNetConfig(depth=18, backbone_width=4, channels=16, kernels=5, num_classes=3, heads=2, feedforward=24, stages=2)
CLASSES = ["disc", "ring", "bar"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(tmp_path / "model.safetensors", KNet(TINY), CLASSES, {"short": 64, "long": 96})
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Trained:
    return sprompt.load(folder, device="cpu")


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_every_kind_of_picture_gives_the_same(model: Trained, tmp_path: Path) -> None:
    array = pixels(50, 70)
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(array), array, tensor, tensor.float() / 255]
    found = model.predict(kinds, max_per_image=7)
    assert [f.name for f in found] == [str(tmp_path / "a.png")] * 2 + [f"picture {i}" for i in range(2, 6)]
    for other in found:
        assert 0 < len(other) <= 7 and other.masks.size == (50, 70)
        assert torch.equal(other.masks.words, found[0].masks.words) and torch.equal(other.scores, found[0].scores)
    single = model.predict(array, max_per_image=7)
    assert torch.equal(single.scores, found[0].scores) and single.classes == CLASSES


def test_pictures_of_any_size_in_batches_are_as_alone(model: Trained) -> None:
    pictures = [pixels(40 + 9 * i, 64 - 5 * i, i) for i in range(5)]
    for together, alone in zip(model.predict(pictures, batch_size=3), map(model.predict, pictures), strict=True):
        assert together.masks.size == alone.masks.size and torch.equal(together.labels, alone.labels)
        torch.testing.assert_close(together.scores, alone.scores, rtol=1e-5, atol=1e-6)


def test_grey_and_transparent_pictures(model: Trained) -> None:
    grey = pixels(40, 40)[..., 0]
    rgb = np.repeat(grey[..., None], 3, 2)
    with_alpha = np.concatenate([rgb, np.full((40, 40, 1), 9, np.uint8)], 2)
    wanted = model.predict(rgb)
    for kind in (grey, with_alpha, torch.from_numpy(grey)[None], Image.fromarray(grey)):
        assert torch.equal(model.predict(kind).scores, wanted.scores)


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_pil_images_of_16_bits_are_scaled(kind: type) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (7, 9)).astype(kind)
    wanted = np.round(values / 257)
    assert (as_rgb(Image.fromarray(values), "picture 0").numpy() == wanted).all()


def test_pil_images_are_turned_as_exif_says(tmp_path: Path) -> None:
    values = pixels(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it clockwise by a right angle
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as opened:
            assert (as_rgb(opened, name).permute(1, 2, 0).numpy() == np.rot90(values, -1)).all()


def test_a_broken_pil_image_is_named(model: Trained, tmp_path: Path) -> None:
    Image.fromarray(pixels(64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with Image.open(tmp_path / "a.png") as opened, pytest.raises(DataError, match="picture 0: is a broken picture"):
        model.predict(opened)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"picture 0: an array must have shape \(H, W\)"),
        (np.zeros((4, 4, 3), np.int64), "picture 0: must hold uint8, or floats between 0 and 1, got torch.int64"),
        (np.full((4, 4, 3), 200.0), "picture 0: floats must lie between 0 and 1, got 200 to 200; divide by 255"),
        (np.full((4, 4, 3), np.nan), "picture 0: floats must lie between 0 and 1, got nan"),
        (torch.zeros(4, 4, 3), r"picture 0: a tensor must have shape \(3, H, W\), got \(4, 4, 3\)"),
        (torch.zeros(3, 0, 4), "picture 0: a tensor must have shape"),
    ],
)
def test_what_is_no_picture_is_named(model: Trained, picture: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model.predict([picture])
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        model.predict("none.png")
    with pytest.raises(DataError, match="picture 0: must be a path, a PIL image, an array or a tensor, got int"):
        model.predict([3])


def test_results_in_other_forms(model: Trained) -> None:
    found = model.predict(pixels(50, 70)).above(0.0)
    dense = found.masks.to_dense().numpy()
    for k, (record, rle) in enumerate(zip(found.to_coco(7, [4, 6, 9]), found.rle(), strict=True)):
        assert record["image_id"] == 7 and record["category_id"] == (4, 6, 9)[int(found.labels[k])]
        assert rle["counts"].decode() == record["segmentation"]["counts"]
        np.testing.assert_array_equal(coco_mask.decode(rle), dense[k])
        assert record["bbox"] == coco_mask.toBbox(rle).tolist()
    assert [r["category_id"] for r in found.to_coco(1)] == (found.labels + 1).tolist()
    tensors, arrays = found.tensors(), found.arrays()
    assert tensors["masks"].shape == (len(found), 1, 50, 70) and tensors["boxes"].shape == (len(found), 4)
    assert arrays["xyxy"].shape == (len(found), 4) and arrays["mask"].dtype == np.bool_
    np.testing.assert_array_equal(arrays["mask"], dense)
    assert found.names == [CLASSES[label] for label in found.labels.tolist()]
    few = found.above(float(found.scores.median()))
    assert 0 < len(few) < len(found) and bool((few.scores > found.scores.median()).all())
    drawn = few.draw()
    assert drawn.mode == "RGB" and drawn.width / drawn.height == pytest.approx(70 / 50, rel=0.01)
    nothing = found.above(1.0)
    assert len(nothing) == 0 and nothing.to_coco(1) == [] and nothing.arrays()["xyxy"].shape == (0, 4)
    assert nothing.draw().size == drawn.size


def test_an_official_file_needs_the_name_of_its_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = KNet(TINY)
    export_checkpoint(network, tmp_path / "official.pth")
    trained = sprompt.load(tmp_path / "official.pth", model=TINY, device="cpu")
    assert trained.classes is None and trained.names == ["0", "1", "2"] and trained.size == (800, 1333)
    own, other = network.state_dict(), trained.model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)
    with pytest.raises(ValueError, match="must be one of knet, mask2former, fastinst, queryinst, got 'detr'"):
        sprompt.load(tmp_path / "official.pth", model="detr")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model\.safetensors; has its training finished\?"):
        sprompt.load(tmp_path)


def test_empty_masks_are_no_results(model: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KNet.predictions

    def with_empty(self: KNet, *args: object, **kwargs: object) -> list:
        (found,) = whole(self, *args, **kwargs)  # type: ignore[arg-type]  # passed on unchanged
        words = found.masks.words.clone()
        words[0] = 0
        return [found._replace(masks=BitMasks(words, found.masks.size))]

    full = model.predict(pixels(50, 70))
    monkeypatch.setattr(KNet, "predictions", with_empty)
    assert torch.equal(model.predict(pixels(50, 70)).scores, full.scores[1:])
