"""Focal losses against their definition in float64, by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt.nn import losses
from sprompt.nn.losses import dense_focal_sum, focal_sum


def definition(z: Tensor, y: Tensor) -> Tensor:
    """y: 0 or 1."""
    q = z.sigmoid()
    positive = -0.25 * (1 - q) ** 2 * q.log() * y
    return (positive - 0.75 * q**2 * (1 - q).log() * (1 - y)).sum()


def test_hand_values() -> None:
    # q = ½: ¼ · ¼ · log 2 for a positive, three times that for a negative
    loss = focal_sum(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))
    torch.testing.assert_close(loss, torch.tensor(10 * 0.25 * 0.25 * 0.6931472))


def test_focal() -> None:
    z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    y = torch.rand(4, 7) > 0.7
    loss, expected = focal_sum(3 * z, y), definition(3 * z, y.double())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (loss, expected)))


def test_large_logits_stay_finite() -> None:
    z = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    y = torch.tensor([True, True, False, False])
    loss = focal_sum(z, y)
    torch.testing.assert_close(loss, torch.tensor(0.25 * 200 + 0.75 * 200))
    loss.backward()
    torch.testing.assert_close(z.grad, torch.tensor([-0.25, 0, 0, 0.75]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 5000, 1 << 20])
def test_dense_focal(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    """Value and gradient, for every number of classes that are computed at a time."""
    monkeypatch.setattr(losses, "_CHUNK", chunk)
    logits = (2 * torch.randn(2, 5, 12, 16)).to(dtype).requires_grad_()
    labels = torch.randint(0, 6, (2, 24, 32))
    wide = logits.detach().double().requires_grad_()
    up = F.interpolate(wide, size=(24, 32), mode="bilinear", align_corners=False)
    expected = definition(up, F.one_hot(labels, 6).movedim(3, 1)[:, :5].double())
    loss = dense_focal_sum(logits, labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    assert logits.grad is not None and logits.grad.dtype == dtype and wide.grad is not None
    torch.testing.assert_close(
        logits.grad.double(), wide.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4
    )


def test_dense_focal_twice() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = dense_focal_sum(logits, torch.zeros(1, 8, 8, dtype=torch.int64)) ** 2
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
