"""pack_masks, mask_area, mask_boxes, mask_iou, and window_masks, the op of BitMasks.crop, pad and flip."""

from typing import Any

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import mask_area, mask_boxes, mask_iou, pack_masks
from sprompt.testing.spec import Bench, OpSpec, Prepared, Sample, blobs, random, refusals, smooth

SIZES = ((1, 1), (1, 37), (33, 1), (4, 8), (5, 7), (45, 51), (64, 64))


def _dense(shape: tuple[int, ...], seed: int, device: torch.device, density: float = 0.3) -> Tensor:
    return (torch.rand(shape, generator=random(seed)) < density).to(device)


def _pack_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for height, width in SIZES:
        soft = torch.rand(2, 3, height, width, generator=random(seed)).to(device, dtype)
        samples.append(Sample(f"{height}x{width}", (soft,)))
    soft = torch.randn(4, 9, 70, generator=random(seed)).to(device, dtype)
    soft[0, 0, :5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.25, 0.5])
    samples += [
        Sample("special values, threshold 0.25", (soft, 0.25)),
        Sample("no batch", (soft[0],)),
        Sample("bool", (soft > 0,)),
        Sample("uint8 of 0, 1, 255", ((soft > 0).to(torch.uint8) * 255,)),
        Sample("int64 with negatives", (torch.arange(-3, 3, device=device).reshape(1, 2, 3),)),
        Sample("no masks", (soft[:0],)),
        Sample("height 0", (soft[:, :0],)),
        Sample("width 0", (soft[:, :, :0],)),
    ]
    return samples


