"""Deformable convolution against its formula, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sprompt.nn.deform_conv import DeformConv, Offsets


def deformable(x: Tensor, offsets: Tensor, weight: Tensor, stride: int) -> Tensor:
    """out[o, i, j] = Σ over taps k and channels c of weight[o, c, k] · x[c] at (i·stride − 1 + k // 3 + Δy_k, j·stride − 1 + k % 3 + Δx_k),
    bilinear between the four cells around the place; a cell outside adds nothing."""
    batch, _, height, width = x.shape
    image = torch.arange(batch)[:, None, None]
    i, j = (torch.arange(n) for n in offsets.shape[2:])
    out = torch.zeros(())
    for k in range(9):
        row = (i * stride - 1 + k // 3)[:, None] + offsets[:, 2 * k]
        column = j * stride - 1 + k % 3 + offsets[:, 2 * k + 1]
        reads = (row > -1) & (row < height) & (column > -1) & (column < width)
        below, right = row - row.detach().floor(), column - column.detach().floor()
        value = torch.zeros(())
        for y, share_y in ((row.floor(), 1 - below), (row.floor() + 1, below)):
            for x_, share_x in ((column.floor(), 1 - right), (column.floor() + 1, right)):
                held = reads & (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
                cell = x[image, :, y.clamp(0, height - 1).long(), x_.clamp(0, width - 1).long()]  # (B, h, w, C)
                value = value + torch.where(held, share_y * share_x, 0)[..., None] * cell
        out = out + torch.einsum("bijc,oc->boij", value, weight[:, :, k // 3, k % 3])
    return out


def drawn(
    batch: int, channels: int, outputs: int, size: tuple[int, int], stride: int, spread: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A map, offsets and a kernel, float64 with the digits of float32."""
    generator = torch.Generator().manual_seed(size[0] * stride)
    h, w = ((n - 1) // stride + 1 for n in size)
    x = torch.randn(batch, channels, *size, generator=generator)
    offsets = spread * torch.randn(batch, 18, h, w, generator=generator)
    if spread:
        offsets[:, :, 0, 0] = torch.randint(
            -2, 3, (18,), generator=generator
        ).float()  # centres of cells and the border
        offsets[:, 3, -1, -1], offsets[:, 4, -1, -1] = 1e9, -1e9
    return x.double(), offsets.double(), torch.randn(outputs, channels, 3, 3, generator=generator).double() / 3


def computed(x: Tensor, offsets: Tensor, weight: Tensor, stride: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The result in this dtype, and the gradients of its product with a fixed tensor."""
    conv = DeformConv(weight.shape[1], weight.shape[0], stride).to(dtype)
    conv.weight.data.copy_(weight)
    x, offsets = (t.to(dtype, copy=True).requires_grad_() for t in (x, offsets))
    out = conv(x, offsets)
    (out * direction(out)).sum().backward()
    return tuple(t.double() for t in (out.detach(), x.grad, offsets.grad, conv.weight.grad))


def literal(x: Tensor, offsets: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, ...]:
    x, offsets, weight = (t.clone().requires_grad_() for t in (x, offsets, weight))
    out = deformable(x, offsets, weight, stride)
    (out * direction(out)).sum().backward()
    return out.detach(), x.grad, offsets.grad, weight.grad


def direction(like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, like.numel(), dtype=torch.float64).sin().reshape(like.shape).to(like.dtype)


@pytest.mark.parametrize("spread", [0, 0.3, 4])
@pytest.mark.parametrize(("size", "stride"), [((5, 7), 1), ((6, 9), 2), ((7, 4), 2), ((1, 3), 1), ((8, 16), 2)])
def test_the_formula(size: tuple[int, int], stride: int, spread: float) -> None:
    given = drawn(2, 3, 4, size, stride, spread)
    for found, wanted in zip(computed(*given, stride, torch.float64), literal(*given, stride), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "size", "stride", "spread"),
    [(256, (40, 54), 1, 2), (256, (40, 54), 1, 0), (32, (37, 53), 2, 2), (32, (37, 53), 2, 0), (512, (20, 27), 1, 1)],
)
def test_float32(channels: int, size: tuple[int, int], stride: int, spread: float, layout: torch.memory_format) -> None:
    """The bound of the result counts roundings of 2^-24: 9·C of the sum of products, 8 of a bilinear value, and 3 of a coordinate, where
    the map's slope is at most 2·max|x| along y and x. Gradients have the bound of usual rounding; at offsets of 0 those of the offsets
    are one-sided, so they show whether a coordinate keeps its digits."""
    x, offsets, weight = drawn(1, channels, 16, size, stride, spread)
    (out, *gradients), (wanted, *expected) = (
        computed(x.to(memory_format=layout), offsets, weight, stride, torch.float32), literal(x, offsets, weight, stride)
    )  # fmt: skip
    steps = 9 * channels + 8 + 12 * (max(size) + 1)
    bound = steps * 2**-24 * x.abs().max() * weight.abs().sum((1, 2, 3))
    assert ((out - wanted).abs() <= bound[:, None, None]).all()
    assert (out - wanted).abs().max() < 1e-5 * wanted.abs().max()
    for found, one in zip(gradients, expected, strict=True):
        assert (found - one).abs().max() <= 1e-5 * one.abs().max()


def test_values_by_hand() -> None:
    """A map of 1, 2, 3 / 4, 5, 6, read by the tap in the middle alone."""
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]])[None, None]
    conv = DeformConv(1, 1)
    conv.weight.data.zero_()[0, 0, 1, 1] = 1
    offsets = torch.zeros(1, 18, 2, 3)
    assert torch.equal(conv(x, offsets), x)
    offsets[0, 8, 0, 0], offsets[0, 9, 0, 0] = 1, 2  # y, x of the fifth tap: from 1 to 6
    offsets[0, 9, 0, 1] = 0.5  # between 2 and 3
    offsets[0, 8, 0, 2] = -0.25  # three quarters of 3
    offsets[0, 8, 1, 0] = 1  # outside
    offsets[0, 9, 1, 2] = float("nan")
    assert conv(x, offsets).tolist() == [[[[6, 2.5, 2.25], [0, 5, 0]]]]


def test_offsets_start_at_zero_and_stay_in_float32() -> None:
    torch.manual_seed(0)
    move, conv, x = Offsets(6, stride=2), DeformConv(6, 4, stride=2), torch.randn(2, 6, 9, 8)
    assert not move(x).any()
    torch.testing.assert_close(conv(x, move(x)), torch.nn.functional.conv2d(x, conv.weight, stride=2, padding=1))
    torch.nn.init.normal_(move.weight, std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        offsets = move(x.bfloat16())
        out = conv(x.bfloat16(), offsets)
    assert (offsets.dtype, out.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(offsets, move(x.bfloat16().float()))
    wanted = conv(x, offsets)
    assert (out - wanted).abs().max() <= 2**-6 * wanted.abs().max()
