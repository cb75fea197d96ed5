"""Matchers and losses of transformers' Mask2Former and of its copies: the same pairs, terms and gradients after the patch."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sprompt

pytest.importorskip("transformers", reason="the patched package, and the truth of these tests")
linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment

QUERIES, CLASSES, POINTS = 6, 3, 80
FAMILIES = {
    "mask2former": "Mask2Former", "eomt": "Eomt", "eomt_dinov3": "EomtDinov3", "videomt": "Videomt", "oneformer": "OneFormer"
}  # fmt: skip


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    sprompt.patch.undo()
    torch.set_default_dtype(torch.float32)


def criterion(family: str = "mask2former", queries: int = QUERIES) -> Any:
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    loss, matcher = (getattr(modeling, FAMILIES[family] + part) for part in ("Loss", "HungarianMatcher"))
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    if family == "oneformer":
        pairs = matcher(cost_class=2.0, cost_mask=5.0, cost_dice=4.0, num_points=POINTS)
        return loss(CLASSES, pairs, weights, 0.1, POINTS, 3.0, 0.75, contrastive_temperature=0.07)
    config = SimpleNamespace(
        num_labels=CLASSES, no_object_weight=0.1, train_num_points=POINTS, oversample_ratio=3.0, importance_sample_ratio=0.75,
        class_weight=2.0, dice_weight=4.0, mask_weight=5.0,
    )  # fmt: skip
    return loss(config, weights)


def given(counts: list[int], heads: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of a loss: logits of the last and of other heads, masks and classes."""
    g = torch.Generator().manual_seed(seed)

    def head() -> dict[str, Tensor]:
        masks = 3 * torch.randn(len(counts), QUERIES, 9, 12, generator=g)
        classes = torch.randn(len(counts), QUERIES, CLASSES + 1, generator=g)
        return {"masks_queries_logits": masks.requires_grad_(), "class_queries_logits": classes.requires_grad_()}

    coarse = torch.randn(len(counts), max([*counts, 1]), 5, 6, generator=g)
    dense = (nn.functional.interpolate(coarse, (36, 48), mode="bilinear") > 0.2).to(torch.get_default_dtype())
    return {
        **head(),
        "mask_labels": [masks[:n] for masks, n in zip(dense, counts, strict=True)],
        "class_labels": [torch.randint(0, CLASSES, (n,), generator=g) for n in counts],
        "auxiliary_predictions": [head() for _ in range(heads - 1)],
    }