def _pack_oracle(masks: Tensor, threshold: float = 0.5) -> BitMasks:
    """numpy's packbits, little-endian."""
    import numpy as np

    dense = masks.cpu()
    bits = ((dense > threshold) if dense.is_floating_point() else (dense != 0)).flatten(-2).numpy()
    n = -(-bits.shape[-1] // 32)
    padded = np.zeros((*bits.shape[:-1], 32 * n), dtype=bool)
    padded[..., : bits.shape[-1]] = bits
    words = np.packbits(padded, axis=-1, bitorder="little").view(np.int32).reshape(*bits.shape[:-1], n)
    return BitMasks(torch.from_numpy(words.copy()).to(masks.device), (masks.shape[-2], masks.shape[-1]))


def _bit_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = [
        Sample(f"{h}x{w}, dense", (_dense((2, 3, h, w), seed, device, density),))
        for (h, w), density in zip(SIZES, (0.5, 0.2, 0.1, 0.0, 1.0, 0.001, 0.5), strict=True)
    ]
    masks = _dense((3, 5, 20, 77), seed, device, 0.05)
    return [
        *samples,
        Sample("bits", (pack_masks(masks),)),
        Sample("one of many", (pack_masks(masks)[1],)),
        Sample("no masks", (pack_masks(masks)[:, :0],)),
        Sample("no pixels", (pack_masks(masks[:, :, :0]),)),
    ]


def _iou_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for height, width in SIZES:
        a, b = _dense((2, 3, height, width), seed, device), _dense((2, 11, height, width), seed + 1, device)
        samples.append(Sample(f"{height}x{width}", (a, pack_masks(b))))
    many = _dense((19, 120, 130), seed, device, 0.5)
    many[3] = False
    many[4] = False
    return [
        *samples,
        Sample("with itself, two empty", (many,)),
        Sample(
            "blobs", (pack_masks(blobs(17, 90, 110, seed, device)), pack_masks(blobs(9, 90, 110, seed + 1, device)))
        ),
        Sample("float64", (many[:7], many[5:]), {"dtype": torch.float64}),
        Sample("float64, with itself", (many[:9],), {"dtype": torch.float64}),
        Sample("none of a", (pack_masks(many)[:0], pack_masks(many))),
        Sample("none of b", (pack_masks(many), pack_masks(many)[:0])),
        Sample("no pixels", (pack_masks(many[:, :0]), pack_masks(many[:2, :0]))),
    ]


def _iou_oracle(
    a: BitMasks | Tensor, b: BitMasks | Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    dense = [(m.to_dense() if isinstance(m, BitMasks) else m).flatten(-2).double() for m in (a, a if b is None else b)]
    common = dense[0] @ dense[1].mT
    either = dense[0].sum(-1)[..., :, None] + dense[1].sum(-1)[..., None, :] - common
    return torch.where(either > 0, common / either, 0).to(dtype)


def _eager_pack(masks: Tensor, threshold: float = 0.5) -> BitMasks:
    """torch has no packbits. This sums 32 pixels times powers of two, on the device of the masks."""
    bits = (masks > threshold).flatten(-2)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (bits.to(torch.int32) << torch.arange(32, device=masks.device, dtype=torch.int32)).sum(
        -1, dtype=torch.int32
    )
    return BitMasks(words, (masks.shape[-2], masks.shape[-1]))


def _numpy_pack(masks: Tensor, threshold: float = 0.5) -> BitMasks:
    return _pack_oracle(masks, threshold)


def _eager_iou(a: BitMasks, b: BitMasks) -> Tensor:
    x, y = a.to_dense(torch.float32).flatten(1), b.to_dense(torch.float32).flatten(1)
    common = x @ y.T
    return common / (x.sum(1)[:, None] + y.sum(1)[None] - common)


def _coco_rles(masks: BitMasks) -> Any:
    from pycocotools import mask as coco

    return coco.encode(masks.to_dense(torch.uint8).permute(1, 2, 0).numpy().copy(order="F"))


_rles_of = Prepared(_coco_rles)


def _pycocotools_iou(a: BitMasks, b: BitMasks) -> Tensor:
    from pycocotools import mask as coco

    return torch.from_numpy(coco.iou(_rles_of(a), _rles_of(b), [0] * len(b))).float()


def _hotcoco_iou(a: BitMasks, b: BitMasks) -> Tensor:
    from hotcoco import mask as hotcoco

    return torch.from_numpy(hotcoco.iou(_rles_of(a), _rles_of(b), [0] * len(b))).float()


def _run_masks(masks: BitMasks) -> Any:
    from rlemasklib import RLEMask

    return [RLEMask.from_dict(rle) for rle in _rles_of(masks)]


_run_masks_of = Prepared(_run_masks)


def _rlemasklib_iou(a: BitMasks, b: BitMasks) -> Tensor:
    from rlemasklib import RLEMask

    return torch.from_numpy(RLEMask.iou_matrix(_run_masks_of(a), _run_masks_of(b))).float()


#: They work on run lengths. The run lengths are made before the timing, like our bits.
_IOU_LIBRARIES = {"pycocotools": _pycocotools_iou, "hotcoco": _hotcoco_iou, "rlemasklib": _rlemasklib_iou}


def window_masks(masks: BitMasks, top: int, left: int, height: int, width: int, flip: bool = False) -> BitMasks:
    """BitMasks.pad, crop and flip as one function: the window at (top, left), which may reach over the edges."""
    below, right = top + height - masks.size[0], left + width - masks.size[1]
    padded = masks.pad(max(-left, 0), max(right, 0), max(-top, 0), max(below, 0))
    window = padded.crop(max(top, 0), max(left, 0), height, width)
    return window.flip() if flip else window


def _window_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    masks = pack_masks(_dense((2, 3, 45, 77), seed, device))
    samples = [
        Sample(f"{h}x{w}, mirrored", (pack_masks(_dense((2, 3, h, w), seed, device)), 0, 0, h, w, True))
        for h, w in SIZES
    ]
    return [
        Sample("inside", (masks, 3, 5, 40, 71)),
        *samples,
        Sample("one column", (masks, 0, 76, 45, 1)),
        Sample("more on every side", (masks, -1, -3, 50, 120)),
        Sample("over the lower right corner", (masks[0], 30, 50, 40, 60)),
        Sample("over the upper left corner, mirrored", (masks[0, 1], -7, -33, 30, 64, True)),
        Sample("below", (masks, 50, 0, 5, 40)),
        Sample("no pixels", (masks, 9, 9, 0, 4)),
        Sample("of masks without pixels", (pack_masks(_dense((3, 0, 7), seed, device)), -1, -1, 3, 9)),
        Sample("no masks", (masks[:, :0], 1, 2, 8, 9)),
    ]  # fmt: skip


def _window_oracle(masks: BitMasks, top: int, left: int, height: int, width: int, flip: bool = False) -> BitMasks:
    dense = masks.to_dense()
    out = dense.new_zeros((*masks.shape, height, width))
    rows, columns = (
        slice(max(first, 0), max(min(first + length, size), first, 0))
        for first, length, size in ((top, height, masks.size[0]), (left, width, masks.size[1]))
    )
    part = dense[..., rows, columns]
    y, x = rows.start - top, columns.start - left
    out[..., y : y + part.shape[-2], x : x + part.shape[-1]] = part
    return _pack_oracle(out.flip(-1) if flip else out)


_masks = torch.zeros(3, 4, 5)
_bits = BitMasks(torch.zeros(3, 1, dtype=torch.int32), (4, 5))
_rank = r"masks must have shape \(..., H, W\), got \(5,\)"

_pack, _area, _boxes, _iou = refusals(pack_masks), refusals(mask_area), refusals(mask_boxes), refusals(mask_iou)
_crop, _pad = refusals(BitMasks.crop), refusals(BitMasks.pad)

SPECS = [
    OpSpec(
        pack_masks, _pack_samples, ("pack_masks",), oracle=_pack_oracle,
        errors=(
            _pack("list", "masks must be a tensor, got list", [1], error=TypeError),
            _pack("complex", "masks must have dtype bool, ", _masks + 1j, error=TypeError),
            _pack("one row", _rank, _masks[0, 0]),
            _pack("threshold NaN", "threshold must", _masks, float("nan")),
        ),
    ),
    OpSpec(
        mask_area, _bit_samples, ("mask_area",), dtypes=(),
        oracle=lambda masks: (masks.to_dense() if isinstance(masks, BitMasks) else masks).sum((-2, -1)),
        errors=(_area("none", "masks must be a BitMasks or a dense tensor, got NoneType", None, error=TypeError),),
    ),
    OpSpec(
        mask_boxes, _bit_samples, ("mask_boxes",), dtypes=(), errors=(_boxes("one row", _rank, _masks[0, 0]),),
    ),
    OpSpec(
        mask_iou, _iou_samples, ("mask_iou",), dtypes=(), oracle=_iou_oracle, bound=lambda sample: (1e-7, 0.0),
        errors=(
            _iou("sizes differ", r"b must have masks of the size of a, \(4, 5\), got \(2, 5\)", _masks, _masks[:, :2]),
            _iou("batches differ", r"b must have the batch dimensions of a, \(1,\), got \(\)", _masks[None], _masks),
            _iou("one mask", "a must be a list of masks", _masks[0]),
            _iou("half", "dtype must be one of torch.float32, torch.float64, got torch.float16", _masks, dtype=torch.float16),
        ),
    ),
    OpSpec(
        window_masks, _window_samples, ("window_masks",), dtypes=(), oracle=_window_oracle,
        errors=(
            _crop("higher than the masks", "the window must lie inside 4x5 pixels, got .*, height=5, ", _bits, 0, 0, 5, 4),
            _crop("left of the masks", "the window must lie inside 4x5 pixels, got top=0, left=-1, ", _bits, 0, -1, 2, 2),
            _crop("right of the masks", "the window must lie inside 4x5 pixels, got top=1, left=4, ", _bits, 1, 4, 2, 2),
            _crop("a negative width", "the window must lie inside 4x5 pixels, got .*, width=-1; pad first", _bits, 0, 0, 2, -1),
            _pad("a negative side", r"every side must be at least 0, got \(0, -1, 0, 0\); use crop", _bits, 0, -1, 0, 0),
        ),
    ),
]  # fmt: skip


def _dense_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", (blobs(500, 200, 272, seed, device).to(dtype),))


def _iou_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", tuple(pack_masks(blobs(300, 480, 640, seed + i, device)) for i in range(2)))


def _noise_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    """Noise: every word of every pair must be read. As RLE each mask has 150 000 runs, which is too slow for pycocotools."""
    return Sample("", tuple(pack_masks(_dense((300, 480, 640), seed + i, device, 0.5)) for i in range(2)))


def _overlap_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", tuple(pack_masks(smooth(300, (9, 9), 480, 640, seed + i, device) > 0.7) for i in range(2)))


BENCHES = [
    Bench(
        pack_masks, "12 x 100 x (100x168)", lambda device, dtype, seed: Sample("", (blobs(1200, 100, 168, seed, device).to(dtype),)),
        _eager_pack, dtypes=(torch.float32, torch.bfloat16), device="cuda",
    ),
    Bench(mask_iou, "300 x 300 of 480x640 bits, noise", _noise_bench, _eager_iou, device="cuda"),
    Bench(pack_masks, "500 x (200x272)", _dense_bench, _numpy_pack, vectorised=False, bytes=500 * 54400 * (4 + 1 / 8)),
    Bench(mask_iou, "300 x 300 of 480x640 bits, noise", _noise_bench, _eager_iou, bytes=600 * 307200 / 8, goals={"forward": 20}),
    Bench(
        mask_iou, "300 x 300 of 480x640 bits, blobs", _iou_bench, _eager_iou, libraries=_IOU_LIBRARIES,
        bytes=600 * 307200 / 8, goals={"forward": 20, "pycocotools": 2},
    ),
    Bench(
        mask_iou, "300 x 300 of 480x640 bits that overlap", _overlap_bench, _eager_iou, libraries=_IOU_LIBRARIES,
        bytes=600 * 307200 / 8, goals={"forward": 20},
    ),
    Bench(
        mask_iou, "300 x 300 of 480x640 bits that overlap", _overlap_bench, _eager_iou, bytes=600 * 307200 / 8,
        goals={"forward": 20},
    ),
]  # fmt: skip
