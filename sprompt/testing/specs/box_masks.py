"""crop_masks, paste_masks."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.masks import BitMasks, Size
from sprompt.ops import crop_masks, pack_masks, paste_masks
from sprompt.testing.spec import Bench, OpSpec, Prepared, Sample, blobs, random, refusals

NAN, INF = math.nan, math.inf


def boxes_around(count: int, height: int, width: int, seed: int) -> Tensor:
    """Boxes (count, 4) whose corners lie in a picture, or up to half of it outside."""
    corners = (torch.rand(count, 2, 2, generator=random(seed)) * 2 - 0.5) * torch.tensor([width, height])
    return torch.cat((corners.amin(1), corners.amax(1)), 1)


#: Boxes of a picture of 20 x 34 pixels that are not ordinary. The first eight have a width and a height.
PECULIAR = torch.tensor(
    [
        [0, 0, 34, 20], [3, 2, 31, 16], [-200, -150, 250, 170], [5.25, 3.5, 5.2501, 3.5002], [1e-30, 1e-30, 2e-30, 3e-30],
        [-9, -8, -3, -2], [33.5, 19.5, 99, 50], [-1, 2.5, 40, 2.75],
        [20, 3, 4, 9], [4, 9, 20, 3], [7, 2, 7, 9], [3, 6, 9, 6], [NAN, 1, 9, 9], [1, 1, 9, NAN], [-INF, 1, 9, 9], [1, -INF, 9, INF],
        [3e38, 1, 3.3e38, 9], [-3e38, -3e38, 3e38, 3e38],
    ]
)  # fmt: skip


# -- crop_masks


def _crop_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    def noise(*shape: int) -> BitMasks:
        return pack_masks((torch.rand(shape, generator=random(seed)) < 0.5).to(device))

    def around(batch: int, count: int, height: int, width: int) -> Tensor:
        return boxes_around(batch * count, height, width, seed).reshape(batch, count, 4).to(device)

    def of(batch: int, count: int, masks: int) -> Tensor:
        return torch.randint(-1, masks, (batch, count), generator=random(seed)).to(device)

    smooth = pack_masks(blobs(6, 20, 34, seed, device).reshape(2, 3, 20, 34) > 0.5)
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    peculiar = PECULIAR.to(device)[None]
    return [
        Sample("blobs", (smooth, around(2, 5, 20, 34), of(2, 5, 3), 7)),
        Sample("more parts than pixels", (smooth, around(2, 3, 20, 34), of(2, 3, 3), 28)),
        Sample("one part", (smooth, around(2, 4, 20, 34), of(2, 4, 3), 1)),
        Sample("noise, wide", (noise(1, 2, 9, 300), around(1, 6, 9, 300), of(1, 6, 2), 4)),
        Sample("noise, high", (noise(2, 1, 150, 3), around(2, 3, 150, 3), of(2, 3, 1), 5)),
        Sample("peculiar boxes", (smooth[:1], peculiar, one.expand(1, len(PECULIAR)), 6)),
        Sample("whole numbers in bfloat16", (smooth, around(2, 4, 20, 34).round().clamp(0, 20).bfloat16(), of(2, 4, 3), 7)),
        Sample("float64 boxes", (smooth, around(2, 4, 20, 34).double() / 3, of(2, 4, 3), 7)),
        Sample("dense masks", (smooth.to_dense(), around(2, 4, 20, 34), of(2, 4, 3), 3)),
        Sample("one pixel", (noise(2, 2, 1, 1), around(2, 4, 1, 1), of(2, 4, 2), 3)),
        Sample("no boxes", (smooth, around(2, 0, 20, 34), of(2, 0, 3), 7)),
        Sample("no masks", (smooth[:, :0], around(2, 3, 20, 34), of(2, 3, 0), 7)),
        Sample("no images", (smooth[:0], around(0, 3, 20, 34), of(0, 3, 3), 7)),
        Sample("no pixels", (noise(2, 3, 0, 5), around(2, 3, 20, 34), of(2, 3, 3), 2)),
    ]  # fmt: skip


def _is_cropped(box: list[float]) -> bool:
    return box[0] < box[2] and box[1] < box[3] and all(abs(x) <= 2.0**24 for x in box)


def crop_oracle(masks: BitMasks | Tensor, boxes: Tensor, index: Tensor, size: int) -> Tensor:
    """RoIAlign in numpy, with every sample of every box, as the formula has it."""
    dense = (masks.to_dense() if isinstance(masks, BitMasks) else masks != 0).cpu().numpy().astype(np.float64)
    pixels = dense.shape[2:]
    out = np.zeros((*index.shape, size, size))
    for b, n in np.ndindex(*index.shape):
        box = boxes[b, n].double().tolist()
        if index[b, n] < 0 or not _is_cropped(box) or 0 in pixels:
            continue
        mask = dense[b, index[b, n]]
        cells, weights, counts = [], [], []
        for low, high, length in ((box[1], box[3], pixels[0]), (box[0], box[2], pixels[1])):
            part = (high - low) / size
            g = math.ceil(part)
            places = (low - 0.5 + part * np.arange(size)[:, None] + (np.arange(g) + 0.5) * part / g).ravel()
            inside = (places >= -1) & (places <= length)
            places = places.clip(0, length - 1)
            lower = places.astype(np.int64)
            fraction = places - lower
            cells.append((lower, (lower + 1).clip(max=length - 1)))
            weights.append((inside * (1 - fraction), inside * fraction))
            counts.append(g)
        values = sum(
            weights[0][i][:, None] * weights[1][j] * mask[cells[0][i][:, None], cells[1][j]]
            for i in range(2)
            for j in range(2)
        )
        out[b, n] = values.reshape(size, counts[0], size, counts[1]).mean((1, 3))
    return torch.from_numpy(out).to(index.device)


def _crop_bound(sample: Sample) -> tuple[float, float]:
    """(g + g') 2^-26 for the weights of the largest box, and 2^-25 for the result."""
    boxes, size = sample.args[1].double(), sample.args[3]
    sides = [(box[i + 2] - box[i]) / size for box in boxes.reshape(-1, 4).tolist() if _is_cropped(box) for i in (0, 1)]
    return 0.0, 2 * math.ceil(max(sides, default=0)) * 2.0**-26 + 2.0**-25


_masks = BitMasks(torch.zeros(2, 3, 1, dtype=torch.int32), (4, 6))
_boxes, _index = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)
_bad_crop = refusals(crop_masks)


