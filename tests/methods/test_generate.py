"""The proposal file: the same bytes for every split and interruption of the work, and its records."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from safetensors.torch import load_file

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.data.pictures import png, read_picture
from sprompt.methods.saliency_prompt import ProposalConfig, generate
from sprompt.nn.resnet import ResNet

CONFIG = ProposalConfig(short=64, long=96, level="C3", min_score=0.4, max_masks=6)
SIZES = [(48, 72), (72, 48), (48, 72), (60, 60), (33, 97), (48, 72), (48, 70), (60, 60), (72, 48), (48, 72), (50, 50)]


def backbone(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(18, width=4).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for i, size in enumerate(SIZES):
        coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=generator).float()
        image = torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)
        path = folder / ("sub/ä.png" if i == 4 else f"{i:02d}.png")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(image))
    (folder / "03.png").write_bytes(b"\x89PNG no picture")
    (folder / "06.png").write_bytes(png(torch.full((3, 4, 400), 128, dtype=torch.uint8)))  # its view has no valid cell
    return folder


@pytest.fixture(scope="module")
def single(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "proposals.json"
    told: list[tuple[int, int]] = []
    done = generate(
        PictureFolder(folder),
        backbone(),
        CONFIG,
        out,
        unit=3,
        batch=2,
        vectors=True,
        progress=lambda *a: told.append(a),
    )
    assert done.out == out
    assert done.pictures == len(SIZES)
    assert told == [(3, 11), (6, 11), (9, 11), (11, 11)]
    assert sorted(p.name for p in out.parent.iterdir()) == ["proposals.json", "proposals.vectors.safetensors"]
    return out


def run(folder: Path, out: Path, **options: Any) -> Any:
    options = {"unit": 3, "batch": 2, "vectors": True, **options}
    return generate(PictureFolder(folder), backbone(), CONFIG, out, **options)


def same(a: Path, b: Path) -> bool:
    vectors = [p.with_suffix(".vectors.safetensors").read_bytes() for p in (a, b)]
    return a.read_bytes() == b.read_bytes() and vectors[0] == vectors[1]


# -- its content --------------------------------------------------------------------------------------------------------------


def test_the_record(folder: Path, single: Path) -> None:
    file = json.loads(single.read_text())
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert [(i["id"], i["file_name"]) for i in file["images"]] == [
        (n, name) for n, name in enumerate(names) if name != "03.png"
    ]
    assert file["categories"] == [{"id": 1, "name": "object"}]
    sizes = {i["id"]: (i["height"], i["width"]) for i in file["images"]}
    for image in file["images"]:
        assert tuple(read_picture(folder / image["file_name"]).shape[1:]) == sizes[image["id"]]
    annotations = file["annotations"]
    assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))
    assert [a["image_id"] for a in annotations] == sorted(a["image_id"] for a in annotations)
    assert len(annotations) > 10
    empty = set(sizes) - {a["image_id"] for a in annotations}
    assert names.index("06.png") in empty, "a picture without proposals is in the file"
    for a in annotations:
        assert (a["category_id"], a["iscrowd"]) == (1, 0)
        pixels = coco_mask.decode(a["segmentation"])
        assert pixels.shape == sizes[a["image_id"]]
        assert a["area"] == int(pixels.sum()) > 0
        assert a["bbox"] == coco_mask.toBbox(a["segmentation"]).tolist()
        rows = pixels.any(1).nonzero()[0]
        assert rows.mean() > 0.2 * pixels.shape[0]
        assert a["bbox"][2] < 0.95 * pixels.shape[1]
        assert 0.4 <= a["score"] <= 1
        assert len(a["seed"]) == 3
    info = file["info"]
    assert ProposalConfig.from_record(info["proposals"]) == CONFIG
    assert (info["proposals"]["version"], info["proposals"]["stride"]) == (1, 8)
    ((broken,),) = [info["skipped"]]
    assert broken["file_name"] == "03.png"
    assert broken["reason"].startswith("03.png: is not a picture that can be read")
    assert str(folder) not in single.read_text()


def test_it_is_read_as_a_dataset(folder: Path, single: Path) -> None:
    dataset = CocoDataset(folder, single, class_agnostic=True)
    file = json.loads(single.read_text())
    for i, image_id in enumerate(dataset.image_ids):
        sample, own = dataset[i], [a for a in file["annotations"] if a["image_id"] == image_id]
        assert sample.masks.area().tolist() == [a["area"] for a in own]
        assert sample.seeds is not None and sample.seeds.shape == (len(own), 3)


def test_the_side_file(single: Path) -> None:
    stored = load_file(single.with_suffix(".vectors.safetensors"))
    number = len(json.loads(single.read_text())["annotations"])
    assert stored["annotation_ids"].tolist() == list(range(1, number + 1))
    assert stored["vectors"].shape == (number, 8)
    assert stored["vectors"].dtype == torch.float16
    assert np.isfinite(stored["vectors"].float().numpy()).all()


# -- splitting and killing --------------------------------------------------------------------------------------------------------


def test_three_processes_give_the_file_of_one(folder: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "proposals.json"
    results = [run(folder, out, index=i, of=3) for i in (2, 0, 1)]
    assert [r.out for r in results] == [None, None, out]
    assert sum(r.pictures for r in results) == len(SIZES)
    assert [s["file_name"] for r in results for s in r.skipped] == ["03.png"]
    assert same(out, single)
    again = run(folder, out, index=1, of=3)
    assert (again.out, again.pictures, [s["file_name"] for s in again.skipped]) == (out, 0, ["03.png"])


def test_a_killed_process_goes_on_where_it_was(folder: Path, single: Path, tmp_path: Path) -> None:
    """kill -9 when some units are finished, but not all; then the rest of the work with another split."""
    out = tmp_path / "proposals.json"
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_generate as t
        from pathlib import Path
        t.run(Path({str(folder)!r}), Path({str(out)!r}), progress=lambda *a: time.sleep(1.0 if a[0] > 3 else 0))
    """)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root}, cwd=root)
    parts = tmp_path / "proposals.json.parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("unit-*.json"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(parts.glob("unit-*.json")))
    assert 2 <= finished < 4
    assert not out.exists()
    (parts / ".unit-000003.json.1-2.tmp").write_text("half of a fi")  # left by a kill in the middle of writing
    result = run(folder, out, index=0, of=2)
    assert result.out is None
    assert result.pictures == (3 if finished == 2 else 0)
    last = run(folder, out, index=1, of=2)
    assert last.out == out
    assert [s["file_name"] for s in last.skipped] == ["03.png"], "of a unit that the killed process finished"
    assert same(out, single)
    assert not parts.exists()


