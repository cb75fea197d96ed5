"""Reads picture files, the same way for every dataset."""

from __future__ import annotations

import stat
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from sprompt.data.errors import DataError
from sprompt.masks import Size

MAX_PIXELS = 1 << 26  # 67 million (8192 × 8192): a file of a few kilobytes can claim any number of pixels
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))
#: How a picture is turned for its EXIF orientation; 1 and any other value leave it as it is.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width


def read_picture(path: Path | str) -> Tensor:
    """The pixels of a picture file as `shown` gives them. Raises DataError if the file is not a readable picture."""
    with _opened(path) as image:
        return shown(image, path)


def shown(image: Image.Image, name: Path | str) -> Tensor:
    """The pixels of an opened picture as a viewer shows it: RGB, uint8 (3, H, W). Raises DataError, which calls the picture `name`.

    Pixels are turned as the EXIF orientation says. In a PNG file the tag counts only if it stands before the pixels. Grey values
    are repeated for all three channels, palettes are looked up, transparency is dropped, and 16 bits are scaled to 8. Of an animation
    the first frame is read.
    """
    try:
        turn = _TURNS.get(_orientation(image))
        pixels = _rgb(image if turn is None else image.transpose(turn), name)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    except DataError:
        raise
    except Exception as error:  # on broken files decoders raise exceptions of any type
        raise DataError(f"{name}: is a broken picture ({_cause(error)}); replace or remove it") from None


def picture_size(path: Path | str) -> Size:
    """(H, W) that `read_picture` gives, from the header of the file."""
    with _opened(path) as image:
        size = (image.height, image.width)
        return size[::-1] if _orientation(image) in _SIDEWAYS else size


def stored_size(path: Path | str) -> Size:
    """(H, W) of the pixels in the file, before they are turned."""
    with _opened(path) as image:
        size = (image.height, image.width)
        return size[::-1] if image.format == "TIFF" and _tag(image) in _SIDEWAYS else size


def png(image: Tensor) -> bytes:
    """The bytes of a PNG file of an image, uint8 (3, H, W), or (H, W) for grey."""
    pixels = image.permute(1, 2, 0) if image.dim() == 3 else image
    file = BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG", compress_level=3)
    return file.getvalue()


def _opened(path: Path | str) -> Image.Image:
    """The opened picture; its header is read, its pixels are not decoded yet."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # to open a pipe would wait for a writer
            raise DataError(f"{path}: must be a file, got a folder, pipe, socket or device; remove it")
        image = Image.open(path)
    except DataError:
        raise
    except FileNotFoundError:
        what = "is a link to a file that is not there" if Path(path).is_symlink() else "no such file"
        raise DataError(f"{path}: {what}; check the path") from None
    except Exception as error:
        raise DataError(f"{path}: is not a picture that can be read ({_cause(error)}); replace or remove it") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(
            f"{path}: must have at most {MAX_PIXELS} pixels, got {image.height}x{image.width}; cut it into smaller ones"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied; TIFF files are turned by their decoder."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):  # PNG: the tag's search decodes
        return 1
    return _tag(image)


def _tag(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none, or one that cannot be read."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # tags are optional, and parsers raise whatever they like on broken ones
        return 1
    return value if isinstance(value, int) else 1


def _rgb(image: Image.Image, name: Path | str) -> np.ndarray:
    """uint8 (H, W, 3)."""
    if image.mode == "RGB":
        return np.array(image)
    if image.mode.startswith("I"):  # 16 bits, perhaps stored in 32; convert() would clip them at 255
        values = np.array(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(
                f"{name}: must have 8 or 16 bits a pixel, got values from {values.min()} to {values.max()}; convert it"
            )
        return np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{name}: must have 8 or 16 bits a pixel, got floating point; convert it")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _cause(error: Exception) -> str:
    """The text of an error on one short line, without the path: the message of DataError names it."""
    return " ".join(str(error).split(" '")[0].split())[:120] or type(error).__name__