def terms(loss: Any, arguments: dict[str, Any], seed: int = 1) -> dict[str, Tensor]:
    """Terms of the loss, and the gradients of their sum."""
    torch.manual_seed(seed)
    found = loss(**arguments)
    heads = [arguments, *arguments["auxiliary_predictions"]]
    logits = [head[name] for head in heads for name in ("masks_queries_logits", "class_queries_logits")]
    gradients = torch.autograd.grad(sum(term.sum() for term in found.values()), logits)
    return {**found, **{f"gradient {k}": each for k, each in enumerate(gradients)}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=bound, atol=bound, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("counts", [[3, 0], [8, 2]], ids=["an image without targets", "more targets than queries"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_with_the_same_draws(family: str, counts: list[int]) -> None:
    torch.set_default_dtype(torch.float64)
    loss, arguments = criterion(family), given(counts)
    if family == "oneformer":
        arguments |= {name: torch.randn(2, 4, 8).float() for name in ("contrastive_queries_logits", "text_queries")}
    expected = terms(loss, arguments)
    assert len(expected) == 6 + 4 + (family == "oneformer")
    sprompt.patch.mask2former(same_draws=True)
    with sprompt.trace_backends() as ran:
        assert_same(terms(loss, arguments), expected)
    names = [op for op, _ in ran]
    assert names.count("pack_masks") == 2  # once for each image
    assert names.count("point_cost") == names.count("point_loss") == 2  # for each head


@pytest.mark.parametrize("kind", ["bool", "uint8", "int64", "a tensor"])
def test_targets_in_other_forms(kind: str) -> None:
    """transformers takes masks of the dtype of the logits only."""
    loss, arguments = criterion(), given([3, 3])
    sprompt.patch.mask2former()
    expected = terms(loss, arguments)
    masks = arguments["mask_labels"]
    arguments["mask_labels"] = torch.stack(masks) if kind == "a tensor" else [m.to(getattr(torch, kind)) for m in masks]
    assert_same(terms(loss, arguments), expected, 0)


def test_soft_targets_take_the_path_of_transformers() -> None:
    loss, arguments = criterion(), given([3, 2])
    arguments["mask_labels"][1][0, 4, 4] = 0.5
    expected = terms(loss, arguments)
    sprompt.patch.mask2former()
    with sprompt.trace_backends() as ran:
        assert_same(terms(loss, arguments), expected, 0)
    assert not {"point_cost", "point_loss"} & {op for op, _ in ran}


def test_a_subclass_with_its_own_certainty_takes_the_path_of_transformers() -> None:
    loss, arguments = criterion(), given([3, 2])

    class Certain(type(loss)):  # type: ignore[misc]
        def calculate_uncertainty(self, logits: Tensor) -> Tensor:
            return logits.abs()

    loss.__class__ = Certain
    torch.set_default_dtype(torch.float64)
    loss, arguments = loss.double(), given([3, 2])
    expected = terms(loss, arguments)
    sprompt.patch.mask2former(same_draws=True)
    with sprompt.trace_backends() as ran:
        assert_same(terms(loss, arguments), expected)
    assert "point_loss" not in {op for op, _ in ran}


def test_own_draws_have_the_distribution_of_those_of_torch() -> None:
    """Means over many draws lie within 4 standard errors of each other."""
    loss, arguments = criterion(), given([4, 2])
    with torch.no_grad():
        means, errors = [], []
        for _ in range(2):
            torch.manual_seed(0)
            drawn = [loss(**arguments) for _ in range(60)]
            values = {name: torch.stack([each[name] for each in drawn]) for name in drawn[0]}
            means.append({name: value.mean() for name, value in values.items()})
            errors.append({name: value.std() / len(drawn) ** 0.5 for name, value in values.items()})
            sprompt.patch.mask2former()
    for name in means[0]:
        apart, error = abs(means[0][name] - means[1][name]), (errors[0][name] ** 2 + errors[1][name] ** 2) ** 0.5
        assert apart <= 4 * error + 1e-6, f"{name}: {means[0][name]} and {means[1][name]}, standard error {error}"
        assert errors[1][name] > 0 or "cross_entropy" in name


@pytest.mark.parametrize("family", ["mask2former", "oneformer"])
@pytest.mark.parametrize(
    "bad", [[2], [0, 5], [0, 1, 2, 3]], ids=["one query", "two queries", "more than can stay unmatched"]
)
def test_pairs_without_a_finite_cost_come_last(family: str, bad: list[int]) -> None:
    """Infinity, NaN, and a NaN of the classes: such queries are matched only where no other is left, as by transformers."""
    torch.set_default_dtype(torch.float64)
    matcher, arguments = criterion(family).matcher, given([4, 3])
    with torch.no_grad():
        logits, classes = arguments["masks_queries_logits"], arguments["class_queries_logits"]
        logits[0, bad[0]], logits[0, bad[1:2]], classes[0, bad[2:3]] = torch.nan, torch.inf, torch.nan
        logits[0, bad[3:]] = -torch.inf
    call = (logits, classes, arguments["mask_labels"], arguments["class_labels"])
    torch.manual_seed(1)
    expected = matcher(*call)
    sprompt.patch.mask2former(same_draws=True)
    torch.manual_seed(1)
    found = matcher(*call)
    forced = max(0, 4 - (QUERIES - len(bad)))
    for image, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        unusable = 0 if image else sum(q in bad for q in mine[0].tolist())
        assert len(mine[0]) == len(theirs[0]) == 4 - image and unusable == (0 if image else forced)
        if not unusable:  # between equal costs the choice is free
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("seed", range(6))
def test_totals_with_the_largest_number_equal_scipys(seed: int) -> None:
    """Entries of float32's largest number stand for costs that are not finite, some in whole rows."""
    g = torch.Generator().manual_seed(seed)
    cost = 10 * torch.rand(7, 5, generator=g)
    largest = torch.finfo(torch.float32).max
    cost[torch.rand(7, 5, generator=g) < 0.2] = largest
    cost[torch.randperm(7, generator=g)[: seed % 4]] = largest
    rows = sprompt.ops.linear_assignment(cost)
    mine = cost[rows, torch.arange(5)].double()
    theirs = cost[linear_sum_assignment(cost)].double()
    assert len(set(rows.tolist())) == 5
    assert (mine == largest).sum() == (theirs == largest).sum()
    if (theirs < largest).all():  # beside the largest number, sums in float64 lose the others, scipy's too
        assert abs(float(mine.sum() - theirs.sum())) < 1e-5
