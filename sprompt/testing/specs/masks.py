"""pack_masks, mask_area, mask_boxes, mask_iou."""

from collections.abc import Callable

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import mask_area, mask_boxes, mask_iou, pack_masks
from sprompt.testing.spec import Bench, ErrorCase, OpSpec, Sample, blobs, random, smooth

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
    """numpy's packbits, little end first."""
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
        Sample("none of a", (pack_masks(many)[:0], pack_masks(many))),
        Sample("none of b", (pack_masks(many), pack_masks(many)[:0])),
        Sample("no pixels", (pack_masks(many[:, :0]), pack_masks(many[:2, :0]))),
    ]


def _iou_oracle(a: BitMasks | Tensor, b: BitMasks | Tensor | None = None) -> Tensor:
    dense = [(m.to_dense() if isinstance(m, BitMasks) else m).flatten(-2).double() for m in (a, a if b is None else b)]
    common = dense[0] @ dense[1].mT
    either = dense[0].sum(-1)[..., :, None] + dense[1].sum(-1)[..., None, :] - common
    return torch.where(either > 0, common / either, 0).float()


def _eager_pack(masks: Tensor, threshold: float = 0.5) -> BitMasks:
    return _pack_oracle(masks, threshold)


def _eager_iou(a: BitMasks, b: BitMasks) -> Tensor:
    x, y = a.to_dense(torch.float32).flatten(1), b.to_dense(torch.float32).flatten(1)
    common = x @ y.T
    return common / (x.sum(1)[:, None] + y.sum(1)[None] - common)


def _pycocotools_iou() -> Callable[[BitMasks, BitMasks], Tensor]:
    cache: dict[int, object] = {}

    def iou(a: BitMasks, b: BitMasks) -> Tensor:
        from pycocotools import mask as coco

        for m in (a, b):  # the RLEs are the library's own input: made once, not timed
            if id(m) not in cache:
                cache[id(m)] = coco.encode(m.to_dense(torch.uint8).permute(1, 2, 0).numpy().copy(order="F"))
        return torch.from_numpy(coco.iou(cache[id(a)], cache[id(b)], [0] * len(b))).float()

    return iou


_masks = torch.zeros(3, 4, 5)

_size = r"mask_iou: b must have masks of the size of a, \(4, 5\), got \(2, 5\)"
_batch = r"mask_iou: b must have the batch dimensions of a, \(1,\), got \(\)"
_rank = r"masks must have shape \(..., H, W\), got \(5,\)"
_none = r"mask_area: masks must be a BitMasks or a dense tensor, got NoneType"

SPECS = [
    OpSpec(
        pack_masks,
        _pack_samples,
        ("pack_masks",),
        oracle=_pack_oracle,
        errors=(
            ErrorCase("list", lambda: pack_masks([1]), TypeError, "pack_masks: masks must be a tensor, got list"),
            ErrorCase(
                "complex", lambda: pack_masks(_masks + 1j), TypeError, "pack_masks: masks must have dtype bool, "
            ),
            ErrorCase("one row", lambda: pack_masks(_masks[0, 0]), ValueError, "pack_masks: " + _rank),
            ErrorCase(
                "threshold NaN", lambda: pack_masks(_masks, float("nan")), ValueError, "pack_masks: threshold must"
            ),
        ),
    ),
    OpSpec(
        mask_area,
        _bit_samples,
        ("mask_area",),
        dtypes=(),
        oracle=lambda masks: (masks.to_dense() if isinstance(masks, BitMasks) else masks).sum((-2, -1)),
        errors=(ErrorCase("none", lambda: mask_area(None), TypeError, _none),),
    ),
    OpSpec(
        mask_boxes,
        _bit_samples,
        ("mask_boxes",),
        dtypes=(),
        errors=(ErrorCase("one row", lambda: mask_boxes(_masks[0, 0]), ValueError, "mask_boxes: " + _rank),),
    ),
    OpSpec(
        mask_iou,
        _iou_samples,
        ("mask_iou",),
        dtypes=(),
        oracle=_iou_oracle,
        bound=lambda sample: (1e-7, 0.0),
        errors=(
            ErrorCase("sizes differ", lambda: mask_iou(_masks, _masks[:, :2]), ValueError, _size),
            ErrorCase("batches differ", lambda: mask_iou(_masks[None], _masks), ValueError, _batch),
            ErrorCase("one mask", lambda: mask_iou(_masks[0]), ValueError, "mask_iou: a must be a list of masks"),
        ),
    ),
]


def _dense_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", (blobs(500, 200, 272, seed, device).to(dtype),))


def _iou_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", tuple(pack_masks(blobs(300, 480, 640, seed + i, device)) for i in range(2)))


def _noise_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    """Every word of every pair must be read; as RLE each mask is 150 000 runs, which pycocotools is not made for."""
    return Sample("", tuple(pack_masks(_dense((300, 480, 640), seed + i, device, 0.5)) for i in range(2)))


def _overlap_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", tuple(pack_masks(smooth(300, (9, 9), 480, 640, seed + i, device) > 0.7) for i in range(2)))


BENCHES = [
    Bench(
        pack_masks, "12 x 100 x (100x168)", lambda device, dtype, seed: Sample("", (blobs(1200, 100, 168, seed, device).to(dtype),)),
        _eager_pack, vectorised=False, dtypes=(torch.float32, torch.bfloat16), device="cuda",
    ),
    Bench(mask_iou, "300 x 300 of 480x640 bits, noise", _noise_bench, _eager_iou, device="cuda"),
    Bench(pack_masks, "500 x (200x272)", _dense_bench, _eager_pack, vectorised=False, bytes=500 * 54400 * (4 + 1 / 8)),
    Bench(mask_iou, "300 x 300 of 480x640 bits, noise", _noise_bench, _eager_iou, bytes=600 * 307200 / 8, goals={"forward": 20}),
    Bench(
        mask_iou, "300 x 300 of 480x640 bits, blobs", _iou_bench, _eager_iou, library=("pycocotools", _pycocotools_iou()),
        bytes=600 * 307200 / 8, goals={"forward": 20, "library": 2},
    ),
    Bench(
        mask_iou, "300 x 300 of 480x640 bits that overlap", _overlap_bench, _eager_iou, bytes=600 * 307200 / 8,
        goals={"forward": 20},
    ),
]  # fmt: skip
