"""Pictures as stored: one way to read them, whoever asks."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sprompt.data.errors import DataError
from sprompt.masks import Size

MAX_PIXELS = 1 << 26  # 67 million: 8192 × 8192; a few kilobytes of a picture file can ask for any number
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"))


def read_picture(path: Path | str) -> Tensor:
    """RGB uint8 (3, H, W) of a picture's stored pixels; raises DataError that names a file that is none.

    Pixels are not turned by an EXIF orientation: labels (COCO's too) speak of the stored ones. Grey values are repeated, palettes
    looked up, transparency is dropped, 16 bits are scaled to 8; of an animation the first picture counts.
    """
    with _opened(path) as image:
        try:
            return torch.from_numpy(_rgb(image, path)).permute(2, 0, 1).contiguous()
        except DataError:
            raise
        except Exception as error:  # decoders raise whatever they like on broken files
            raise DataError(f"{path}: is a broken picture ({_cause(error)}); replace or remove it") from None


def picture_size(path: Path | str) -> Size:
    """(H, W) of a picture, from its header."""
    with _opened(path) as image:
        return image.height, image.width


def png(image: Tensor) -> bytes:
    """A PNG file of uint8 (3, H, W), or (H, W) for grey."""
    pixels = image.permute(1, 2, 0) if image.dim() == 3 else image
    file = BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(file, "PNG", compress_level=3)
    return file.getvalue()


def _opened(path: Path | str) -> Image.Image:
    """The picture with its header read; nothing is decoded yet."""
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
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16: convert() would cut them off at 255
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
    """What went wrong, on one short line, without the path, which the message has."""
    return " ".join(str(error).split(" '")[0].split())[:120] or type(error).__name__
