"""Random changes of colours, for training without masks. A view is float32 (3, H, W) of 0 to 1."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn.functional import conv2d, pad

from sprompt.normalisation import MEAN, STD

_LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def normalised(view: Tensor) -> Tensor:
    """By the mean and the standard deviation of ImageNet, on the view's device."""
    mean, std = (torch.tensor(value, device=view.device).view(3, 1, 1) / 255 for value in (MEAN, STD))
    return (view - mean) / std


def uniform(generator: Generator, low: float = 0.0, high: float = 1.0) -> float:
    """A random number from low to high."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def grey(view: Tensor) -> Tensor:
    """The brightness (1, H, W)."""
    return (view * torch.tensor(_LUMA).view(3, 1, 1)).sum(0, keepdim=True)


def recoloured(view: Tensor, strengths: tuple[float, float, float, float], generator: Generator) -> Tensor:
    """Brightness, contrast and saturation times up to 1 ± their strength, then the hue rotated by up to ± the last strength, a share
    of the circle."""
    bright, contrast, saturation = (uniform(generator, 1 - s, 1 + s) for s in strengths[:3])
    view = (view * bright).clamp(0, 1)
    mean = grey(view).mean()
    view = (mean + (view - mean) * contrast).clamp(0, 1)
    light = grey(view)
    view = (light + (view - light) * saturation).clamp(0, 1)
    angle = 2 * math.pi * uniform(generator, -strengths[3], strengths[3])
    cos, sin = math.cos(angle), math.sin(angle)
    to_yiq = torch.tensor(_YIQ)
    turn = torch.tensor([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
    return torch.einsum("ij,jhw->ihw", torch.linalg.inv(to_yiq) @ turn @ to_yiq, view).clamp(0, 1)


def blurred(view: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of `sigma` pixels; the border repeats the last pixel."""
    radius = max(1, math.ceil(3 * sigma))
    window = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    window = (window / window.sum()).view(1, 1, 1, -1)
    padded = pad(view[:, None], (radius, radius, radius, radius), mode="replicate")
    return conv2d(conv2d(padded, window), window.transpose(2, 3))[:, 0]
