"""`make demo`, or `python -m sprompt.demo`: from a picture to stored proposals, with nothing to download.

Draws a picture of six textured objects, describes it by a small fixed filter bank, finds its objects as saliency proposals
(saliency_masks → resize_masks → rle_encode), and writes demo/picture.png, demo/overlay.png and demo/proposals.json (COCO).
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sprompt import BitMasks, trace_backends
from sprompt.ops import mask_area, mask_boxes, mask_iou, pack_masks, resize_masks, rle_encode, saliency_masks

try:
    from PIL import Image, ImageDraw, ImageFont
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"sprompt.demo: {error}; type `pip install Pillow rich`") from None

HEIGHT, WIDTH = 480, 640
STRIDE = 16  # pixels of a feature cell
MIN_SCORE = 0.9
TEXTURE = 0.4  # weight of lightness and texture; hue has 1
COLOURS = ((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240))

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]  # y, x (H, W) -> (H, W) in [0, 1]: 0 first colour, 1 second


def _stripes(period: float, angle: float) -> Texture:
    return lambda y, x: 0.5 + 0.5 * np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period)


def _checks(period: int) -> Texture:
    return lambda y, x: ((y // period + x // period) % 2).astype(float)


def _dots(period: int) -> Texture:
    return lambda y, x: (np.hypot(y % period - period / 2, x % period - period / 2) < period / 3).astype(float)


def _polygon(corners: int, radius: float, inner: float, turn: float, cy: float, cx: float) -> list[tuple[float, float]]:
    """A star of so many points; inner = 1 gives the regular polygon of twice as many corners."""
    return [
        (cx + r * math.sin(turn + math.pi * k / corners), cy - r * math.cos(turn + math.pi * k / corners))
        for k in range(2 * corners)
        for r in [radius if k % 2 == 0 else radius * inner]
    ]


#: name, outline (x, y), texture, its two colours
OBJECTS: list[tuple[str, list[tuple[float, float]], Texture, tuple[int, int, int], tuple[int, int, int]]] = [
    ("striped disc", _polygon(40, 78, 1.0, 0.0, 130, 120), _stripes(14, 0.6), (214, 60, 40), (250, 140, 90)),
    ("checked square", _polygon(2, 95, 1.0, 0.5, 120, 330), _checks(12), (30, 60, 170), (110, 160, 240)),
    ("dotted star", _polygon(5, 100, 0.55, 0.1, 140, 535), _dots(14), (240, 200, 40), (200, 120, 20)),
    ("hexagon", _polygon(3, 85, 1.0, 0.3, 355, 130), _stripes(9, 2.2), (130, 40, 150), (205, 120, 215)),
    ("ellipse", [(360 + 100 * math.cos(t / 20), 350 + 62 * math.sin(t / 20)) for t in range(126)], _dots(11),
     (20, 130, 130), (120, 225, 210)),
    ("triangle", [(475, 440), (615, 430), (560, 290)], _checks(9), (190, 30, 110), (250, 150, 190)),
]  # fmt: skip


def draw_picture(seed: int = 0) -> tuple[Image.Image, Tensor]:
    """The picture (HEIGHT × WIDTH, RGB) and where its objects really are, bool (6, HEIGHT, WIDTH)."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack((150 + 20 * y / HEIGHT, 168 + 10 * y / HEIGHT, 150 - 10 * y / HEIGHT), -1)
    truth = []
    for _, outline, texture, first, second in OBJECTS:
        plate = Image.new("L", (WIDTH, HEIGHT))
        ImageDraw.Draw(plate).polygon(outline, fill=255)
        inside = np.asarray(plate) > 0
        mix = texture(y, x)[..., None]
        pixels = np.where(inside[..., None], (1 - mix) * np.array(first) + mix * np.array(second), pixels)
        truth.append(torch.from_numpy(inside))
    pixels += generator.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), torch.stack(truth)


