"""Points of seeds: from the address of a seed in a grid of features to a point of the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sprompt.data.errors import DataError
from sprompt.data.transforms import resized_size
from sprompt.masks import Size


@dataclass(frozen=True)
class SeedGrid:
    """The grid of a proposal file, from `info.proposals`.

    The backbone saw a view of the picture: its size was `resized_size(size, short, long)`, padded on the right and below to
    multiples of `divisor`, and it gave one feature vector every `stride` pixels. An address [scale, row, col] names a cell. With
    `grid` None, the cell belongs to the feature map made 2^scale times coarser ("pyramid"). With `grid` (h', w'), it is one of
    the h' × w' equal cells of the whole padded view.
    """

    short: int
    long: int
    stride: int
    grid: Size | None  # None: the pyramid
    keep_ratio: bool = True  # False: the view is long × short pixels, whatever the picture
    divisor: int = 32

    @staticmethod
    def parse(info: Any, source: str) -> SeedGrid:
        """From the `info.proposals` of a file."""
        if not isinstance(info, dict) or info.get("version") != 1:
            version = info.get("version") if isinstance(info, dict) else info
            raise DataError(f"{source}: info.proposals must be of version 1, got {version!r:.40}; make the file anew")
        short, long, stride = (info.get(key) for key in ("short", "long", "stride"))
        divisor = info.get("divisor", SeedGrid.divisor)
        seeds = info.get("seeds")
        numbers = (short, long, stride, divisor, *(seeds if isinstance(seeds, list) else ()))
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 20 for n in numbers) or (
            seeds != "pyramid" and not (isinstance(seeds, list) and len(seeds) == 2)
        ):
            raise DataError(
                f"{source}: info.proposals must have short, long, stride, divisor, and seeds 'pyramid' or [h, w], got "
                f"{short!r:.20}, {long!r:.20}, {stride!r:.20}, {divisor!r:.20}, {seeds!r:.40}; make the file anew"
            )
        keep = info.get("keep_ratio", True)
        if not isinstance(keep, bool):
            raise DataError(
                f"{source}: info.proposals must have keep_ratio true or false, got {keep!r:.20}; make the file anew"
            )
        grid = None if seeds == "pyramid" else (seeds[0], seeds[1])
        return SeedGrid(short, long, stride, grid, keep, divisor)  # type: ignore[arg-type]  # the checks above made them int

    def points(self, addresses: list[Any], size: Size, name: str) -> Tensor:
        """(G, 3) float32: x and y in pixels of the picture (of size `size`), and scale. DataError calls the picture `name`."""
        view = resized_size(size, self.short, self.long) if self.keep_ratio else (self.short, self.long)
        padded = [-(-side // self.divisor) * self.divisor for side in view]
        points = []
        for address in addresses:
            if not (isinstance(address, list) and len(address) == 3 and all(type(a) is int for a in address)):
                raise DataError(f"{name}: seed must be [scale, row, col], got {address!r:.40}; make the file anew")
            scale, row, col = address
            if self.grid is None:
                cell = [float(self.stride * 2**scale)] * 2 if 0 <= scale < 8 else [float("inf")] * 2
            else:
                cell = [padded[0] / self.grid[0], padded[1] / self.grid[1]]
            y, x = (row + 0.5) * cell[0], (col + 0.5) * cell[1]  # in the view
            if not (0 < x < padded[1] and 0 < y < padded[0]):
                raise DataError(
                    f"{name}: seed must lie in the view of {view[0]}x{view[1]} pixels, got {address}; was the file made "
                    "for other pictures?"
                )
            points.append((x * size[1] / view[1], y * size[0] / view[0], float(scale)))
        return torch.tensor(points, dtype=torch.float32).reshape(-1, 3)
