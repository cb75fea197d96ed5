"""rle_encode, rle_decode, and resize_masks followed by rle_encode."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import pack_masks, resize_masks, rle_decode, rle_encode
from sprompt.testing.spec import Bench, ErrorCase, OpSpec, Prepared, Sample, blobs, random, refusals

Rles = list[dict[str, Any]]

#: Sizes around a word, a vector and the 64 x 64 blocks of the kernels, and with several strips of 1024 columns.
SIZES = ((1, 1), (1, 37), (33, 1), (5, 7), (64, 64), (45, 51), (63, 65), (130, 31), (129, 300), (3, 2100), (70, 1030))


def _masks(height: int, width: int, seed: int, device: torch.device) -> Tensor:
    """(6, height, width): four densities of noise, a blob, a checkerboard."""
    draw = torch.rand(4, height, width, generator=random(seed)) < torch.tensor([0.5, 0.02, 0.0, 1.0])[:, None, None]
    board = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
    return torch.cat([draw, blobs(1, height, width, seed) > 0.5, board[None]]).to(device)


def _encode_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = [Sample(f"{h}x{w}", (_masks(h, w, seed, device),)) for h, w in SIZES]
    masks = _masks(20, 45, seed, device)
    return [
        *samples,
        Sample("bits", (pack_masks(masks),)),
        Sample("two leading dimensions", (pack_masks(masks).reshape(2, 3),)),
        Sample("one mask", (masks[0],)),
        Sample("uint8", (masks.to(torch.uint8) * 255,)),
        Sample("float", (masks.float(),)),
        Sample("no masks", (masks[:0],)),
        Sample("height 0", (masks[:, :0],)),
        Sample("width 0", (masks[:, :, :0],)),
    ]


def _dense(masks: BitMasks | Tensor) -> Tensor:
    dense = masks.to_dense() if isinstance(masks, BitMasks) else masks > 0.5
    return dense.reshape(dense.shape[:-2].numel(), *dense.shape[-2:])


def coco_encode(masks: BitMasks | Tensor) -> Rles:
    """pycocotools, from masks in the layout of a network's output: one mask after the other."""
    import numpy as np
    from pycocotools import mask as coco

    return coco.encode(np.asfortranarray(_dense(masks).permute(1, 2, 0).cpu().numpy().view(np.uint8)))


def coco_decode(rles: Rles, size: tuple[int, int] | None = None) -> BitMasks:
    from pycocotools import mask as coco

    if not rles:
        assert size is not None
        return pack_masks(torch.zeros(0, *size))
    rles = [coco.frPyObjects(r, *r["size"]) if isinstance(r["counts"], (list, tuple)) else r for r in rles]
    return pack_masks(torch.from_numpy(coco.decode(rles)).permute(2, 0, 1))


def _encoded(masks: Tensor) -> Rles:
    """RLEs by pycocotools. If it is not installed, as on some GPU machines, by our own kernel."""
    return coco_encode(masks) if importlib.util.find_spec("pycocotools") else rle_encode(masks)


def _decode_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = [Sample(f"{h}x{w}", (_encoded(_masks(h, w, seed, torch.device("cpu"))),)) for h, w in SIZES]
    rles = _encoded(_masks(20, 45, seed, torch.device("cpu")))
    text = [{**r, "counts": r["counts"].decode()} for r in rles]
    return [
        *samples,
        Sample("str", (text,)),
        Sample("size given", (rles, (20, 45))),
        Sample(
            "lists of runs", ([{"size": [3, 4], "counts": c} for c in ([12], [0, 12], [5, 1, 2, 4], [1, 0, 0, 2, 9])],)
        ),
        Sample("a run of 0 between", ([{"size": (2, 3), "counts": b"2004"}, {"size": (2, 3), "counts": "6000"}],)),
        Sample("no masks", ([], (5, 6))),
        Sample("no pixels", ([{"size": [0, 5], "counts": b"0"}, {"size": [0, 5], "counts": b""}],)),
    ]


def same_rles(ours: Rles, theirs: Rles, sample: Sample) -> None:
    assert ours == theirs and all(type(r["counts"]) is bytes for r in ours), sample.name


_bad_encode, _bad = refusals(rle_encode), refusals(rle_decode)


def _second(name: str, message: str, counts: object, size: object = (3, 4)) -> ErrorCase:
    """An error case of two entries. The second entry is wrong."""
    return _bad(name, message, [{"size": [3, 4], "counts": b"<"}, {"size": size, "counts": counts}])


