"""COCO run lengths: encodes masks like `pycocotools.mask.encode`, and decodes with checks for every error."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from sprompt.masks import BitMasks, Size
from sprompt.ops import checks
from sprompt.ops.masks import as_bits
from sprompt.ops.rle import op
from sprompt.ops.rle.faults import too_large, within_limits


def rle_encode(masks: BitMasks | Tensor) -> list[dict[str, Any]]:
    """Encodes masks as COCO compressed RLE, byte for byte like `pycocotools.mask.encode`.

    The pixels of a mask, column by column, are runs r₀, r₁, … of zeros, ones, zeros, … Only r₀ ever needs to be empty. The
    string holds the numbers r₀, r₁, r₂, r₃ − r₁, r₄ − r₂, … in two's complement. Each number is written in groups of 5 bits,
    lowest first, with one character per group: 48 + bits, + 32 if another group follows.

    Args:
        masks: BitMasks (..., L), or dense (..., L, H, W), packed by `pack_masks`; H·W at most 2³¹ − 1.

    Returns: one `{"size": [H, W], "counts": bytes}` per mask, in the order of the flattened leading dimensions (a single
    mask gives a list of one). A mask without pixels has counts `b"0"`.
    Exact, deterministic, not differentiable. The results are Python objects, so torch.compile breaks the graph here. The call
    waits for the device twice: for the number of characters, and for the characters. Inside a graph call
    `torch.ops.sprompt.rle_encode(words, H, W)`. It returns all characters and their offsets on the device, and waits once.

    >>> rle_encode(torch.tensor([[[0, 1], [1, 1]], [[1, 0], [0, 0]]]))
    [{'size': [2, 2], 'counts': b'13'}, {'size': [2, 2], 'counts': b'013'}]
    """
    bits = as_bits("rle_encode", "masks", masks)
    height, width = bits.size
    if too_large(height, width):
        checks.bad_value(
            "rle_encode", "masks", "have at most 2^31 - 1 pixels", f"{height}x{width}", "COCO RLE counts in 32 bits"
        )
    characters, offsets = op.rle_encode(bits.words, height, width)
    if characters.device.type != "cpu":
        characters, offsets = _in_one_copy(characters, offsets)
    text = memoryview(characters.numpy())
    return [{"size": [height, width], "counts": bytes(text[a:b])} for a, b in pairwise(offsets.tolist())]


def _in_one_copy(characters: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Copies both tensors to the CPU at once, because every copy waits for the device."""
    both = torch.cat((offsets.view(torch.uint8), characters)).cpu()
    return both[8 * len(offsets) :], both[: 8 * len(offsets)].view(torch.int64)


def rle_decode(rles: Sequence[Mapping[str, Any]], size: Size | None = None) -> BitMasks:
    """Decodes COCO RLE to bits: the inverse of `rle_encode`. Every part of the list is checked.

    Args:
        rles: L entries `{"size": [H, W], "counts": ...}` of one size. counts is the compressed string, as bytes or str, or the
            uncompressed list of runs.
        size: (H, W) that every entry must have; None takes the size of the first entry. An empty list needs it.

    Returns: BitMasks (L,) on the CPU, where the strings are. There is no GPU kernel.
    An invalid entry raises ValueError with its index. An entry is invalid if it is not such a mapping, has another size, holds
    a character that RLE does not have, ends within a number, has a number of more than 12 characters or a negative run, or if
    its runs do not sum to exactly H·W. A mask of more than 2³¹ − 1 pixels (268 MB of bits) and a list of more than 2³⁵ pixels
    (4 GiB of bits) in all raise ValueError too. A few characters can require that much memory, so pass `size` to set a lower
    limit. Empty runs are allowed everywhere.
    Exact, deterministic, not differentiable; not for torch.compile.

    >>> rle_decode([{"size": [2, 2], "counts": b"13"}, {"size": [2, 2], "counts": [0, 1, 3]}]).to_dense().int().tolist()
    [[[0, 1], [1, 1]], [[1, 0], [0, 0]]]
    """
    if not isinstance(rles, Sequence) or isinstance(rles, (str, bytes)):
        checks.bad_type("rle_decode", "rles", "be a list of RLEs", type(rles).__name__, "put a single one into a list")
    if size is not None:
        size = _size_of(size, "size")
    parts = []
    for index, rle in enumerate(rles):
        name = f"rles[{index}]"
        if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
            got = f"keys {sorted(map(str, rle))}" if isinstance(rle, Mapping) else type(rle).__name__
            checks.bad_value("rle_decode", name, "be a dict with size and counts", got)
        own = _size_of(rle["size"], f"the size of {name}")
        if size is None:
            size = own
        elif own != size:
            checks.bad_value(
                "rle_decode", name, f"have size {list(size)}", list(own), "decode masks of one size at a time"
            )
        parts.append(_characters(rle["counts"], name, size))
    if size is None:
        checks.bad_value("rle_decode", "size", "be given for an empty list", None, "pass size=(H, W)")
    within_limits(*size, len(parts))
    ends = [0, *accumulate(map(len, parts))]
    text = bytearray(b"".join(parts))
    characters = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    return BitMasks(op.rle_decode(characters, torch.tensor(ends, dtype=torch.int64), *size), size)


def _size_of(value: Any, what: str) -> Size:
    """(H, W) from a pair of whole numbers of any kind that has __index__."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        height, width = value
        if isinstance(height, bool) or isinstance(width, bool):
            raise TypeError
        height, width = height.__index__(), width.__index__()
    except (TypeError, ValueError, AttributeError):
        checks.bad_value("rle_decode", what, "be two whole numbers [H, W]", f"{value!r:.80}")
    if height < 0 or width < 0:
        checks.bad_value("rle_decode", what, "be at least 0 on each side", [height, width])
    if too_large(height, width):
        checks.bad_value(
            "rle_decode", what, "have at most 2^31 - 1 pixels", [height, width], "COCO RLE counts in 32 bits"
        )
    return height, width


def _characters(counts: Any, name: str, size: Size) -> bytes:
    if isinstance(counts, bytes):
        return counts
    if isinstance(counts, str):
        if not counts.isascii():
            bad = next(c for c in counts if not c.isascii())
            checks.bad_value("rle_decode", name, "have counts of the characters 0 to o", repr(bad))
        return counts.encode("ascii")
    if not isinstance(counts, (list, tuple)):
        checks.bad_value(
            "rle_decode", name, "have counts that are bytes, a str or a list of whole numbers", type(counts).__name__
        )
    return _compressed(counts, name, size)


def _compressed(runs: Sequence[Any], name: str, size: Size) -> bytes:
    """The string of an uncompressed list of runs. The decoder checks their sum."""
    most = size[0] * size[1]
    numbers: list[int] = []
    for i, run in enumerate(runs):
        if isinstance(run, bool) or not hasattr(run, "__index__"):
            checks.bad_value("rle_decode", name, "have whole numbers as counts", f"{run!r:.80} in run {i}")
        number = run.__index__()
        if number < 0:
            checks.bad_value("rle_decode", name, "have runs of at least 0 pixels", f"{number} in run {i}")
        if number > most:
            checks.bad_value(
                "rle_decode", name, f"have runs that sum to {size[0]}x{size[1]} = {most} pixels", f"more in run {i}"
            )
        numbers.append(number)
    text = bytearray()
    for i, number in enumerate(numbers):
        rest = number - numbers[i - 2] if i > 2 else number
        while not -16 <= rest <= 15:
            text.append(80 + (rest & 31))
            rest >>= 5
        text.append(48 + (rest & 31))
    return bytes(text)
