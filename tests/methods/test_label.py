"""Labels of boxes: the paste against two float steps, ellipses there and back, and one file for every way to split the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from benchmarks.measure import peak_bytes
from sprompt.data.boxes import BoxedPictures, read_boxes
from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.pictures import png
from sprompt.data.synthetic import write_scenes
from sprompt.methods.auto_labeler.config import LabelConfig, NetworkConfig
from sprompt.methods.auto_labeler.label import (
    EMPTY,
    UNREADABLE,
    Labelled,
    label,
    normalised_crops,
    paste,
    probabilities,
)
from sprompt.methods.auto_labeler.network import build_network, load_network, save_network
from sprompt.methods.auto_labeler.quality import quality
from sprompt.methods.auto_labeler.samples import LABEL_MARGINS, Window, box_profiles, cut, window_of
from sprompt.nn.mask_labeler import MaskLabeler

HERE = Path(__file__).parent
SIDE = 32


def network(seed: int = 0) -> MaskLabeler:
    """Random weights, of labels that are neither empty nor full."""
    torch.manual_seed(seed)
    made = build_network(NetworkConfig(backbone="resnet", depth=18, backbone_width=4, width=8, crop=SIDE))
    with torch.no_grad():
        for conv in (*made.pixel_head.before, made.pixel_head.after):
            conv.weight.mul_(2)
        made.instance_head[2].bias.uniform_(-30, 10)
    return made.eval()


class Bright(nn.Module):
    """In place of a network: a pixel of the mask is one where the crop is white."""

    def forward(self, crops: Tensor, classes: list[int]) -> Tensor:
        cells = torch.nn.functional.avg_pool2d(crops.mean(1, keepdim=True), 4)[:, 0]
        return (cells > 0.2).float() * 20 - 10  # white is above 2, black below −1.8


# -- from probabilities to masks
def resized(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear in float64, half-pixel centres, no antialias."""

    def taps(size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(size) + 0.5) * side / size - 0.5, 0, side - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, side - 1), at - low

    low, high, share = taps(height, maps.shape[0])
    rows = maps[low] * (1 - share)[:, None] + maps[high] * share[:, None]
    low, high, share = taps(width, maps.shape[1])
    return rows[:, low] * (1 - share) + rows[:, high] * share


@pytest.mark.parametrize(
    "window",
    [
        Window(3, 2, 40, 33),
        Window(-9, -4, 21, 70),
        Window(30, 20, 95, 61),
        Window(-20, -30, 100, 80),
        Window(5, 5, 9, 8),
    ],
)
@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_the_paste_is_two_steps(window: Window, threshold: float) -> None:
    """Logits to S², the sigmoid, the box; then S² to the window, and the window into a picture of zeros."""
    draw = np.random.default_rng(window.x1 + 100)
    soft = 1 / (1 + np.exp(-resized(draw.normal(size=(8, 8)) * 3, SIDE, SIDE)))
    soft[:5] = soft[:, 27:] = 0
    size = (60, 80)
    picture = np.zeros(size)
    part = resized(soft, window.y2 - window.y1, window.x2 - window.x1)
    y1, x1, y2, x2 = max(0, window.y1), max(0, window.x1), min(60, window.y2), min(80, window.x2)
    picture[y1:y2, x1:x2] = part[y1 - window.y1 : y2 - window.y1, x1 - window.x1 : x2 - window.x1]
    found = paste(torch.from_numpy(soft).float(), window, size, threshold).to_dense()[0].numpy()
    sure = abs(picture - threshold) > 1e-6
    assert np.array_equal(found[sure], (picture > threshold)[sure]) and (~sure).sum() < 5


def test_paste_and_run_lengths_hold_no_float_picture() -> None:
    """Nor one of bytes: the peak of the process, with the scratch memory of kernels, is that of a few bit masks."""
    size = (2000, 3000)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 512)] * 2, indexing="ij")
    soft = (3 - 4 * (x.square() + y.square()).sqrt()).sigmoid()
    found: list[dict[str, Any]] = []

    def pasted() -> None:
        found[:] = paste(soft, Window(-50, -40, 3100, 2070), size, 0.5).rle()

    peak = peak_bytes(pasted, torch.device("cpu"))
    assert 0.4 < coco_mask.area(found[0]) / (size[0] * size[1]) < 0.5
    if peak is None:
        pytest.skip("the peak of a process is known on Linux only")
    assert peak < size[0] * size[1]


