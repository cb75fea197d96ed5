"""The groups of categories of LVIS-OW, on the ids of LVIS v1: objects that a training knows, has seen without labels, or has not
seen."""

from __future__ import annotations

from collections.abc import Mapping

from sprompt.data.errors import DataError

#: {category id of COCO: category id of LVIS with the same synset}. LVIS has none for hot dog (58). Potted plant is flowerpot there.
COCO_TO_LVIS = {
    1: 793, 2: 94, 3: 207, 4: 703, 5: 3, 6: 173, 7: 1115, 8: 1123, 9: 118, 10: 1112, 11: 445, 13: 1019, 14: 766, 15: 90,
    16: 99, 17: 225, 18: 378, 19: 569, 20: 943, 21: 80, 22: 422, 23: 76, 24: 1202, 25: 496, 27: 34, 28: 1133, 31: 35,
    32: 716, 33: 36, 34: 474, 35: 964, 36: 976, 37: 41, 38: 611, 39: 58, 40: 60, 41: 962, 42: 1037, 43: 1079, 44: 133,
    46: 1190, 47: 344, 48: 469, 49: 615, 50: 1000, 51: 139, 52: 45, 53: 12, 54: 912, 55: 735, 56: 154, 57: 217, 59: 816,
    60: 387, 61: 183, 62: 232, 63: 982, 64: 837, 65: 77, 67: 367, 70: 1097, 72: 1077, 73: 631, 74: 705, 75: 881, 76: 296,
    77: 230, 78: 687, 79: 739, 80: 1095, 81: 961, 82: 421, 84: 127, 85: 271, 86: 1139, 87: 923, 88: 1071, 89: 534,
    90: 1102,
}  # fmt: skip
#: Further categories, each with at least 5,500 instances in the training part of LVIS.
MANY_INSTANCES = (
    50, 59, 125, 143, 150, 177, 181, 330, 351, 390, 451, 498, 500, 510, 540, 544, 549, 589, 595, 617, 641, 645, 653, 659, 709,
    734, 804, 827, 947, 948, 959, 965, 967, 981, 1023, 1026, 1027, 1035, 1055, 1056, 1099, 1110, 1122, 1178,
)  # fmt: skip
KNOWN = frozenset((*COCO_TO_LVIS.values(), *MANY_INSTANCES))
#: Number of categories of each group in LVIS v1.
SIZES = {"known": 123, "seen": 743, "unseen": 337}


def groups(frequency: Mapping[int, str], source: str) -> dict[str, list[int]]:
    """{group: category ids}, from the frequency of each category: "f", "c" or "r" (at most 10 training pictures).

    Known categories have labels in the training set. Unseen ones are those of frequency "r", whose pictures no training has. The
    rest is seen: in pictures of the training, without labels. DataError refuses categories that are not those of LVIS v1.
    """
    found: dict[str, list[int]] = {name: [] for name in SIZES}
    for own, how_often in sorted(frequency.items()):
        if how_often not in ("f", "c", "r"):
            raise DataError(f"{source}: the frequency of category {own} must be f, c or r, got {how_often!r:.40}")
        if own in KNOWN and how_often != "f":
            raise DataError(
                f"{source}: category {own}, which LVIS-OW knows, must have the frequency f, got {how_often}; are these the "
                "categories of LVIS v1?"
            )
        found["known" if own in KNOWN else "unseen" if how_often == "r" else "seen"].append(own)
    return found
