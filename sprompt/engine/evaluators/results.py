"""Records of COCO results, checked: errors name the record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sprompt.data.errors import DataError
from sprompt.masks import BitMasks, Size

Sizes = Mapping[Any, Size]  # of the pictures, by id


@contextlib.contextmanager
def record(place: int) -> Iterator[None]:
    """Turns an error inside of the block into a DataError about this record."""
    try:
        yield
    except (KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"results: record {place} must be a COCO result, got {what}") from None
    except ValueError as error:
        raise DataError(f"results: record {place}: {error}") from None


def sizes(truth: Mapping[str, Any]) -> Sizes:
    return {image["id"]: (image["height"], image["width"]) for image in truth["images"]}


def picture_of(result: Mapping[str, Any], sizes: Sizes) -> Any:
    """The id of the picture of a result."""
    image = result["image_id"]
    if image not in sizes:
        raise ValueError(f"image_id must be an id of the ground truth, got {image}; give results of its pictures")
    return image


def rle_of(result: Mapping[str, Any], size: Size, image: Any) -> dict[str, Any]:
    """The run lengths of a result. Only their size is checked."""
    rle = result.get("segmentation")
    if rle is None:
        raise KeyError("segmentation")
    if tuple(rle["size"]) != size:
        raise ValueError(f"the mask must have the size {list(size)} of picture {image}, got {rle['size']}")
    found: dict[str, Any] = rle
    return found


def decoded(rles: Sequence[dict[str, Any]], size: Size, image: Any, first: int) -> BitMasks:
    """The masks of a picture's results; `first` is the place of the first one. The decoder checks their bounds. That of
    pycocotools trusts the file."""
    try:
        return BitMasks.from_rle(rles, size)
    except (ValueError, TypeError) as error:
        raise DataError(f"results of picture {image}, from record {first} on: {error}") from None
