"""The messages for faults of a run-length string, and the limits of sizes."""

from typing import NoReturn

from torch import Tensor

from sprompt.masks import words_for
from sprompt.ops.checks import bad_value

MOST_PIXELS = 2**31 - 1  # of one mask: 268 MB of bits
MOST_PIXELS_IN_ALL = 2**35  # of one list: 4 GiB of bits
MOST_CHARACTERS = 12  # of one number

# The numbers of sprompt::RleFault in csrc/rle/rle.h. A fault is (kind, place, value).
FINE, BAD_CHARACTER, TRUNCATED, TOO_LONG, NEGATIVE, TOO_MANY, TOO_FEW, BAD_OFFSETS, BAD_SIZE = range(9)
Fault = tuple[int, int, int]


def too_large(height: int, width: int) -> bool:
    """Whether a mask has too many pixels. A single side is limited as well, even if the other side is 0."""
    return max(height, width, height * width) > MOST_PIXELS


def fits(op: str, n: int, height: int, width: int) -> None:
    """Checks that n words hold a mask of height x width, and that the mask is not too large."""
    if min(height, width) < 0 or too_large(height, width):
        bad_value(op, "size", "have at most 2^31 - 1 pixels", f"{height}x{width}", "COCO RLE counts in 32 bits")
    if n != words_for(height * width):
        bad_value(
            op, "words", f"have shape (..., {words_for(height * width)}) for {height}x{width} pixels", f"(..., {n})"
        )


def within_limits(height: int, width: int, count: int) -> None:
    """Checks that a list of `count` masks may be decoded."""
    fits("rle_decode", words_for(height * width), height, width)
    if height * width * count > MOST_PIXELS_IN_ALL:
        bad_value(
            "rle_decode", "rles", "have at most 2^35 pixels in all", f"{count} x {height}x{width}", "decode in parts"
        )


def raise_first(faults: Tensor, height: int, width: int) -> None:
    """Raises for the first row of faults, int64 (L, 3) on the CPU, that is not fine."""
    if faults[:, 0].any():
        index = int(faults[:, 0].nonzero()[0])
        _refuse(f"rles[{index}]", tuple(faults[index].tolist()), height, width)


def _refuse(name: str, fault: Fault, height: int, width: int) -> NoReturn:
    kind, place, value = fault
    total = f"have runs that sum to {height}x{width} = {height * width} pixels"
    rule, got = {
        BAD_CHARACTER: ("have counts of the characters 0 to o", f"{bytes([value & 255])!r} at {place}"),
        TRUNCATED: ("have counts that end with a complete number", f"an incomplete number from character {place} on"),
        TOO_LONG: (
            f"have numbers of at most {MOST_CHARACTERS} characters",
            f"a longer number from character {place} on",
        ),
        NEGATIVE: ("have runs of at least 0 pixels", f"{value} in run {place}"),
        TOO_MANY: (total, f"more in run {place}"),
        TOO_FEW: (total, f"{value} in {place} runs"),
        BAD_OFFSETS: ("lie inside the characters", "offsets outside of them"),
        BAD_SIZE: (f"fit a mask of {height}x{width} pixels", "another size"),
    }[kind]
    bad_value("rle_decode", name, rule, got)