def test_probabilities_by_the_formula() -> None:
    made = network()
    crops = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    profiles = torch.zeros(3, 2, SIDE, dtype=torch.uint8)
    profiles[:, 0, 4:20] = 1
    profiles[:, 1, 8:30] = 1
    found = probabilities(made, crops, profiles, [0, 2, 1]).numpy()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = (crops.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        logits = made(torch.from_numpy(images).float(), [0, 2, 1]).numpy().astype(float)
    for own, z in zip(found, logits, strict=True):
        want = np.zeros((SIDE, SIDE))
        want[4:20, 8:30] = (1 / (1 + np.exp(-resized(z, SIDE, SIDE))))[4:20, 8:30]
        np.testing.assert_allclose(own, want, rtol=0, atol=1e-5)


def test_crops_are_normalised_where_they_are() -> None:
    """A tensor of the CPU that meets crops of another device raises. Meta tensors show this without a GPU."""
    assert normalised_crops(torch.zeros(2, 3, 4, 4, dtype=torch.uint8, device="meta")).device.type == "meta"
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    white = normalised_crops(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
    torch.testing.assert_close(white[0, :, 0, 0], (1 - mean) / std)


@pytest.mark.parametrize(
    ("centre", "radii", "size"),
    [((150, 200), (60, 90), (300, 400)), ((40, 60), (55, 120), (200, 333)), ((250, 250), (249, 140), (500, 500))],
)
def test_an_ellipse_there_and_back(
    centre: tuple[float, float], radii: tuple[float, float], size: tuple[int, int], tmp_path: Path
) -> None:
    """Crop of 512 pixels, mask of 128, paste. One ellipse is cut off by the picture."""
    y, x = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5, indexing="ij")
    inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    own = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
    assert own[2] * own[3] > 96**2
    (tmp_path / "a.png").write_bytes(png(torch.from_numpy(inside.astype(np.uint8) * 255).expand(3, -1, -1)))
    data = coco([{"id": 1, "file_name": "a.png", "height": size[0], "width": size[1]}], [{"image_id": 1, "bbox": own}])
    pictures = read_boxes(tmp_path, data, "boxes.json")
    label(Bright(), pictures, data, tmp_path / "out.json", LabelConfig(), side=512, digest="")  # type: ignore[arg-type]
    (record,) = json.loads((tmp_path / "out.json").read_text())["annotations"]
    found = coco_mask.decode(record["segmentation"]).astype(bool)
    assert (found & inside).sum() / (found | inside).sum() > 0.97
    assert record["area"] == found.sum()


# -- files
def coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    full = [{"id": 100 + place, "category_id": 4, **own} for place, own in enumerate(annotations)]
    return {
        "images": images,
        "annotations": full,
        "categories": [{"id": 4, "name": "thing"}, {"id": 9, "name": "other"}],
    }


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 9, seed=4, size=(72, 96))
    path = folder / "instances.json"
    data = json.loads(path.read_text())
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 5]  # a picture without boxes
    data["licenses"] = [{"id": 1, "name": "ß"}]
    path.write_text(json.dumps(data))
    return folder


def opened(folder: Path) -> tuple[BoxedPictures, dict[str, Any]]:
    data = json.loads((folder / "instances.json").read_text())
    return read_boxes(folder / "images", data, str(folder / "instances.json")), data


def run(folder: Path, out: Path, **options: Any) -> Labelled:
    pictures, data = opened(folder)
    options = {"side": SIDE, "digest": "d", "unit": 2, "batch": 3, **options}
    return label(network(), pictures, data, out, options.pop("config", LabelConfig()), **options)


