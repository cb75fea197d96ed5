"""Reads picture files, the same way for every dataset."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sprompt.data.errors import DataError
from sprompt.masks import Size

MAX_PIXELS = 1 << 26  # 67 million (8192 × 8192): a file of a few kilobytes can claim any number of pixels
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))


def read_picture(path: Path | str) -> Tensor:
    """The stored pixels of a picture as RGB, uint8 (3, H, W). Raises DataError if the file is not a readable picture.

    An EXIF orientation is ignored, because labels (of COCO too) refer to the stored pixels. Grey values are repeated for all
    three channels, palettes are looked up, transparency is dropped, and 16 bits are scaled to 8. Of an animation the first
    frame is read.
    """
    with _opened(path) as image:
        try:
            return torch.from_numpy(_rgb(image, path)).permute(2, 0, 1).contiguous()
        except DataError:
            raise
        except Exception as error:  # on broken files decoders raise exceptions of any type
            raise DataError(f"{path}: is a broken picture ({_cause(error)}); replace or remove it") from None


def picture_size(path: Path | str) -> Size:
    """(H, W) of a picture; only its header is read."""
    with _opened(path) as image:
        return image.height, image.width


def png(image: Tensor) -> bytes:
    """The bytes of a PNG file of an image, uint8 (3, H, W), or (H, W) for grey."""
    pixels = image.permute(1, 2, 0) if image.dim() == 3 else image
    file = BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG", compress_level=3)
    return file.getvalue()


def _opened(path: Path | str) -> Image.Image:
    """The opened picture; its header is read, its pixels are not decoded yet."""
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except Exception as error:
        raise DataError(f"{path}: is not a picture that can be read ({_cause(error)}); replace or remove it") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(
            f"{path}: must have at most {MAX_PIXELS} pixels, got {image.height}x{image.width}; cut it into smaller ones"
        )
    return image


def _rgb(image: Image.Image, path: Path | str) -> np.ndarray:
    """uint8 (H, W, 3)."""
    if image.mode == "RGB":
        return np.array(image)
    if image.mode.startswith("I"):  # 16 bits, perhaps stored in 32; convert() would clip them at 255
        values = np.array(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise DataError(
                f"{path}: must have 8 or 16 bits a pixel, got values from {values.min()} to {values.max()}; convert it"
            )
        return np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{path}: must have 8 or 16 bits a pixel, got floating point; convert it")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _cause(error: Exception) -> str:
    """The text of an error on one short line, without the path: the message of DataError names it."""
    return " ".join(str(error).split(" '")[0].split())[:120] or type(error).__name__
