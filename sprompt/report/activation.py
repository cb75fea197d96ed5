"""Kernel activation: the mean mask of each kernel over pictures (the paper's Figure 6)."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.atomic import atomic_write
from sprompt.data.draw import heat_map
from sprompt.data.errors import DataError
from sprompt.data.transforms import collate
from sprompt.models.protocol import features_of
from sprompt.report.album import Album
from sprompt.report.page import Section, join, tag
from sprompt.report.prompts import device_of, resized

SIDE = 200  # cells of a map in each direction, for pictures of any shape
_MOST = 1 << 30  # upper bound of the bytes of maps that are read from a file


@torch.no_grad()
def activation_maps(
    model: Any, dataset: Any, limit: int | None = None, *, short: int = 800, long: int = 1333
) -> Tensor:
    """The mean over pictures of the sigmoid of each kernel's last mask, stretched to 200 × 200: float32 (N, 200, 200).

    Args:
        model: a QueryModel.
        dataset: samples; unreadable pictures are skipped.
        limit: number of pictures, spread evenly over the dataset; None takes all.
        short, long: pictures are resized to these sides first. The padding does not count.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise ValueError("activation_maps: dataset must have at least one picture, got none; give pictures")
    total: Tensor | None = None
    seen = 0
    for k in range(count):
        try:
            sample = dataset[k * len(dataset) // count]
        except DataError:
            continue  # a broken picture; the predictions name it
        seen += 1
        batch = collate([resized(sample, short, long)]).to(device_of(model))
        masks = model.mask_logits(model.decode(features_of(model, batch.images, batch.sizes))).float().sigmoid()
        own = _stretched(masks, batch.sizes[0], (batch.images.shape[2], batch.images.shape[3]))[0].cpu()
        total = own if total is None else total + own
    if total is None:
        raise DataError(f"activation_maps: none of {count} pictures can be read")
    return total / seen


def save_activation(path: Path | str, maps: Tensor) -> None:
    """Writes maps (N, h, w) as the array `activation` of an .npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, activation=maps.cpu().numpy().astype(np.float16))
    atomic_write(path, file.getvalue())


def read_activation(source: Path | str | Tensor | np.ndarray) -> np.ndarray:
    """Maps (N, h, w) of a file that `save_activation` wrote, or of a tensor."""
    if isinstance(source, Tensor):
        source = source.detach().cpu().float().numpy()
    if isinstance(source, np.ndarray):
        maps, name = source, "activation"
    else:
        name = str(source)
        try:
            with zipfile.ZipFile(source) as archive:
                if archive.getinfo("activation.npy").file_size > _MOST:
                    raise DataError(f"{name}: must hold at most {_MOST} bytes of maps, got more; is it the right file?")
            with np.load(source, allow_pickle=False) as arrays:
                maps = arrays["activation"]
        except DataError:
            raise
        except Exception as error:  # zip files can be broken in many ways
            raise DataError(f"{name}: must be an .npz file with an array activation, got {error}") from None
    if maps.ndim != 3 or 0 in maps.shape or maps.dtype.kind not in "fiu":
        raise DataError(f"{name}: activation must hold numbers of shape (N, h, w), got {maps.dtype} {maps.shape}")
    return maps.astype(np.float32)


def spread(maps: np.ndarray) -> np.ndarray:
    """(N,) root mean square distance of the activation of each map (N, h, w) from its own centre, in widths of the map.

    A uniform map has √(1/6) ≈ 0.41, a map with one active cell about 0, and a map without activation infinity.
    """
    centres, squares = _moments(maps)
    variance = (squares - centres**2).sum(1).clip(min=0)
    return np.where(np.isnan(variance), np.inf, np.sqrt(variance))


def scatter(maps: np.ndarray) -> float:
    """Root mean square distance of the centres of the maps (N, h, w) from their mean, in widths of the map; NaN without
    activation.

    It is 0 if all kernels have the same map. It is up to √(1/6) ≈ 0.41 if the kernels divide the picture evenly among
    themselves.
    """
    centres, _ = _moments(maps)
    centres = centres[~np.isnan(centres).any(1)]
    return float(np.sqrt(centres.var(0).sum())) if len(centres) else float("nan")


def placed(maps: np.ndarray) -> str:
    """The median of `spread` and the value of `scatter`, as words of a caption; empty without activation."""
    far = spread(maps)
    finite = far[np.isfinite(far)]
    return f"median spread {np.median(finite):.2f}, centres scattered by {scatter(maps):.2f}" if finite.size else ""


def _moments(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) means of y and x, and (N, 2) means of their squares, weighted by each map (N, h, w); NaN without activation.

    Each side of a map has length 1.
    """
    weights = np.nan_to_num(maps.astype(np.float64)).clip(min=0)
    mass = weights.sum((1, 2))
    safe = np.where(mass > 0, mass, np.nan)
    first, second = np.empty((2, len(maps), 2))
    for axis, size in ((1, maps.shape[1]), (2, maps.shape[2])):
        place = (np.arange(size) + 0.5) / size
        along = weights.sum(3 - axis)
        first[:, axis - 1], second[:, axis - 1] = along @ place / safe, along @ place**2 / safe
    return first, second


def section(album: Album, maps: np.ndarray) -> Section:
    """The section with a heat map of each kernel, the most local kernel first."""
    far = spread(maps)
    order = np.argsort(far, kind="stable").tolist()
    figures = []
    for k in order:
        peak = float(np.nanmax(maps[k])) if np.isfinite(maps[k]).any() else 0.0
        words = f"kernel {k}: spread {far[k]:.2f}, peak {peak:.2f}"
        shot = album.map(f"kernel-{k:03}", heat_map(maps[k], 0.0, peak), f"Mean activation of {words}")
        caption = tag("figcaption", tag("span", k), tag("span", f"{peak:.2f}", title="peak"))
        figures.append(tag("figure", shot, caption, data_title=words, title=words))
    ramp = np.linspace(0, 1, 8)[None]
    colours = ",".join("#{:02x}{:02x}{:02x}".format(*c) for c in np.asarray(heat_map(ramp))[0].tolist())
    note = tag(
        "p", "The mean mask of every kernel over the pictures, each stretched to a square. Colours go from ",
        tag("span", class_="ramp", style=f"background:linear-gradient(90deg,{colours})", role="img", aria_label="dark to light"),
        " 0 to the peak of the map. The number on the right below a map is its peak. The most local kernels come first: they "
        "learned to look in one place. The last kernels look everywhere.",
        class_="note",
    )  # fmt: skip
    sheet = tag("div", figures, class_="maps", style=f"--ar:{maps.shape[2] / maps.shape[1]:.3f}")
    said = ", ".join(filter(None, (f"{len(maps)} kernels", placed(maps))))
    return Section("kernels", "Kernel activation", join(note, sheet), said)


def _stretched(masks: Tensor, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """Masks (1, N, h, w) without the padding, resampled to SIDE × SIDE, bilinear with half-pixel centres.

    `size` is the size of the picture, `padded` its size with padding.
    """
    place = (torch.arange(SIDE, device=masks.device) + 0.5) / SIDE
    y, x = (2 * place * size[i] / padded[i] - 1 for i in (0, 1))
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
    return F.grid_sample(masks, grid, mode="bilinear", padding_mode="border", align_corners=False)