def test_a_kill_before_the_parts_were_removed(folder: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "proposals.json"
    out.write_bytes(single.read_bytes())
    parts = tmp_path / "proposals.json.parts"
    parts.mkdir()
    (parts / "unit-000000.json").write_text("{}")
    assert run(folder, out).pictures == 0
    assert not parts.exists()


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused(folder: Path, single: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "proposals.json"
    if finished:
        out.write_bytes(single.read_bytes())
    else:
        run(folder, out, index=0, of=2)
    pictures, where = PictureFolder(folder), "is there already" if finished else "must hold parts of the same work"
    options: Any = {"unit": 3, "batch": 2, "vectors": True}
    changed = [
        (pictures, backbone(), ProposalConfig(**{**CONFIG.__dict__, "sigma": 3.0}), options, r"proposals \(sigma\)"),
        (pictures, backbone(1), CONFIG, options, r"proposals \(backbone\)"),
        (pictures.subset(range(9)), backbone(), CONFIG, options, r"pictures \(count, names\)"),
        (pictures, backbone(), CONFIG, options | {"unit": 4}, r"work \(unit\)"),
    ]
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for own, network, config, how, what in changed:
        with pytest.raises(DataError, match=f"{where}.*{what}"):
            generate(own, network, config, out, **how)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_what_cannot_be_opened_is_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(folder / "00.png")
    (tmp_path / "images" / "b.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "images" / "c.png")
    done = run(tmp_path / "images", tmp_path / "proposals.json")
    assert [s["file_name"] for s in done.skipped] == ["b.png", "c.png"]
    assert done.skipped[0]["reason"].startswith("b.png: is a link to a file that is not there")
    assert [i["file_name"] for i in json.loads((tmp_path / "proposals.json").read_text())["images"]] == ["a.png"]


def test_a_file_of_another_kind_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "notes.json"
    out.write_text("[1, 2]\n")
    with pytest.raises(DataError, match="is there already"):
        run(folder, out)
    assert out.read_text() == "[1, 2]\n"


@pytest.mark.parametrize("options", [{"index": 3, "of": 3}, {"index": -1}, {"of": 0}, {"unit": 0}, {"batch": 0}])
def test_shares_that_cannot_be(folder: Path, tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="generate: unit, batch and of must be at least 1"):
        run(folder, tmp_path / "p.json", **options)
