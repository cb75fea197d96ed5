"""BitMasks: a set of masks with 1 bit per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class BitMasks:
    """Masks of one size, packed: `words` int32 (..., n), n = ceil(H·W / 32), and `size` = (H, W).

    Pixel p = y·W + x is bit p % 32 of word p // 32, as `np.unpackbits(..., bitorder="little")` reads it. The bits behind the
    last pixel are 0. Leading dimensions are batch dimensions: indexing, `shape`, `cat` and `stack` act on them. A BitMasks is a
    pytree and can be pickled. No method changes the object.

    >>> masks = BitMasks.from_dense(torch.tensor([[[1, 0], [1, 1]]]))
    >>> masks.shape, masks.size, masks.area().tolist(), masks.boxes().tolist()
    (torch.Size([1]), (2, 2), [3], [[0, 0, 2, 2]])
    """

    words: Tensor
    size: Size

    def __post_init__(self) -> None:
        if not isinstance(self.words, Tensor):
            return  # torch rebuilds pytrees with placeholders instead of tensors
        height, width = size = _checked_size("BitMasks", self.size)
        if type(self.size) is not tuple:
            object.__setattr__(self, "size", size)
        if self.words.dtype != torch.int32:
            raise TypeError(
                f"BitMasks: words must have dtype int32, got {self.words.dtype}; pack masks with BitMasks.from_dense"
            )
        n = words_for(height * width)
        if self.words.dim() < 1 or self.words.shape[-1] != n:
            raise ValueError(
                f"BitMasks: words must have shape (..., {n}) for {height}x{width} pixels, got {tuple(self.words.shape)}; "
                "one word holds 32 pixels"
            )

    # -- properties
    @property
    def shape(self) -> torch.Size:
        """The batch dimensions: the dimensions of `words` without the last."""
        return self.words.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("BitMasks: len() of a single mask; it has no batch dimension")
        return self.shape[0]

    def __repr__(self) -> str:
        height, width = self.size
        return f"BitMasks(shape={tuple(self.shape)}, size={height}x{width}, device={self.device})"

    # -- batch dimensions
    def __getitem__(self, index: Any) -> BitMasks:
        """Indexes the batch dimensions, like a tensor of shape `self.shape`."""
        index = index if isinstance(index, tuple) else (index,)
        rest = (slice(None),) if any(i is Ellipsis for i in index) else (Ellipsis, slice(None))
        place = (*index, *rest)
        return BitMasks(self.words[place], self.size)

    def reshape(self, *shape: int) -> BitMasks:
        return BitMasks(self.words.reshape(*shape, self.words.shape[-1]), self.size)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BitMasks:
        return BitMasks(self.words.to(device, non_blocking=non_blocking), self.size)

    @staticmethod
    def cat(masks: Sequence[BitMasks], dim: int = 0) -> BitMasks:
        return BitMasks(torch.cat([m.words for m in masks], _batch_dim(masks, dim, 0)), _common_size(masks))

    @staticmethod
    def stack(masks: Sequence[BitMasks], dim: int = 0) -> BitMasks:
        return BitMasks(torch.stack([m.words for m in masks], _batch_dim(masks, dim, 1)), _common_size(masks))

    # -- to and from pixels
    @staticmethod
    def from_dense(masks: Tensor, threshold: float = 0.5) -> BitMasks:
        """Packs (..., H, W). A pixel is set where bool and integers are not 0, and where floats are > threshold. NaN is not
        set."""
        from sprompt import ops

        return ops.pack_masks(masks, threshold)

    def to_dense(self, dtype: torch.dtype = torch.bool) -> Tensor:
        """Dense masks (..., H, W) of 0 and 1."""
        from sprompt.ops.masks import unpack_masks

        return unpack_masks(self, dtype)

    @staticmethod
    def from_rle(rles: Sequence[dict[str, Any]], size: Size | None = None) -> BitMasks:
        """See `sprompt.ops.rle_decode`."""
        from sprompt import ops

        return ops.rle_decode(rles, size)

    def rle(self) -> list[dict[str, Any]]:
        """See `sprompt.ops.rle_encode`."""
        from sprompt import ops

        return ops.rle_encode(self)

    # -- measures
    def area(self) -> Tensor:
        """Number of set pixels, int64 (...)."""
        from sprompt import ops

        return ops.mask_area(self)

    def boxes(self) -> Tensor:
        """Tightest boxes x1, y1, x2, y2 with exclusive ends, int64 (..., 4). Zeros for an empty mask."""
        from sprompt import ops

        return ops.mask_boxes(self)

    def iou(self, other: BitMasks | None = None) -> Tensor:
        """Intersection over union of every pair, float32 (..., N, M)."""
        from sprompt import ops

        return ops.mask_iou(self, other)

    # -- geometry
    def flip(self) -> BitMasks:
        """The masks, mirrored left to right."""
        height, width = self.size
        return self._window(0, 0, height, width, flip=True)

    def crop(self, top: int, left: int, height: int, width: int) -> BitMasks:
        """The window of height × width pixels at (top, left), which must lie inside the masks."""
        if min(top, left, height, width) < 0 or top + height > self.size[0] or left + width > self.size[1]:
            raise ValueError(
                f"BitMasks.crop: the window must lie inside {self.size[0]}x{self.size[1]} pixels, got "
                f"{top=}, {left=}, {height=}, {width=}; pad first"
            )
        return self._window(top, left, height, width)

    def pad(self, left: int, right: int, top: int, bottom: int) -> BitMasks:
        """Adds empty columns and rows on each side, in the order of `torch.nn.functional.pad`."""
        if min(left, right, top, bottom) < 0:
            raise ValueError(f"BitMasks.pad: every side must be at least 0, got {(left, right, top, bottom)}; use crop")
        height, width = self.size
        return self._window(-top, -left, top + height + bottom, left + width + right)

    def resize(self, size: Size, mode: str = "bilinear", threshold: float = 0.5) -> BitMasks:
        """The masks at another size (H, W).

        "bilinear": set where the bilinear interpolation of 0 and 1 (half-pixel centres, no antialias) is > threshold, a number
        from 0 to below 1. Equals `sprompt.ops.resize_masks` of the dense masks.
        "nearest": the pixel under `torch.nn.functional.interpolate(mode="nearest")`.
        "any": set where one of the covered pixels is, so no object is lost. A pixel covers the window of
        `torch.nn.functional.adaptive_avg_pool2d`. `threshold` is for "bilinear" only.

        >>> masks = BitMasks.from_dense(torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1]]))
        >>> [masks.resize((1, 2), mode).to_dense().int().tolist() for mode in ("bilinear", "nearest", "any")]
        [[[0, 0]], [[1, 0]], [[1, 1]]]
        """
        from sprompt.ops import checks
        from sprompt.ops.resize_masks import checked_size, op

        height, width = checked_size("BitMasks.resize", size, self.size)
        checks.choice("BitMasks.resize", "mode", mode, ("bilinear", "nearest", "any"))
        if mode != "bilinear":
            words = op.cover_bits(self.words, *self.size, height, width, mode == "nearest")
            return BitMasks(words, (height, width))
        rule = "lie in [0, 1)"
        checks.number("BitMasks.resize", "threshold", threshold, rule, 0)
        if threshold >= 1:
            checks.bad_value("BitMasks.resize", "threshold", rule, threshold, "no interpolation of 0 and 1 exceeds 1")
        return BitMasks(op.resize_bits(self.words, *self.size, height, width, float(threshold)), (height, width))

    def _window(self, top: int, left: int, height: int, width: int, flip: bool = False) -> BitMasks:
        from sprompt.ops.masks import op

        words = op.window_masks(self.words, *self.size, top, left, height, width, flip)
        return BitMasks(words, (height, width))


def words_for(pixels: int) -> int:
    """32-bit words that hold this many pixels."""
    return (pixels + 31) // 32


def _checked_size(op: str, size: Any) -> Size:
    if not (isinstance(size, (tuple, list)) and len(size) == 2):
        raise TypeError(f"{op}: size must be (H, W), got {size!r}")
    height, width = size
    if type(height) is int and type(width) is int and height >= 0 and width >= 0:
        return height, width
    for side in (height, width):
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"{op}: size must be two whole numbers, got {size!r}")
    if height < 0 or width < 0:
        raise ValueError(f"{op}: size must be at least 0 on each side, got {size!r}")
    return height, width


def _common_size(masks: Sequence[BitMasks]) -> Size:
    sizes = {m.size for m in masks}
    if len(sizes) != 1:
        raise ValueError(
            f"BitMasks: masks must have the same size to be joined, got sizes {sorted(sizes)}; resize or pad them first"
        )
    return masks[0].size


def _batch_dim(masks: Sequence[BitMasks], dim: int, extra: int) -> int:
    """Returns a batch dimension counted from the front. The dimension of the words is not a batch dimension."""
    if not masks:
        raise ValueError("BitMasks: cat and stack need at least one BitMasks, got none")
    rank = len(masks[0].shape) + extra
    if not -rank <= dim < rank:
        raise ValueError(f"BitMasks: dim must be a batch dimension, between {-rank} and {rank - 1}, got {dim}")
    return dim % rank


def _flatten(masks: BitMasks) -> tuple[list[Tensor], Size]:
    return [masks.words], masks.size


def _flatten_with_keys(masks: BitMasks) -> tuple[list[tuple[Any, Tensor]], Size]:
    return [(pytree.GetAttrKey("words"), masks.words)], masks.size


def _unflatten(children: Any, size: Size) -> BitMasks:
    (words,) = children
    return BitMasks(words, size)


pytree.register_pytree_node(
    BitMasks,
    _flatten,
    _unflatten,
    serialized_type_name="sprompt.BitMasks",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=_flatten_with_keys,
)
