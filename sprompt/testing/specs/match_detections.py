"""match_detections."""

import torch
from torch import Tensor

from sprompt.ops import match_detections
from sprompt.testing.spec import Bench, OpSpec, Sample, random, refusals

#: COCO's thresholds.
LEVELS = torch.arange(10, dtype=torch.float64) / 20 + 0.5


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    g = random(seed)

    def iou(*shape: int) -> Tensor:
        """Multiples of 1/20, many of them equal to each other and to thresholds."""
        return (torch.randint(0, 21, shape, generator=g).double() / 20).to(device)

    def flags(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=g) < 0.3).to(device)

    levels = LEVELS.to(device)
    any_number = torch.rand(9, 7, generator=g, dtype=torch.float64).to(device)
    return [
        Sample("ties", (iou(12, 6), levels)),
        Sample("any numbers", (any_number, levels)),
        Sample("ignored targets", (iou(12, 6), levels, flags(6))),
        Sample("crowds", (iou(15, 6), levels, None, flags(6))),
        Sample("ignored targets and crowds", (iou(15, 9), levels, flags(9), flags(9))),
        Sample("a batch", (iou(3, 8, 5), levels, flags(3, 5), flags(3, 5))),
        Sample("two batch dimensions", (iou(2, 3, 8, 5), levels[:3], flags(2, 3, 5))),
        Sample("thresholds without order, above 1, below 0", (iou(9, 5), torch.tensor([0.75, 2.0, -1.0, 0.5, 1.0]).double().to(device))),
        Sample("one of each", (iou(1, 1), levels[:1], flags(1), flags(1))),
        Sample("no detections", (iou(2, 0, 5), levels, flags(2, 5))),
        Sample("no targets", (iou(2, 5, 0), levels, flags(2, 0), flags(2, 0))),
        Sample("no thresholds", (iou(5, 4), levels[:0])),
        Sample("no lists", (iou(0, 5, 4), levels)),
    ]  # fmt: skip


def pycocotools_matches(
    iou: Tensor, thresholds: Tensor, ignored: Tensor | None = None, crowd: Tensor | None = None
) -> Tensor:
    """COCOeval.evaluateImg of every list. Its matches are ids of targets, which are places here, plus one."""
    from pycocotools.cocoeval import COCOeval

    D, G = iou.shape[-2:]
    lists = iou.cpu().reshape(iou.shape[:-2].numel(), D, G).numpy()
    none = torch.zeros(*iou.shape[:-2], G, dtype=torch.bool)
    flags = [(none if f is None else f.cpu()).reshape(len(lists), G).tolist() for f in (ignored, crowd)]
    judge = COCOeval(None, None, "segm")
    judge.params.iouThrs = thresholds.tolist()
    match = torch.zeros(len(lists), len(thresholds), D, dtype=torch.int64)
    for b, values in enumerate(lists):
        judge._gts[b, 0] = [
            {"id": g + 1, "area": 1, "ignore": int(flags[0][b][g] or flags[1][b][g]), "iscrowd": int(flags[1][b][g])}
            for g in range(G)
        ]
        judge._dts[b, 0] = [{"id": d + 1, "area": 1, "score": -d} for d in range(D)]
        judge.ious = {(b, 0): values if G else []}
        found = judge.evaluateImg(b, 0, (0, 2), D)
        if found is not None:
            match[b] = torch.from_numpy(found["dtMatches"]).long()
    return (match - 1).reshape(*iou.shape[:-2], len(thresholds), D).to(iou.device)


_iou, _levels, _flags = torch.zeros(3, 4, dtype=torch.float64), LEVELS, torch.zeros(4, dtype=torch.bool)
_bad = refusals(match_detections)

SPECS = [
    OpSpec(
        match_detections, _samples, ("match_detections",), dtypes=(), oracle=pycocotools_matches,
        errors=(
            _bad("a list", "iou must be a tensor, got list", [[0.5]], _levels, error=TypeError),
            _bad("float32", r"iou must have dtype float64, got float32; take mask_iou\(", _iou.float(), _levels, error=TypeError),
            _bad("one row", r"iou must have shape \(..., D, G\), got \(4,\)", _iou[0], _levels),
            _bad("a number", "thresholds must be a tensor, got float", _iou, 0.5, error=TypeError),
            _bad("thresholds float32", "thresholds must have dtype float64, got float32", _iou, _levels.float(), error=TypeError),
            _bad("thresholds of rank 2", r"thresholds must have shape \(T,\), got \(1, 10\)", _iou, _levels[None]),
            _bad("ignored of integers", "ignored must have dtype bool, got int64", _iou, _levels, _flags.long(), error=TypeError),
            _bad("ignored of 3", r"ignored must have shape \(..., G\) = \(4,\), got \(3,\)", _iou, _levels, _flags[:3]),
            _bad("crowd without a batch", r"crowd must have shape \(..., G\), got \(4,\)", _iou[None], _levels, None, _flags),
            _bad("another device", r"crowd must be on the device of iou \(cpu\), got meta", _iou, _levels, None, _flags.to("meta")),
        ),
    ),
]  # fmt: skip


def _picture(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
    """One picture with 100 detections and 30 categories of up to 4 targets. A detection overlaps few targets."""
    g = random(seed)
    iou = torch.rand(30, 100, 4, generator=g, dtype=torch.float64)
    iou = torch.where(torch.rand(30, 100, 4, generator=g) < 0.1, iou, 0)
    return Sample("", (iou, LEVELS, torch.rand(30, 4, generator=g) < 0.5))


BENCHES = [
    Bench(
        match_detections, "30 x (100x4), 10 thresholds", _picture, pycocotools_matches, vectorised=False,
        bytes=30 * 100 * (8 * 4 + 8 * 10), goals={"forward": 100.0},
    ),
]  # fmt: skip
