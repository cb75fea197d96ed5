"""The labels that follow from a matching: rows, labels of kernels, labels of pixels."""

from __future__ import annotations

import pytest
import torch
from knet_eager import cost as direct_cost
from knet_eager import double, soft_targets
from torch import Tensor

import sprompt
from sprompt.masks import BitMasks
from sprompt.models.knet import KNetConfig
from sprompt.models.knet.matching import assignments, dense_labels
from sprompt.models.knet.outputs import Outputs
from sprompt.nn.set_loss import query_labels
from sprompt.ops import match_cost


def masks(batch: int, targets: int, size: tuple[int, int], density: float = 0.5) -> BitMasks:
    return BitMasks.from_dense(torch.rand(batch, targets, *size) < density)


def test_one_product_is_the_direct_cost() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(1, 6, 8, 12), torch.randn(1, 6, 4)
    targets, labels = masks(1, 3, (64, 96)), torch.tensor([[2, 0, 3]])
    soft = soft_targets(targets.to_dense()[0], torch.float32)
    for c in (None, classes):
        expected = direct_cost(double(logits)[0], soft, None if c is None else c[0], labels[0])
        got = match_cost(logits, targets, c, None if c is None else labels, upsample=2)
        torch.testing.assert_close(got[0].double(), expected, rtol=1e-5, atol=1e-5)


def outputs(stages: int, kernels: int = 6) -> Outputs:
    return Outputs(
        [torch.randn(2, kernels, 8, 12) for _ in range(stages + 1)],
        [torch.randn(2, kernels, 4) for _ in range(stages)],
        [torch.randn(2, kernels, 16) for _ in range(stages)],
        torch.randn(2, 4, 8, 12),
    )


def test_each_stage_is_matched_by_what_it_starts_from() -> None:
    torch.manual_seed(1)
    config, out = KNetConfig(num_classes=4), outputs(3)
    targets, labels, counts = masks(2, 3, (64, 96)), torch.randint(0, 4, (2, 3)), torch.tensor([3, 2])
    rows = assignments(out, targets, labels, counts, config)
    assert len(rows) == 3 and rows[0].tolist()[1][2] == -1
    other = outputs(3)
    for stage, changed in enumerate(
        (
            out._replace(masks=[out.masks[0], *other.masks[1:]], classes=other.classes),  # stage 0 depends on M⁰ only
            out._replace(
                masks=[other.masks[0], out.masks[1], *other.masks[2:]], classes=[out.classes[0], *other.classes[1:]]
            ),
            out._replace(
                masks=[*other.masks[:2], out.masks[2], other.masks[3]],
                classes=[other.classes[0], out.classes[1], other.classes[2]],
            ),
        )
    ):
        assert torch.equal(assignments(changed, targets, labels, counts, config)[stage], rows[stage])
    assert not all(
        torch.equal(a, b) for a, b in zip(assignments(other, targets, labels, counts, config), rows, strict=True)
    )


def test_the_weights_of_the_cost_count() -> None:
    torch.manual_seed(2)
    out = outputs(2)
    targets, labels, counts = masks(2, 6, (64, 96)), torch.randint(0, 4, (2, 6)), torch.tensor([6, 6])
    by_class = KNetConfig(num_classes=4, cost_class=1e4)
    rows = assignments(out, targets, labels, counts, by_class)[1]
    gain = out.classes[0].sigmoid()
    chosen = gain[torch.arange(2)[:, None], rows, labels].log().sum()
    by_mask = assignments(out, targets, labels, counts, KNetConfig(num_classes=4, cost_class=0))[1]
    assert chosen > gain[torch.arange(2)[:, None], by_mask, labels].log().sum()
    assert torch.equal(
        by_mask, assignments(out, targets, labels.flip(1), counts, KNetConfig(num_classes=4, cost_class=0))[1]
    )


def test_equal_costs_have_one_answer() -> None:
    """All kernels are alike, so every matching is optimal. The result is a valid matching, and the same every time."""
    out = outputs(1)._replace(masks=[torch.zeros(2, 6, 8, 12)] * 2)
    arguments = (
        masks(2, 3, (64, 96)),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.tensor([3, 3]),
        KNetConfig(num_classes=4),
    )
    rows = [assignments(out, *arguments)[0] for _ in range(3)]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert all(len(set(r)) == 3 for r in rows[0].tolist())


def test_labels_of_kernels() -> None:
    rows = torch.tensor([[3, -1, 0], [-1, 1, -2]])
    labels = torch.tensor([[5, 6, 7], [8, 2, 4]])
    assert query_labels(rows, labels, 4, 9).tolist() == [[7, 9, 9, 5], [9, 2, 9, 9]]
    assert query_labels(rows[:, :0], labels[:, :0], 2, 9).tolist() == [[9, 9], [9, 9]]


def literally(dense: Tensor, rows: Tensor, truth: Tensor, background: int) -> Tensor:
    """Pixel labels of one image. Positives are written in ascending order of kernels, to pixels with a soft target above 0."""
    soft = soft_targets(dense, torch.float32)
    out = torch.full(soft.shape[1:], background)
    for kernel, g in sorted((int(r), g) for g, r in enumerate(rows) if r >= 0):
        out[soft[g] > 0] = truth[kernel]
    return out


@pytest.mark.parametrize("density", [0.02, 0.3])
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 160)])
def test_labels_of_pixels(size: tuple[int, int], density: float) -> None:
    torch.manual_seed(3)
    targets, labels = masks(3, 4, size, density), torch.randint(0, 5, (3, 4))
    rows = torch.tensor([[2, 0, 5, -1], [-1, -1, -1, -1], [6, 5, 1, 3]])
    truth = query_labels(rows, labels, 7, 5)
    got = dense_labels(targets, rows, truth, 5)
    expected = [literally(targets.to_dense()[b], rows[b], truth[b], 5) for b in range(3)]
    assert torch.equal(got, torch.stack(expected)) and (got[1] == 5).all()
    assert {int(v) for v in got.unique()} > {5}
    assert torch.equal(
        dense_labels(BitMasks(targets.words[:, :0], size), rows[:, :0], truth, 5), torch.full_like(got, 5)
    )


def test_one_pixel_of_the_middle_is_enough() -> None:
    """The central 2×2 pixels of a 4×4 block count, its outer ring does not. The masks cover a whole row of words."""
    dense = torch.zeros(1, 1, 32, 64, dtype=torch.bool)
    for column in (0, 3, 60, 63):
        dense[..., column] = True  # outer columns
    dense[..., 0, :] = dense[..., 3, :] = True  # outer rows
    rows, truth = torch.tensor([[0]]), torch.tensor([[1]])
    assert (dense_labels(BitMasks.from_dense(dense), rows, truth, 2) == 2).all()
    dense[0, 0, 5, 62] = dense[0, 0, 30, 29] = True
    found = (dense_labels(BitMasks.from_dense(dense), rows, truth, 2) == 1).nonzero().tolist()
    assert found == [[0, 1, 15], [0, 7, 7]]


def test_bad_costs_are_reported() -> None:
    out = outputs(1)
    out.masks[0][1, 2] = float("nan")
    arguments = (
        masks(2, 3, (64, 96)),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.tensor([3, 3]),
        KNetConfig(num_classes=4),
    )
    with pytest.raises(ValueError, match="finite in image 1"):
        assignments(out, *arguments)
    with sprompt.use_backend("reference"), pytest.raises(ValueError, match="finite in image 1"):
        assignments(out, *arguments)
