"""Pictures of every kind become RGB, and unreadable pictures are named; folders are listed in one order."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sprompt.data import pictures
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder, Unbroken
from sprompt.data.pictures import picture_size, png, read_picture, stored_size

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (7, 9), dtype=np.uint8)
RGB = RNG.integers(0, 256, (7, 9, 3), dtype=np.uint8)


def _stored(path: Path, image: Image.Image, **options: Any) -> np.ndarray:
    image.save(path, **options)
    out = read_picture(path)
    assert out.dtype == torch.uint8 and out.is_contiguous() and picture_size(path) == tuple(out.shape[1:])
    return out.permute(1, 2, 0).numpy()


def test_rgb_and_grey(tmp_path: Path) -> None:
    assert (_stored(tmp_path / "a.png", Image.fromarray(RGB)) == RGB).all()
    assert (_stored(tmp_path / "b.png", Image.fromarray(GREY)) == GREY[..., None]).all()
    bits = _stored(tmp_path / "c.png", Image.fromarray(GREY > 99))
    assert (bits == np.where(GREY > 99, 255, 0)[..., None]).all()


def test_transparency_is_dropped(tmp_path: Path) -> None:
    with_alpha = np.concatenate((RGB, GREY[..., None]), 2)
    assert (_stored(tmp_path / "a.png", Image.fromarray(with_alpha)) == RGB).all()
    grey_alpha = np.stack((GREY, GREY[::-1]), 2)
    assert (_stored(tmp_path / "b.png", Image.fromarray(grey_alpha)) == GREY[..., None]).all()


@pytest.mark.filterwarnings("error")
def test_palettes(tmp_path: Path) -> None:
    palette = Image.fromarray(GREY % 4, mode="P")
    colours = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]
    palette.putpalette(colours)
    wanted = np.array(colours).reshape(4, 3)[GREY % 4]
    assert (_stored(tmp_path / "a.png", palette) == wanted).all()
    assert (_stored(tmp_path / "b.png", palette, transparency=bytes([0, 128, 255, 255])) == wanted).all()
    assert (_stored(tmp_path / "c.gif", palette) == wanted).all()


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    values = RNG.integers(0, 65536, (7, 9), dtype=np.uint16)
    values[0, :3] = 0, 65535, 257 * 100
    out = _stored(tmp_path / "a.png", Image.fromarray(values))
    assert (out == np.round(values / 257)[..., None]).all()
    assert (_stored(tmp_path / "b.tif", Image.fromarray(values.astype(np.int32))) == out).all()


def test_cmyk(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).resize((64, 64)).convert("CMYK")
    out = _stored(tmp_path / "a.jpg", image, quality=100)
    assert np.abs(out.astype(int) - np.asarray(image.convert("RGB"))).mean() < 4


@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 are orientations
@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "a.jpg", "palette.png", "grey16.png"])
def test_pictures_are_turned_as_exif_says(tmp_path: Path, name: str, orientation: int) -> None:
    values = np.kron(
        RNG.integers(0, 200, (2, 3), dtype=np.uint8), np.ones((16, 16), np.uint8)
    )  # blocks, as JPEG has them
    image = Image.fromarray(values).convert("P" if name.startswith("palette") else "RGB")
    if name.startswith("grey16"):
        image = Image.fromarray(values.astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = _stored(tmp_path / name, image, exif=exif, **({"quality": 100, "lossless": True} if name == "a.webp" else {}))
    turned = {
        2: np.fliplr, 3: lambda v: np.rot90(v, 2), 4: np.flipud, 5: np.transpose, 6: lambda v: np.rot90(v, -1),
        7: lambda v: np.rot90(np.transpose(v), 2), 8: np.rot90,
    }.get(orientation, lambda v: v)(values)  # fmt: skip
    assert out.shape[:2] == turned.shape and stored_size(tmp_path / name) == values.shape
    assert np.abs(out.astype(int) - turned[..., None]).max() <= (3 if name == "a.jpg" else 0)


def test_broken_exif_is_none(tmp_path: Path) -> None:
    for exif in (b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"nonsense" * 9):
        assert _stored(tmp_path / "a.jpg", Image.fromarray(RGB), exif=exif).shape == RGB.shape


def test_png() -> None:
    assert (np.asarray(Image.open(io.BytesIO(png(torch.from_numpy(RGB).permute(2, 0, 1))))) == RGB).all()
    assert (np.asarray(Image.open(io.BytesIO(png(torch.from_numpy(GREY))))) == GREY).all()


def _whole_png() -> bytes:
    return png(torch.from_numpy(RNG.integers(0, 256, (3, 64, 64), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", None, "no such file"),
        ("a.png", b"", "is not a picture that can be read"),
        ("a.jpg", b"hello", "is not a picture that can be read"),
        ("a.png", _whole_png()[:3000], "is a broken picture"),
        ("a.png", _whole_png()[:20], "is not a picture that can be read"),
    ],
)
def test_broken_pictures_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_picture(path)
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).count(str(path)) == 1


def test_numbers_that_are_no_colours(tmp_path: Path) -> None:
    Image.fromarray(np.full((3, 3), 1.5, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"f\.tif: .* got floating point"):
        read_picture(tmp_path / "f.tif")
    Image.fromarray(np.full((3, 3), 70000, np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(DataError, match=r"i\.tif: .* got values from 70000 to 70000"):
        read_picture(tmp_path / "i.tif")


def test_huge_pictures_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 62)
    for read in (read_picture, picture_size):
        with pytest.raises(DataError, match=r"a\.png: must have at most 62 pixels, got 7x9"):
            read(tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder", "dangling"])
def test_what_is_no_file_is_named_and_not_waited_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # addresses are short
        socket.socket(socket.AF_UNIX).bind("a.jpg")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere.jpg")
    message = (
        "is a link to a file that is not there" if kind == "dangling" else "must be a file, got a folder, pipe, socket"
    )
    for read in (read_picture, picture_size):
        with pytest.raises(DataError, match=rf"a\.jpg: {message}"):
            read(path)
    if kind != "folder":
        assert PictureFolder(tmp_path).file_names == ["a.jpg"]


def test_links_that_leave_the_folder_are_followed(tmp_path: Path) -> None:
    _folder(tmp_path / "there")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.png").symlink_to(tmp_path / "there" / "b.png")
    (tmp_path / "here" / "sub").symlink_to(tmp_path / "there" / "sub")
    folder = PictureFolder(tmp_path / "here")
    assert folder.file_names == ["a.png", "sub/c.png", "sub/deep/a.webp"] and folder[0].size == (8, 10)


# -- folders
def _folder(tmp_path: Path) -> Path:
    for i, name in enumerate(
        ["b.png", "a.JPG", "sub/c.png", "sub/deep/a.webp", ".hidden.png", ".git/x.png", "z.txt", "t.png"]
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("text")
        else:
            Image.new("RGB", (10 + i, 8), (i, 0, 0)).save(path)
    return tmp_path


def test_folder(tmp_path: Path) -> None:
    folder = PictureFolder(_folder(tmp_path))
    assert folder.file_names == ["a.JPG", "b.png", "sub/c.png", "sub/deep/a.webp", "t.png"] and len(folder) == 5
    assert folder.image_ids == [0, 1, 2, 3, 4] and folder.classes == []
    assert folder.problems == [f"{tmp_path}: 1 files are no pictures and left out: z.txt"]
    sample = folder[2]
    assert sample.image_id == 2 and sample.name == str(tmp_path / "sub/c.png") and sample.size == (8, 12)
    assert sample.masks.shape == (0,) and sample.masks.size == (8, 12) and sample.labels.shape == (0,)
    part = folder.subset([3, 1])
    assert part.image_ids == [3, 1] and part[0].image_id == 3 and len(folder) == 5
    assert PictureFolder(tmp_path, recursive=False).file_names == ["a.JPG", "b.png", "t.png"]


def test_broken_pictures_of_a_folder(tmp_path: Path) -> None:
    folder = PictureFolder(_folder(tmp_path))
    (tmp_path / "b.png").write_bytes(b"no")
    assert folder[0].size == (8, 11)
    with pytest.raises(DataError, match=r"b\.png: is not a picture"):
        folder[1]


def test_the_next_picture_steps_in_for_a_broken_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = PictureFolder(_folder(tmp_path))
    for place in (1, 2, 4):
        (tmp_path / folder.file_names[place]).write_bytes(b"no")
    pictures = Unbroken(folder)
    for _ in range(2):
        assert [pictures[i].image_id for i in range(len(pictures))] == [0, 3, 3, 3, 0]
    assert [pictures[i].image_id for i in (4, 2)] == [0, 3]
    said = capsys.readouterr().err
    assert said.count("left out: ") == 3
    for place in (1, 2, 4):
        assert said.count(f"left out: {tmp_path / folder.file_names[place]}: is not a picture") == 1
    for place in (0, 3):
        (tmp_path / folder.file_names[place]).write_bytes(b"no")
    with pytest.raises(DataError, match="must hold a picture that can be read, all 5 are broken"):
        Unbroken(folder)[2]


def test_no_folder_and_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: must be a folder that can be listed"):
        PictureFolder(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="must hold pictures"):
        PictureFolder(tmp_path)
    with pytest.raises(DataError, match="must be a folder"):
        PictureFolder(tmp_path / "a.txt")
