"""The CUDA kernel of resize_masks gives the bits of the reference: bands of 64 rows (fewer with many cells or few maps), tiles of up to
64 words of columns, slots of 64 columns."""

import pytest
import torch

import sprompt
from sprompt import BitMasks, cuda
from sprompt.ops import resize_masks
from sprompt.testing.spec import blobs

INF, NAN = float("inf"), float("nan")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_cuda = pytest.mark.skipif(
    bool(cuda.why_not(torch.empty(0, device=DEVICE))), reason="needs a GPU, or a build that emulates one"
)


def kinds(M: int, h: int, w: int, seed: int) -> torch.Tensor:
    """(4 M, h, w): noise, smooth maps, maps whose cells lie on one side of 0 except for one cell, noise with NaN and
    infinities."""
    g = torch.Generator().manual_seed(seed)
    noise, smooth = torch.randn(2 * M, h, w, generator=g), 8 * blobs(M, h, w, seed) - 4
    single, special = torch.full((M, h * w), -1.0), noise[M:].clone()
    single[1::2] = 1
    single[torch.arange(M), torch.randint(h * w, (M,), generator=g)] *= -1
    chance = torch.rand(M, h, w, generator=g)
    special[chance < 0.05] = NAN
    special[(chance > 0.05) & (chance < 0.1)] = INF
    special[(chance > 0.1) & (chance < 0.15)] = -INF
    return torch.cat((noise[:M], smooth, single.view(M, h, w), special))


def same_on_cuda(soft: torch.Tensor, size: tuple[int, int], **options: object) -> None:
    with sprompt.use_backend("cuda"), sprompt.trace_backends() as ran:
        words = resize_masks(soft.to(DEVICE), size, **options).words.cpu()
    assert ran == [("resize_masks", "cuda")]
    with sprompt.use_backend("reference"):
        expected = resize_masks(soft, size, **options)
    off = (BitMasks(words, size).to_dense() != expected.to_dense()).nonzero()
    assert torch.equal(words, expected.words), (
        f"{tuple(soft.shape)} -> {size}: {len(off)} pixels, first {off[:3].tolist()}"
    )


@on_cuda
@pytest.mark.parametrize("W", (1, 2, 5, 31, 32, 33, 63, 64, 65, 97, 100))
def test_cuda_widths_around_words(W: int) -> None:
    """Heights near that of a band. Rows share a word with the row below, or with many rows below."""
    for i, H in enumerate((1, 7, 9, 33, 65)):
        larger = kinds(2, max(1, H // 4), max(1, W // 4), i)
        same_on_cuda(larger, (H, W))
        same_on_cuda(kinds(1, H, W, i), (H, W))
        same_on_cuda(kinds(1, 2 * H + 1, 3 * W + 1, i), (H, W))
        same_on_cuda(larger, (H, W), crop=(0.6 * larger.shape[1], 0.9 * larger.shape[2]), threshold=0.3)


@on_cuda
@pytest.mark.parametrize(("M", "H"), [(22, 130), (32, 33), (64, 64)])
def test_cuda_bands(M: int, H: int) -> None:
    """With so many maps a band has 64 or 32 rows. A warp takes 32 rows at a time, and the last band ends within 32 rows."""
    for W in (3, 70):
        same_on_cuda(kinds(M, H // 4 + 1, W // 3 + 1, W), (H, W), crop=(H / 4 + 0.3, W / 3 + 0.2))


@on_cuda
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_cuda_layouts(dtype: torch.dtype) -> None:
    """Strides of every kind, resized to larger and to smaller images."""
    soft = kinds(1, 19, 45, 3).to(dtype)
    layouts = (
        soft, soft.mT.contiguous().mT, soft.permute(1, 0, 2).contiguous().permute(1, 0, 2), soft.flip(0, 1, 2)[:, ::2, 1:],
        soft[:, :, ::3], soft[:1, :1].expand(3, 9, 45), soft[:, :, :1].expand(4, 19, 40), soft.view(2, 2, 19, 45).transpose(0, 1),
    )  # fmt: skip
    for layout in layouts:
        for size in ((70, 101), (19, 45), (6, 13), (9, 130), (50, 20)):
            same_on_cuda(layout, size)


@on_cuda
@pytest.mark.parametrize(
    ("h", "w", "H", "W"),
    [
        (4, 70, 9, 2048), (3, 70, 10, 2049), (3, 50, 6, 2083), (5, 700, 5, 4100), (2, 9, 2, 32 * 4032 + 7),
        (5, 4300, 3, 2090), (9, 2500, 18, 2070), (40, 900, 45, 1000), (70, 400, 75, 801), (2, 3, 100, 40),
    ],
)  # fmt: skip
def test_cuda_tiles(h: int, w: int, H: int, W: int) -> None:
    """A row is several tiles, and the last tile may be narrower than a word. Many cells make the bands shorter."""
    same_on_cuda(kinds(1, h, w, W), (H, W))


@on_cuda
@pytest.mark.parametrize("threshold", (0.0, 0.1, -0.7, 1e30, -3e38, INF, -INF))
def test_cuda_cells_next_to_the_threshold(threshold: float) -> None:
    """A pixel that the kernel decides without interpolation gets the same value as with the rounded interpolation."""
    level = torch.tensor(threshold)
    up, down = torch.tensor(INF), torch.tensor(-INF)
    near = torch.stack(
        (level.nextafter(down), level, level.nextafter(up), level * (1 + 2.0**-18), level * (1 - 2.0**-18))
    )
    cells = near[torch.randint(0, 5, (3, 9, 37), generator=torch.Generator().manual_seed(2))]
    for soft in (cells, *(value.expand(1, 9, 37) for value in near)):
        same_on_cuda(soft, (35, 97), threshold=float(level))
        same_on_cuda(soft, (27, 111), threshold=float(level))  # a third of the pixels lie on cells
