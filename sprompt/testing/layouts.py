"""The same values in other memory layouts: sliced, transposed, expanded, and with the entries of a batch far apart."""

from __future__ import annotations

import torch
from torch import Tensor

from sprompt.testing.compare import tensors
from sprompt.testing.spec import Sample


def sliced(t: Tensor) -> Tensor:
    return torch.stack((t, t), -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() >= 2 else sliced(t)


def expanded(t: Tensor) -> Tensor:
    """The first entry of a batch in place of all entries: stride 0."""
    return t[:1].expand(t.shape) if t.dim() >= 1 and t.shape[0] > 0 else t


LAYOUTS = (sliced, transposed, expanded)


def can_be_far(sample: Sample) -> bool:
    return any(_is_batch(t) for t in tensors((sample.args, sample.kwargs)))


def far(sample: Sample) -> Sample:
    """Spreads the first tensor of the sample that has a batch. Its first and last entry are more than 2^31 elements apart. The
    memory between the entries is never touched."""
    done = False

    def spread(t: Tensor) -> Tensor:
        nonlocal done
        if done or not _is_batch(t):
            return t
        done = True
        distance = 2**31 // (t.shape[0] - 1) + 64
        size = ((t.shape[0] - 1) * distance + t[0].numel()) * t.element_size()
        memory = torch.empty(size, dtype=torch.uint8, device=t.device)
        view = memory.view(t.dtype).as_strided(t.shape, (distance, *torch.empty(t.shape[1:], device="meta").stride()))
        return view.copy_(t)

    return sample.map(spread)


def _is_batch(t: Tensor) -> bool:
    return t.dim() >= 2 and t.shape[0] >= 2 and t.numel() > 0