def _blur(planes: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, 1, H, W)."""
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    padded = torch.nn.functional.pad(planes, (radius,) * 4, mode="reflect")
    return torch.conv2d(torch.conv2d(padded, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))


def _bumps(value: Tensor, count: int) -> Tensor:
    """Spreads a value (1, 1, H, W) in [0, 1] softly over bins, (1, count, H, W): exp(−½((value − c_k) / width)²)."""
    centres = torch.linspace(0, 1, count).view(1, -1, 1, 1)
    return torch.exp(-0.5 * ((value - centres) * (count - 1) / 0.8) ** 2)


def filter_bank(picture: Image.Image) -> Tensor:
    """Features (1, 76, H / STRIDE, W / STRIDE): hue, lightness and fine texture of each cell.

    Two opponent colours, lightness, and the energy of the gradient at two widths are averaged over a cell and spread over bins
    (the colours jointly). Cells that look alike then have nearly parallel vectors and cells that do not nearly orthogonal
    ones, as in a trained network.
    """
    red, green, blue = torch.from_numpy(np.array(picture)).float().div(255).permute(2, 0, 1)[:, None, None]
    light = (red + green + blue) / 3
    planes = [0.5 + (red - green), 0.5 + (blue - (red + green) / 2), light]
    for sigma in (1.0, 2.5):
        smooth = torch.nn.functional.pad(_blur(light, sigma), (1,) * 4, mode="reflect")
        dy, dx = smooth[..., 2:, 1:-1] - smooth[..., :-2, 1:-1], smooth[..., 1:-1, 2:] - smooth[..., 1:-1, :-2]
        planes.append(5 * sigma * _blur(torch.hypot(dy, dx), 4.0))
    warm, cool, *others = torch.nn.functional.avg_pool2d(torch.cat(planes, 1), STRIDE).split(1, 1)
    hue = (_bumps(warm, 8)[:, :, None] * _bumps(cool, 8)[:, None]).flatten(1, 2)
    return torch.cat((hue, *(TEXTURE * _bumps(plane, 4) for plane in others)), 1)


def image_level(masks: BitMasks, scores: Tensor) -> Tensor:
    """Which proposals may stay, bool (L,): not hugging the top, not as wide as the picture, score at least MIN_SCORE."""
    rows = masks.to_dense().any(-1)  # (L, H)
    middle = (rows * torch.arange(rows.shape[-1])).sum(-1) / rows.sum(-1).clamp(min=1)
    boxes = mask_boxes(masks)
    return (middle > 0.2 * HEIGHT) & (boxes[:, 2] - boxes[:, 0] < 0.95 * WIDTH) & (scores >= MIN_SCORE)


def coco_file(masks: BitMasks, scores: Tensor, seeds: Tensor) -> dict[str, Any]:
    """The stored form of one image's proposals: COCO, boxes as x, y, width, height, compressed RLE, seed as scale, row, column."""
    annotations = [
        {
            "id": number, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": area,
            "segmentation": {"size": rle["size"], "counts": _text(rle["counts"])}, "score": round(score, 6), "seed": seed,
        }
        for number, ((x1, y1, x2, y2), area, rle, score, seed) in enumerate(
            zip(
                mask_boxes(masks).tolist(), mask_area(masks).tolist(), rle_encode(masks), scores.tolist(), seeds.tolist(),
                strict=True,
            ),
            start=1,
        )
    ]  # fmt: skip
    height, width = masks.size
    return {
        "images": [{"id": 1, "file_name": "picture.png", "height": height, "width": width}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def draw_overlay(picture: Image.Image, masks: BitMasks, scores: Tensor) -> Image.Image:
    """Every proposal in its colour, with its box and its score; the best on top."""
    pixels = np.array(picture).astype(float) * 0.7 + 50
    boxes = mask_boxes(masks).tolist()
    for number in reversed(range(len(masks))):
        inside = masks[number].to_dense()
        eroded = -torch.nn.functional.max_pool2d(-inside[None].float(), 5, stride=1, padding=2)[0]  # by 2 pixels
        inner = eroded > 0
        paint = np.array(COLOURS[number % len(COLOURS)])
        pixels[inner.numpy()] = 0.65 * pixels[inner.numpy()] + 0.35 * paint
        pixels[(inside & ~inner).numpy()] = paint
    overlay = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(overlay)
    font = ImageFont.load_default(15)
    for number, ((x1, y1, x2, y2), score) in enumerate(zip(boxes, scores.tolist(), strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colour, width=2)
        label = f"{number + 1}: {score:.2f}"
        pen.rectangle((x1, y1, x1 + pen.textlength(label, font) + 6, y1 + 19), fill=colour)
        pen.text((x1 + 3, y1 + 1), label, fill="black" if sum(colour) > 380 else "white", font=font)
    return overlay


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sprompt.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="of the picture's noise")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    steps = Table("step", "result", "ms", "backend", title="From a picture to stored proposals (median of 7 runs)")

    def step(name: str, run: Callable[[], Any], describe: Callable[[Any], str]) -> Any:
        times = []
        with trace_backends() as ran:
            for _ in range(8):  # the first is the warm-up
                start = time.perf_counter()
                result = run()
                times.append(1e3 * (time.perf_counter() - start))
        used = ", ".join(sorted({backend for _, backend in ran}))
        steps.add_row(name, describe(result), f"{statistics.median(times[1:]):.1f}", used or "plain torch")
        return result

    picture, truth = draw_picture(args.seed)
    features = step("filter_bank", lambda: filter_bank(picture), lambda f: f"features {tuple(f.shape)}")
    found = step(
        "saliency_masks",
        lambda: saliency_masks(features, threshold=0.5, max_masks=20, return_soft=True),
        lambda f: f"{int(f.counts[0])} proposals at {f.masks.size[0]}x{f.masks.size[1]} cells",
    )
    count = int(found.counts[0])
    masks = step(
        "resize_masks",
        lambda: resize_masks(found.soft[0, :count], (HEIGHT, WIDTH), threshold=0.5),
        lambda m: f"{len(m)} masks of {m.size[0]}x{m.size[1]} bits, {m.words.nbytes // 1024} KiB",
    )
    scores, seeds = found.scores[0, :count], found.seeds[0, :count]
    stay = image_level(masks, scores)
    masks, scores, seeds = masks[stay], scores[stay], seeds[stay]
    record = step(
        "boxes, areas, RLE",
        lambda: coco_file(masks, scores, seeds),
        lambda r: f"{len(r['annotations'])} proposals after the image-level filters",
    )
    overlap = step(
        "mask_iou", lambda: mask_iou(pack_masks(truth), masks), lambda iou: f"{iou.shape[0]} objects x {iou.shape[1]}"
    )
    console.print(steps)

    objects = Table(
        "object",
        "proposal",
        "score",
        "IoU",
        "box",
        "seed",
        title="What it found, and how well (seed: scale, row, column)",
    )
    for number, (name, *_) in enumerate(OBJECTS):
        if not len(masks):
            break
        iou, best = overlap[number].max(0)
        entry = record["annotations"][int(best)]
        objects.add_row(
            name, str(entry["id"]), f"{entry['score']:.3f}", f"{iou:.3f}", str(entry["bbox"]), str(entry["seed"])
        )
    console.print(objects)

    picture.save(args.out / "picture.png")
    draw_overlay(picture, masks, scores).save(args.out / "overlay.png")
    (args.out / "proposals.json").write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written: {args.out}/picture.png, {args.out}/overlay.png, {args.out}/proposals.json")


if __name__ == "__main__":
    main()