# -- paste_masks


def _paste_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random(seed)).to(device, dtype)

    def around(count: int, height: int, width: int) -> Tensor:
        return boxes_around(count, height, width, seed).to(device)

    special = 2 * uniform(6, 7, 7) - 0.5
    special[:, 2, 3:5], special[:, 5, 1], special[1:, 4, 6], special[3:, 0, 0] = INF, -INF, NAN, NAN
    peculiar = PECULIAR.to(device)
    own_size = torch.tensor([[3.0, 2, 10, 9]], device=device).expand(6, 4)
    return [
        Sample("blobs", (blobs(9, 28, 28, seed).to(device, dtype), around(9, 75, 133), (75, 133))),
        Sample("noise", (uniform(5, 14, 14), around(5, 60, 90), (60, 90))),
        Sample("a low threshold: values around the boxes", (uniform(5, 3, 3), around(5, 60, 90), (60, 90)), {"threshold": 0.05}),
        Sample("boxes smaller than the map", (uniform(8, 28, 28), around(8, 9, 13), (9, 13))),
        Sample("peculiar boxes", (uniform(len(PECULIAR), 6, 6), peculiar, (20, 34))),
        Sample("peculiar boxes, threshold 0", (uniform(len(PECULIAR), 2, 2), peculiar.double(), (20, 34)), {"threshold": 0.0}),
        Sample("infinities and NaN", (special, around(6, 40, 67) / 2 + 5, (40, 67))),
        Sample("infinities and NaN, boxes of the map's size", (special, own_size, (12, 40))),
        Sample("threshold inf", (special, around(6, 20, 34), (20, 34)), {"threshold": INF}),
        Sample("one cell", (uniform(4, 1, 1), around(4, 20, 34), (20, 34))),
        Sample("a column of pixels", (uniform(6, 5, 5), around(6, 99, 1), (99, 1))),
        Sample("many masks of a word", (uniform(70, 4, 4), around(70, 5, 6), (5, 6))),
        Sample("whole numbers in bfloat16", (uniform(4, 7, 7), around(4, 20, 34).round().bfloat16(), (20, 34))),
        Sample("no masks", (uniform(0, 7, 7), around(0, 5, 6), (5, 6))),
        Sample("no pixels", (uniform(2, 7, 7), around(2, 5, 6), (0, 6))),
        Sample("empty map, no pixels", (uniform(2, 0, 0), around(2, 5, 6), (0, 0))),
    ]  # fmt: skip