_TOO_LONG = r"rles\[1\] must have numbers of at most 12 characters, got a longer number from character "
_HUGE = BitMasks(torch.zeros(0, 1 << 26, dtype=torch.int32), (1 << 15, 1 << 16))
_LARGEST = {"size": [1 << 15, (1 << 16) - 1], "counts": b"0"}

#: All faults that entries can have.
MALFORMED = (
    _second("no counts", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got 0 in 0 runs", b""),
    _second("too few", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got 8 in 1 runs", b"8"),
    _second("too many", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got more in run 0", b"=00"),
    _second("too many later", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got 11 in 3 runs", b"335"),
    _second("one too many", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got more in run 2", b"337"),
    _second("runs behind the end", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got more in run 1", b"<1"),
    _second(
        "broken off", r"rles\[1\] must have counts that end with a complete number, got an incomplete number from character 1 on", b"3P",
    ),
    _second("12 groups, broken off", _TOO_LONG + "0 on", b"P" * 12),
    _second("14 groups", _TOO_LONG + "1 on", b"3" + b"o" * 13 + b"0"),
    _second("negative", r"rles\[1\] must have runs of at least 0 pixels, got -1 in run 1", b"3O"),
    _second("negative by difference", r"rles\[1\] must have runs of at least 0 pixels, got -1 in run 3", b"321M"),
    _second("smallest number", r"rles\[1\] must have runs of at least 0 pixels, got -\d+ in run 0", b"o" * 10 + b"P@"),
    _second("largest number", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got more in run 0", b"o" * 11 + b"?"),
    _second("character below", r"rles\[1\] must have counts of the characters 0 to o, got b'/' at 1", b"3/9"),
    _second("character above", r"rles\[1\] must have counts of the characters 0 to o, got b'p' at 1", b"3p"),
    _second("NUL", r"rles\[1\] must have counts of the characters 0 to o, got b'\\x00' at 1", b"<\0"),
    _second("newline in str", r"rles\[1\] must have counts of the characters 0 to o, got b'\\n' at 1", "<\n"),
    _second("not ASCII", r"rles\[1\] must have counts of the characters 0 to o, got 'é'", "<é"),
    _second("counts None", r"rles\[1\] must have counts that are bytes, a str or a list of whole numbers, got NoneType", None),
    _second("counts a number", r"rles\[1\] must have counts that are bytes, a str or a list of whole numbers, got int", 12),
    _second("list of floats", r"rles\[1\] must have whole numbers as counts, got 3.0 in run 0", [3.0, 9.0]),
    _second("list of bools", r"rles\[1\] must have whole numbers as counts, got True in run 1", [3, True]),
    _second("list of strings", r"rles\[1\] must have whole numbers as counts, got '3' in run 0", ["3"]),
    _second("list, negative", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got more in run 0", [13, -1]),
    _second("list, negative first", r"rles\[1\] must have runs of at least 0 pixels, got -1 in run 0", [-1, 13]),
    _second("list, too few", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got 7 in 2 runs", [3, 4]),
    _second("list, too many", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got more in run 1", [3, 10]),
    _second("list, huge", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got more in run 0", [10**40]),
    _second("list, none", r"rles\[1\] must have runs that sum to 3x4 = 12 pixels, got 0 in 0 runs", []),
    _second("another size", r"rles\[1\] must have size \[3, 4\], got \[4, 3\]; decode masks of one size at a time", b"<", (4, 3)),
    _second("negative size", r"the size of rles\[1\] must be at least 0 on each side, got \[-3, -4\]", b"<", (-3, -4)),
    _second("one side", r"the size of rles\[1\] must be two whole numbers \[H, W\], got \[12\]", b"<", [12]),
    _second("three sides", r"the size of rles\[1\] must be two whole numbers \[H, W\], got \[3, 4, 1\]", b"<", [3, 4, 1]),
    _second("size of floats", r"the size of rles\[1\] must be two whole numbers \[H, W\], got \[3.0, 4\]", b"<", [3.0, 4]),
    _second("size of bools", r"the size of rles\[1\] must be two whole numbers \[H, W\], got \[True, 4\]", b"<", [True, 4]),
    _second("size a str", r"the size of rles\[1\] must be two whole numbers \[H, W\], got '34'", b"<", "34"),
    _second("size None", r"the size of rles\[1\] must be two whole numbers \[H, W\], got None", b"<", None),
    _second("size a number", r"the size of rles\[1\] must be two whole numbers \[H, W\], got 12", b"<", 12),
    _second("huge size", r"the size of rles\[1\] must have at most 2\^31 - 1 pixels, got \[65536, 32768\]", b"<", [2**16, 2**15]),
    _second("size past int64", r"the size of rles\[1\] must have at most 2\^31 - 1 pixels, got", b"<", [10**30, 10**30]),
    _second("an infinite line", r"the size of rles\[1\] must have at most 2\^31 - 1 pixels, got \[0, 2147483648\]", b"0", [0, 2**31]),
    _bad("huge in all", r"rles must have at most 2\^35 pixels in all, got 17 x 32768x65535; decode in parts", [_LARGEST] * 17),
    _bad("not a dict", r"rles\[0\] must be a dict with size and counts, got list", [[3, 4]]),
    _bad("no size", r"rles\[0\] must be a dict with size and counts, got keys \['counts'\]", [{"counts": b"0"}]),
    _bad("no counts key", r"rles\[0\] must be a dict with size and counts, got keys \['size'\]", [{"size": [0, 0]}]),
    _bad("empty list, no size", r"size must be given for an empty list, got None; pass size=\(H, W\)", []),
    _bad("size argument", r"size must be at least 0 on each side, got \[1, -1\]", [], (1, -1)),
    _bad("another size than asked for", r"rles\[0\] must have size \[4, 3\], got \[3, 4\]", [{"size": [3, 4], "counts": b"<"}], (4, 3)),
)  # fmt: skip

SPECS = [
    OpSpec(
        rle_encode, _encode_samples, ("rle_encode",), dtypes=(), oracle=coco_encode, compare=same_rles, dynamic=True, compiles=False,
        errors=(
            _bad_encode("none", "masks must be a BitMasks or a dense tensor, got NoneType", None, error=TypeError),
            _bad_encode("one row", r"masks must have shape \(..., H, W\), got \(4,\)", torch.zeros(4)),
            _bad_encode("complex", "masks must have dtype bool, ", torch.zeros(1, 2, 2).cfloat(), error=TypeError),
            _bad_encode("huge", r"masks must have at most 2\^31 - 1 pixels, got 32768x65536", _HUGE),
        ),
    ),
    OpSpec(
        rle_decode, _decode_samples, ("rle_decode",), dtypes=(), oracle=coco_decode, dynamic=True, compiles=False,
        errors=(
            _bad("a dict", "rles must be a list of RLEs, got dict", {"size": [3, 4], "counts": b"<"}, error=TypeError),
            _bad("bytes", "rles must be a list of RLEs, got bytes", b"<", error=TypeError),
            *MALFORMED,
        ),
    ),
]  # fmt: skip


def _blob_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", (torch.stack([blobs(1, 800, 1333, seed + i, device)[0] > 0.5 for i in range(100)]),))


def _noise_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", (torch.rand(10, 800, 1333, generator=random(seed)).to(device) < 0.5,))


def _bits_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", (pack_masks(_blob_bench(device, dtype, seed).args[0]),))


def _batch_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    """The same 100 masks for each of 12 images."""
    return Sample("", (BitMasks(_bits_bench(device, dtype, seed).args[0].words.repeat(12, 1), (800, 1333)),))


def _noise_batch_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample(
        "", (BitMasks(pack_masks(_noise_bench(device, dtype, seed).args[0]).words.repeat(12, 1), (800, 1333)),)
    )


def _decode_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", (rle_encode(_blob_bench(device, dtype, seed).args[0]),))


def _noise_decode_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", (rle_encode(_noise_bench(device, dtype, seed).args[0]),))


def _plain_decode(rles: Rles) -> Tensor:
    """Typical use of pycocotools: decodes to bytes (height, width, count), and keeps them."""
    from pycocotools import mask as coco

    return torch.from_numpy(coco.decode(rles))


def _decoder(module: str) -> Callable[[Rles], Tensor]:
    """The same with a module that has the decode function of pycocotools."""

    def decode(rles: Rles) -> Tensor:
        return torch.from_numpy(importlib.import_module(module).decode(rles))

    return decode


_DECODERS = {"hotcoco": _decoder("hotcoco.mask"), "rlemasklib": _decoder("rlemasklib")}


def decode_to_dense(rles: Rles) -> Tensor:
    return rle_decode(rles).to_dense()


def _same_dense(ours: Tensor, theirs: Tensor, sample: Sample) -> None:
    assert torch.equal(ours.view(torch.uint8), theirs.permute(2, 0, 1))


def _same_pixels(ours: BitMasks, theirs: Tensor, sample: Sample) -> None:
    assert torch.equal(ours.to_dense(torch.uint8), theirs.permute(2, 0, 1))


def _fortran(masks: BitMasks | Tensor) -> Any:
    import numpy as np

    return np.asfortranarray(_dense(masks).permute(1, 2, 0).cpu().numpy().view(np.uint8))


_fortran_of = Prepared(_fortran)


def _coco_only(masks: BitMasks | Tensor) -> Rles:
    """Only pycocotools.encode: the bytes are given in its own order."""
    from pycocotools import mask as coco

    return coco.encode(_fortran_of(masks))


def _hotcoco_encode(masks: BitMasks | Tensor) -> Rles:
    from hotcoco import mask as hotcoco

    return hotcoco.encode(_fortran_of(masks))


_rows_of = Prepared(lambda masks: _dense(masks).cpu().numpy())


def _rlemasklib_encode(masks: BitMasks | Tensor) -> Rles:
    import rlemasklib

    return rlemasklib.encode(_rows_of(masks), batch_first=True)


#: Each takes bytes in the order that suits it best: column by column for the first two.
_ENCODERS = {"pycocotools": _coco_only, "hotcoco": _hotcoco_encode, "rlemasklib": _rlemasklib_encode}


def resize_and_encode(logits: Tensor, size: tuple[int, int]) -> Rles:
    """The last step of a detector for its masks, (L, h, w) logits."""
    return rle_encode(resize_masks(logits, size))


def _eager_resize_and_encode(logits: Tensor, size: tuple[int, int]) -> Rles:
    large = torch.nn.functional.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    return coco_encode(large > 0)


def _resize_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    return Sample("", ((8 * (blobs(100, 200, 336, seed, device) - 0.5)).to(dtype), (800, 1333)))


def _resize_batch_bench(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    logits, size = _resize_bench(device, dtype, seed).args
    return Sample("", (logits.repeat(12, 1, 1), size))


def _nearly_the_same(ours: Rles, theirs: Rles, sample: Sample) -> None:
    """F.interpolate rounds in another order, so pixels at the threshold may differ."""
    different = (rle_decode(ours).to_dense() ^ rle_decode(theirs).to_dense()).sum()
    assert different <= 1e-5 * len(ours) * _P, f"{different} pixels differ"


_P = 800 * 1333
BENCHES = [
    Bench(
        rle_encode, "100 x (800x1333), from dense", _blob_bench, coco_encode, vectorised=False, agree=same_rles,
        libraries=_ENCODERS, bytes=100 * _P, goals={"forward": 8, "pycocotools": 8},
    ),
    Bench(
        rle_encode, "100 x (800x1333), from bits", _bits_bench, coco_encode, vectorised=False, agree=same_rles,
        libraries=_ENCODERS, bytes=100 * _P / 8, goals={"forward": 8, "pycocotools": 8},
    ),
    Bench(
        rle_encode, "10 x (800x1333) of noise, from dense", _noise_bench, coco_encode, vectorised=False, agree=same_rles,
        libraries={"pycocotools": _coco_only}, bytes=10 * _P * 1.5,
    ),
    Bench(
        rle_decode, "100 x (800x1333)", _decode_bench, _plain_decode, vectorised=False, agree=_same_pixels,
        libraries=_DECODERS, bytes=100 * _P / 8, goals={"forward": 4},
    ),
    Bench(
        decode_to_dense, "100 x (800x1333)", _decode_bench, _plain_decode, vectorised=False, agree=_same_dense,
        libraries=_DECODERS, bytes=100 * _P, goals={"forward": 4, "rlemasklib": 1},
    ),
    Bench(
        rle_decode, "10 x (800x1333) of noise", _noise_decode_bench, _plain_decode, vectorised=False, agree=_same_pixels,
        bytes=10 * _P * (1 / 8 + 1 / 2),
    ),
    Bench(
        resize_and_encode, "100 x (200x336 -> 800x1333)", _resize_bench, _eager_resize_and_encode, vectorised=False,
        agree=_nearly_the_same, flops=100 * _P * 6, bytes=100 * 200 * 336 * 4, goals={"forward": 8, "memory": 20},
    ),
    Bench(
        rle_encode, "12 x 100 x (800x1333), from bits", _batch_bench, coco_encode, vectorised=False, agree=same_rles, device="cuda",
        libraries={"pycocotools": _coco_only}, bytes=1200 * _P / 8,
    ),
    Bench(
        rle_encode, "12 x 10 x (800x1333) of noise, from bits", _noise_batch_bench, coco_encode, vectorised=False, agree=same_rles,
        device="cuda", libraries={"pycocotools": _coco_only}, bytes=120 * _P * (1 / 8 + 1 / 2),
    ),
    Bench(
        resize_and_encode, "12 x 100 x (200x336 -> 800x1333)", _resize_batch_bench, _eager_resize_and_encode, vectorised=False,
        agree=_nearly_the_same, device="cuda", flops=1200 * _P * 6, bytes=1200 * 200 * 336 * 4,
    ),
]  # fmt: skip