@pytest.fixture(scope="module")
def single(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "labels.json"
    told: list[tuple[int, int]] = []
    done = run(scenes, out, progress=lambda *own: told.append(own))
    count = len(json.loads((scenes / "instances.json").read_text())["annotations"])
    assert done.out == out and done.objects == count and told[-1] == (count, count)
    assert [p.name for p in out.parent.iterdir()] == ["labels.json"]
    return out


def test_the_file_is_the_input_with_masks(scenes: Path, single: Path) -> None:
    before, after = json.loads((scenes / "instances.json").read_text()), json.loads(single.read_text())
    for name in ("images", "categories", "licenses"):
        assert after[name] == before[name]
    assert after["info"] | before["info"] == after["info"] and after["info"]["labels"]["thresholds"] == [0.1, 0.1, 0.1]
    assert after["info"]["skipped"] == []
    without = {own for ids in after["info"]["unlabelled"].values() for own in ids}
    assert [a["id"] for a in after["annotations"]] == [a["id"] for a in before["annotations"] if a["id"] not in without]
    old = {a["id"]: a for a in before["annotations"]}
    areas = []
    for a in after["annotations"]:
        changed = ("segmentation", "area", "iscrowd")
        assert {k: v for k, v in a.items() if k not in changed} == {
            k: v for k, v in old[a["id"]].items() if k not in changed
        }
        mask = coco_mask.decode(a["segmentation"])
        assert mask.shape == (72, 96) and mask.sum() == a["area"] > 0 and a["iscrowd"] == 0
        # a label exceeds its box by one pixel for the inclusive last row, and two for the resize
        x, y, w, h = a["bbox"]
        rows, columns = np.nonzero(mask)
        assert rows.min() >= y - 2 and columns.min() >= x - 2 and rows.max() <= y + h + 2 and columns.max() <= x + w + 2
        areas.append(a["area"] / (w * h))
    assert 0.3 < np.mean(areas) < 0.7  # the labels say something
    dataset = CocoDataset(scenes / "images", single)
    assert sum(dataset.mask_counts) == len(after["annotations"])


def test_three_processes_and_restarts_give_the_file_of_one(scenes: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.json"
    assert run(scenes, out, index=1, of=3).out is None
    assert run(scenes, out, index=1, of=3).objects == 0
    assert run(scenes, out, index=2, of=3).out is None
    assert run(scenes, out, index=0, of=3).out == out
    assert out.read_bytes() == single.read_bytes()
    again = run(scenes, out)
    assert again.objects == 0 and again.out == out


def test_a_large_info_is_kept(scenes: Path, single: Path, tmp_path: Path) -> None:
    """The notes of a file may have megabytes. They are in the parts too, by which processes know their work."""
    pictures, data = opened(scenes)
    data = {**data, "info": {"note": ["a note"] * 150_000}}
    arguments: dict[str, Any] = {"side": SIDE, "digest": "d", "unit": 2, "batch": 3, "of": 2}
    out = tmp_path / "labels.json"
    assert label(network(), pictures, data, out, LabelConfig(), index=0, **arguments).out is None
    assert label(network(), pictures, data, out, LabelConfig(), index=1, **arguments).out == out
    written = json.loads(out.read_text())
    assert written["info"]["note"] == data["info"]["note"]
    assert written["annotations"] == json.loads(single.read_text())["annotations"]


def test_a_killed_process_goes_on_where_it_was(scenes: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.json"
    script = f"import sys, time; sys.path.insert(0, {str(HERE)!r}); from pathlib import Path; import test_label as t\n"
    script += f"t.run(Path({str(scenes)!r}), Path({str(out)!r}), progress=lambda *_: time.sleep(0.3))"
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(HERE.parents[1])})
    end = time.monotonic() + 300
    while len(list(tmp_path.glob("labels.json.parts/unit-*.json"))) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(scenes, out)
    assert 0 < done.objects < len(json.loads((scenes / "instances.json").read_text())["annotations"])
    assert out.read_bytes() == single.read_bytes()


def test_the_batch_does_not_change_the_labels(scenes: Path, single: Path, tmp_path: Path) -> None:
    """Sums of a convolution may be in another order: a pixel within rounding of the threshold may differ."""
    want = {a["id"]: coco_mask.decode(a["segmentation"]) for a in json.loads(single.read_text())["annotations"]}
    for batch, unit in ((1, 1), (8, 5)):  # one unit has no box
        run(scenes, tmp_path / f"{batch}.json", batch=batch, unit=unit)
        found = json.loads((tmp_path / f"{batch}.json").read_text())["annotations"]
        assert [a["id"] for a in found] == list(want)
        assert sum(int((coco_mask.decode(a["segmentation"]) != want[a["id"]]).sum()) for a in found) <= 1


def test_other_work_is_refused(scenes: Path, single: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is there already, with other labels \(thresholds\)"):
        run(scenes, single, config=LabelConfig(thresholds=(0.1, 0.2, 0.1)))
    run(scenes, tmp_path / "a.json", index=0, of=2)
    with pytest.raises(DataError, match=r"parts of the same work, got other labels \(boxes\)"):
        run(scenes, tmp_path / "a.json", digest="e")


def test_what_gets_no_label_is_said(tmp_path: Path) -> None:
    """A crowd stays, a broken picture and a black object lose their labels, and so does a box of 2 pixels."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 80} for i in range(3)]
    white = torch.full((3, 60, 80), 255, dtype=torch.uint8)
    white[:, :, 40:] = 0
    (tmp_path / "0.png").write_bytes(png(white))
    (tmp_path / "1.png").write_bytes(b"\x89PNG no picture")
    (tmp_path / "2.png").write_bytes(png(white))
    crowd = {"image_id": 0, "bbox": [1, 1, 50, 50], "iscrowd": 1, "segmentation": "anything", "area": 7, "note": [1]}
    data = coco(
        images,
        [
            crowd,
            {
                "image_id": 0,
                "bbox": [5, 5, 20, 20],
                "note": "kept",
                "segmentation": [["?"]],
                "iscrowd": 0,
                "category_id": 9,
            },
            {"image_id": 0, "bbox": [50, 5, 20, 20]},  # black
            {"image_id": 0, "bbox": [5, 5, 2, 20]},
            {"image_id": 1, "bbox": [5, 5, 20, 20]},
            {"image_id": 1, "bbox": [5, 9, 20, 20]},
            {"image_id": 2, "bbox": [10, 10, 20.5, 30]},
        ],
    )
    pictures = read_boxes(tmp_path, data, "boxes.json")
    out = tmp_path / "out.json"
    config = LabelConfig(area="box")
    done = label(Bright(), pictures, data, out, config, side=64, digest="", batch=2)  # type: ignore[arg-type]
    written = json.loads(out.read_text())
    assert written["annotations"][0] == {"id": 100, "category_id": 4, **crowd}
    kept, last = written["annotations"][1:]
    assert (kept["id"], kept["category_id"], kept["note"], kept["area"], kept["iscrowd"]) == (101, 9, "kept", 400, 0)
    assert (last["id"], last["area"], last["bbox"]) == (106, 615, [10, 10, 20.5, 30])
    assert done.unlabelled == written["info"]["unlabelled"]
    assert done.unlabelled[EMPTY] == [102] and done.unlabelled[UNREADABLE] == [104, 105]
    assert [103] in done.unlabelled.values() and sum(map(len, done.unlabelled.values())) == 4
    (broken,) = done.skipped
    assert broken["file_name"] == "1.png" and "1.png" in broken["reason"]


def test_thousands_of_boxes_in_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(torch.full((3, 60, 80), 255, dtype=torch.uint8)))
    draw = np.random.default_rng(0)
    boxes = [
        [float(v) for v in (draw.uniform(0, 70), draw.uniform(0, 50), *draw.uniform(2.5, 30, 2))] for _ in range(2000)
    ]
    data = coco(
        [{"id": 1, "file_name": "a.png", "height": 60, "width": 80}], [{"image_id": 1, "bbox": b} for b in boxes]
    )
    pictures = read_boxes(tmp_path, data, "boxes.json")
    read = []
    done = label(
        Bright(), pictures, data, tmp_path / "out.json", LabelConfig(), side=32, digest="", batch=64,  # type: ignore[arg-type]
        progress=lambda *own: read.append(own),
    )  # fmt: skip
    assert done.objects == 2000 and read[0] == (64, 2000)
    assert len(json.loads((tmp_path / "out.json").read_text())["annotations"]) == 2000


def test_quality_by_hand(tmp_path: Path) -> None:
    """IoUs of 1, ½ and 0 (no label) of one category, ¼ of another; the last has no true mask."""
    images = [{"id": 1, "file_name": "a.png", "height": 100, "width": 100}]
    (tmp_path / "a.png").write_bytes(png(torch.zeros(3, 100, 100, dtype=torch.uint8)))

    def square(x: int, y: int, w: int, h: int) -> dict[str, Any]:
        dense = np.zeros((100, 100), np.uint8, order="F")
        dense[y : y + h, x : x + w] = 1
        rle = coco_mask.encode(dense)
        return {"size": rle["size"], "counts": rle["counts"].decode()}

    truth = coco(
        images,
        [
            {"image_id": 1, "bbox": [0, 0, 10, 10], "segmentation": square(0, 0, 10, 10)},
            {"image_id": 1, "bbox": [0, 0, 40, 40], "segmentation": [[0, 0, 40, 0, 40, 40, 0, 40]]},
            {"image_id": 1, "bbox": [0, 0, 20, 20], "segmentation": square(0, 0, 20, 20)},
            {"image_id": 1, "bbox": [0, 0, 98, 98], "segmentation": square(0, 0, 98, 98), "category_id": 9},
            {"image_id": 1, "bbox": [0, 0, 10, 10]},
        ],
    )
    labels = {
        "annotations": [
            {"id": 100, "segmentation": square(0, 0, 10, 10)},
            {"id": 101, "segmentation": square(0, 0, 40, 20)},
            {"id": 103, "segmentation": square(0, 0, 49, 49)},
            {"id": 104, "segmentation": square(0, 0, 5, 5)},
        ]
    }
    found = quality(read_boxes(tmp_path, truth, "boxes.json"), truth, labels)
    assert found["objects"] == 4
    assert found["per_class"] == pytest.approx({"thing": 0.5, "other": 0.25})
    assert found["IoU"] == pytest.approx(0.375)
    assert (found["small"], found["medium"], found["large"]) == pytest.approx((0.5, 0.5, 0.25))


# -- the network's file
def test_the_network_in_a_file(tmp_path: Path) -> None:
    made = network(3)
    config = NetworkConfig(backbone="resnet", depth=18, backbone_width=4, width=8, crop=SIDE)
    save_network(tmp_path / "a.safetensors", made, config)
    read, held = load_network(tmp_path / "a.safetensors")
    assert held == config and not read.training
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), made.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"model": "knet"}, "must be a file of `sprompt labeler`"),
        ({"labeler": {}, "format": 7}, "format must be 1, got 7"),
        ({"labeler": {"crop": 10**9}, "format": 1}, "crop must be a whole number from 32 to 4096"),
        ({"labeler": {"depht": 18}, "format": 1}, "did you mean depth"),
        ({"labeler": {"backbone": "resnet", "depth": 34}, "format": 1}, "must hold exactly the tensors of the model"),
    ],
)
def test_other_files_are_refused(about: dict[str, Any], message: str, tmp_path: Path) -> None:
    from sprompt.nn.tensor_files import write_tensors

    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"sprompt": json.dumps(about)})
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path / "a.safetensors")


def test_margins_of_labels_are_those_of_the_crops() -> None:
    """The mask of a box never reaches the border of its crop, unless it has a few pixels only."""
    from sprompt.data.boxes import Box

    for x in np.linspace(10, 11, 7):
        own = Box(x, x, x + 20, x + 30, 600.0, 0)
        profiles = box_profiles(own, window_of(own, LABEL_MARGINS), (90, 90), 64)
        assert not profiles[:, [0, -1]].any() and profiles.any(1).all()
    assert cut(torch.zeros(3, 9, 9, dtype=torch.uint8), Window(-1, 0, 4, 3), 16).shape == (3, 16, 16)