def pasted(soft: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """The float pictures (N, H, W) in the dtype of the map, as mask heads paste: grid_sample over the whole picture. Zeros where
    a side of the box is not finite or not > 0."""
    height, width = size
    boxes = boxes.to(soft.dtype)
    extent = boxes[:, 2:] - boxes[:, :2]
    usable = ((extent > 0) & extent.isfinite()).all(1)
    boxes = torch.where(usable[:, None], boxes, torch.tensor([0, 0, 1, 1]).to(boxes))
    grids = []
    for axis, pixels in ((0, width), (1, height)):
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        grids.append((torch.arange(pixels).to(boxes) + 0.5 - low) / (high - low) * 2 - 1)
    x, y = grids
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    pictures = F.grid_sample(soft[:, None], grid, padding_mode="zeros", align_corners=False)[:, 0]
    return torch.where(usable[:, None, None], pictures, 0)


#: Rounding error of the interpolation in float32, relative to the largest cell. Closer to the threshold, both bits are right.
NEAR = 1e-6


def same_but_near(actual: BitMasks, expected: BitMasks, sample: Sample) -> None:
    """Checks that bits agree with grid_sample in float64, except where it is within rounding of the threshold, or not finite."""
    bound = sample.bound(paste_masks)
    soft, size, threshold = bound["soft"].detach(), tuple(bound["size"]), bound.get("threshold", 0.5)
    assert actual.size == size and actual.shape == soft.shape[:1]
    ours, theirs = actual.to_dense().cpu(), expected.to_dense().cpu()
    if ours.numel() == 0:
        return
    pixels = pasted(soft.double(), bound["boxes"].detach().double(), size).cpu()
    cells = soft.double().cpu()
    largest = max(float(cells[cells.isfinite()].abs().max()), 1.0)
    known = pixels.isfinite() & ((pixels == 0) | ((pixels - threshold).abs() > NEAR * largest))
    assert torch.equal(ours[known], (pixels > threshold)[known])
    assert torch.equal(ours[known], theirs[known])


_soft, _four = torch.zeros(3, 5, 5), torch.zeros(3, 4)
_bad_paste = refusals(paste_masks)

SPECS = [
    OpSpec(
        crop_masks, _crop_samples, ("crop_masks",), dtypes=(), oracle=crop_oracle, bound=_crop_bound,
        errors=(
            _bad_crop("a list", "masks must be a BitMasks or a dense tensor, got list", [1], _boxes, _index, 7, error=TypeError),
            _bad_crop("masks of one image", r"masks must have batch dimensions \(B, G\), got \(3,\)", _masks[0], _boxes, _index, 7),
            _bad_crop("whole boxes", "boxes must have dtype float32, .*, got int64", _masks, _boxes.long(), _index, 7, error=TypeError),
            _bad_crop("boxes of one image", r"boxes must have shape \(B, N, 4\), got \(5, 4\); one image", _masks, _boxes[0], _index, 7),
            _bad_crop("boxes of other images", r"boxes must have shape \(B, N, 4\), got \(1, 5, 4\)", _masks, _boxes[:1], _index, 7),
            _bad_crop("int32 index", "index must have dtype int64, got int32", _masks, _boxes, _index.int(), 7, error=TypeError),
            _bad_crop("an index too few", r"index must have shape \(B, N\) = \(2, 5\), got \(2, 4\)", _masks, _boxes, _index[:, 1:], 7),
            _bad_crop("index too high", r"index must lie in \[0, 3\), or be -1, got 3; it counts", _masks, _boxes, _index + 3, 7),
            _bad_crop("index too low", r"index must lie in \[0, 3\), or be -1, got -2; it counts", _masks, _boxes, _index - 2, 7),
            _bad_crop("no parts", "size must be a whole number from 1 to 32768, got 0", _masks, _boxes, _index, 0),
            _bad_crop("too many parts", "size must be a whole number .*, got 32769", _masks, _boxes, _index, 32769),
            _bad_crop("two sizes", r"size must be a whole number .*, got \(7, 7\)", _masks, _boxes, _index, (7, 7), error=TypeError),
            _bad_crop("another device", r"boxes must be on the device of masks \(cpu\), got meta", _masks, _boxes.to("meta"), _index, 7),
        ),
    ),
    OpSpec(
        paste_masks, _paste_samples, ("paste_masks",), compare=same_but_near,
        errors=(
            _bad_paste("a list", "soft must be a tensor, got list", [1.0], _four, (8, 8), error=TypeError),
            _bad_paste("bits", "soft must have dtype float32, .*, got bool", _soft > 0, _four, (8, 8), error=TypeError),
            _bad_paste("one map", r"soft must have shape \(N, s, s\), got \(5, 5\); one mask: index", _soft[0], _four, (8, 8)),
            _bad_paste("not square", r"soft must have shape \(N, s, s\) = \(3, 5, 5\), got \(3, 5, 4\)", _soft[:, :, 1:], _four, (8, 8)),
            _bad_paste("whole boxes", "boxes must have dtype float32, .*, got int64", _soft, _four.long(), (8, 8), error=TypeError),
            _bad_paste("boxes of other masks", r"boxes must have shape \(N, 4\) = \(3, 4\), got \(2, 4\); give", _soft, _four[:2], (8, 8)),
            _bad_paste("size a number", r"size must be \(H, W\), got 8", _soft, _four, 8, error=TypeError),
            _bad_paste("size negative", "size must be two whole numbers, at least 0, got -1", _soft, _four, (8, -1)),
            _bad_paste("2^31 pixels", "size must have at most 2147483647 pixels, got 65536x32768", _soft, _four, (2**16, 2**15)),
            _bad_paste("empty map", r"size must be empty for an empty map of 0x0, got \(2, 2\)", _soft[:, :0, :0], _four, (2, 2)),
            _bad_paste("threshold negative", "threshold must be a number, at least 0, got -0.5", _soft, _four, (8, 8), threshold=-0.5),
            _bad_paste("threshold NaN", "threshold must be a number, at least 0, got nan", _soft, _four, (8, 8), threshold=NAN),
            _bad_paste("another device", r"boxes must be on the device of soft \(cpu\), got meta", _soft, _four.to("meta"), (8, 8)),
        ),
    ),
]  # fmt: skip


# -- benchmarks: the mask targets and the results of a mask head for pictures of COCO


def _objects(count: int, size: Size, seed: int) -> Tensor:
    """Boxes (count, 4) inside the picture, with sides of 3 % to 60 % of the picture's, small ones more often."""
    height, width = size
    g = random(seed)
    sides = 0.6 * 20.0 ** -torch.rand(count, 2, generator=g) * torch.tensor([width, height])
    corner = torch.rand(count, 2, generator=g) * (torch.tensor([width, height]) - sides)
    return torch.cat((corner, corner + sides), 1)


def _targets(images: int) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        boxes = _objects(20 * images, (800, 1333), seed)
        masks = torch.stack([pack_masks(_ellipse(box, (800, 1333))).words for box in boxes])
        masks = BitMasks(masks.reshape(images, 20, -1).to(device), (800, 1333))
        index = torch.arange(100).remainder(20).expand(images, 100).contiguous()
        of = boxes.reshape(images, 20, 4)[:, index[0]]
        moved = of + (of[..., 2:] - of[..., :2]).repeat(1, 1, 2) * 0.1 * torch.randn(of.shape, generator=random(seed))
        clipped = moved.clamp(min=0).minimum(torch.tensor([1333, 800, 1333, 800]))
        return Sample("", (masks, clipped.to(device), index.to(device), 28))

    return make


def _ellipse(box: Tensor, size: Size) -> Tensor:
    y, x = (torch.arange(n) + 0.5 for n in size)
    x1, y1, x2, y2 = box
    return ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2)[:, None] / (y2 - y1)) ** 2 <= 1


_dense = Prepared(lambda masks: masks.to_dense(torch.float32))


def _eager_crop(masks: BitMasks, boxes: Tensor, index: Tensor, size: int) -> Tensor:
    """Box by box on dense float masks: all samples by grid_sample, then their means."""
    dense = _dense(masks)
    height, width = masks.size
    out = dense.new_zeros(*index.shape, size, size)
    for b, n in np.ndindex(*index.shape):
        x1, y1, x2, y2 = boxes[b, n].tolist()
        if x1 >= x2 or y1 >= y2:
            continue
        rows, columns = math.ceil((y2 - y1) / size), math.ceil((x2 - x1) / size)
        y = y1 + (torch.arange(size * rows, device=boxes.device) + 0.5) * ((y2 - y1) / (size * rows))
        x = x1 + (torch.arange(size * columns, device=boxes.device) + 0.5) * ((x2 - x1) / (size * columns))
        grid = torch.stack(torch.broadcast_tensors(x * 2 / width - 1, (y * 2 / height - 1)[:, None]), -1)
        mask = dense[b, index[b, n]][None, None]
        samples = F.grid_sample(mask, grid[None], padding_mode="border", align_corners=False)
        out[b, n] = F.avg_pool2d(samples, (rows, columns))[0, 0]
    return out


def _agree_crop(actual: Tensor, expected: Tensor, sample: Sample) -> None:
    """grid_sample rounds positions to float32, up to 2^-13 of a pixel."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)


def _results(count: int, size: Size) -> Callable[[torch.device, torch.dtype, int], Sample]:
    """Maps of 28 x 28 as a mask head predicts them: a shape that fills most of its box, with a smooth edge."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        y, x = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
        rough = F.interpolate(torch.randn(1, count, 5, 5, generator=random(seed)), (28, 28), mode="bilinear")[0]
        soft = torch.sigmoid(6 * (1 - x**2 - y**2) + 2 * rough)
        return Sample("", (soft.to(device, dtype), _objects(count, size, seed).to(device), size))

    return make


def _eager_paste(soft: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """grid_sample over whole pictures, so many at a time that 1 GB holds the grids."""
    step = max(1, 2**30 // (8 * size[0] * size[1]))
    return torch.cat(
        [pasted(soft[i : i + step].float(), boxes[i : i + step], size) > 0.5 for i in range(0, len(soft), step)]
    )


def _box_by_box(soft: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """grid_sample over each box only."""
    out = torch.zeros(len(soft), *size, dtype=torch.bool, device=soft.device)
    for n, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        left, top = max(math.floor(x1) - 1, 0), max(math.floor(y1) - 1, 0)
        right, bottom = min(math.ceil(x2) + 1, size[1]), min(math.ceil(y2) + 1, size[0])
        moved = boxes[n : n + 1] - boxes.new_tensor([left, top, left, top])
        out[n, top:bottom, left:right] = pasted(soft[n : n + 1].float(), moved, (bottom - top, right - left))[0] > 0.5
    return out


def _agree_paste(actual: BitMasks, expected: Tensor, sample: Sample) -> None:
    """Checks that masks differ only close to the threshold: the other side rounds positions to float32."""
    soft, boxes, size = sample.args
    for n in range(0, len(soft), max(1, len(soft) // 100)):  # about a hundred of a GPU's batch
        off = actual[n].to_dense() != expected[n]
        pixels = pasted(soft[n : n + 1].double(), boxes[n : n + 1].double(), size)[0]
        assert bool(((pixels[off] - 0.5).abs() < 1e-3).all()), f"{int(off.sum())} pixels of mask {n} differ"


BENCHES = [
    Bench(
        crop_masks, "100 of 20 x (800x1333), 28x28", _targets(1), _eager_crop, vectorised=False, agree=_agree_crop,
        bytes=20 * 800 * 1333 / 8 + 4 * 100 * 784,
    ),
    Bench(
        crop_masks, "12 x 100 of 20 x (800x1333), 28x28", _targets(12), _eager_crop, vectorised=False, agree=_agree_crop,
        bytes=12 * (20 * 800 * 1333 / 8 + 4 * 100 * 784), device="cuda",
    ),
    *(
        Bench(
            paste_masks, f"100 x (28x28 -> {size[0]}x{size[1]})", _results(100, size), _eager_paste, agree=_agree_paste,
            libraries={"box by box": _box_by_box}, bytes=100 * (4 * 784 + size[0] * size[1] / 8),
            goals={"forward": 10, "memory": 20},
        )
        for size in ((480, 640), (800, 1333))
    ),
    Bench(
        paste_masks, "12 x 100 x (28x28 -> 800x1333)", _results(1200, (800, 1333)), _eager_paste, agree=_agree_paste,
        dtypes=(torch.float32, torch.bfloat16), bytes=1200 * (4 * 784 + 800 * 1333 / 8), device="cuda",
    ),
]  # fmt: skip
