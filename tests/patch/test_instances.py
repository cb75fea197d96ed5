"""Instances of Mask2Former's outputs: those of transformers' image processor."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sprompt

pytest.importorskip("transformers", reason="the patched package, and the truth of these tests")
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

SIZES = [(60, 83), (100, 40)]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    sprompt.patch.undo()


def outputs(shift: float = -1.0) -> Any:
    """Logits of 2 images, 9 queries and 4 classes. None of their interpolated values is within rounding of 0."""
    g = torch.Generator().manual_seed(5)
    masks = nn.functional.interpolate(torch.randn(2, 9, 3, 4, generator=g), (12, 20), mode="bilinear") * 4 + shift
    return SimpleNamespace(masks_queries_logits=masks, class_queries_logits=2 * torch.randn(2, 9, 5, generator=g))


def both(given: Any, **options: Any) -> list[list[dict[str, Any]]]:
    """The results before and after the patch."""
    processor, found = Mask2FormerImageProcessorPil(), []
    for dense in (True, False):
        with sprompt.trace_backends() as ran:
            found.append(processor.post_process_instance_segmentation(given, **options))
        assert (not ran) is dense
        sprompt.patch.mask2former()
    return found


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for a, b in zip(mine["segments_info"], theirs["segments_info"], strict=True):
            assert a == {**b, "score": a["score"]} and a["score"] == pytest.approx(b["score"], abs=2e-6)
        if isinstance(theirs["segmentation"], Tensor):
            torch.testing.assert_close(mine["segmentation"], theirs["segmentation"], rtol=0, atol=0)  # the dtype, too
        else:
            assert mine["segmentation"] == theirs["segmentation"]


@pytest.mark.parametrize("target_sizes", [None, SIZES], ids=["384x384", "own sizes"])
@pytest.mark.parametrize("asked", ["map", "return_binary_maps", "return_coco_annotation"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_the_instances_of_transformers(target_sizes: Any, asked: str, threshold: float) -> None:
    options = {} if asked == "map" else {asked: True}
    expected, found = both(outputs(), threshold=threshold, target_sizes=target_sizes, **options)
    assert sum(len(image["segments_info"]) for image in expected) >= (14 if threshold == 0 else 3)
    assert_same(found, expected)


@pytest.mark.parametrize("asked", ["map", "return_binary_maps", "return_coco_annotation"])
@pytest.mark.parametrize(("threshold", "shift"), [(0.99, -1.0), (0.0, -99.0)], ids=["low scores", "empty masks"])
def test_no_instance(asked: str, threshold: float, shift: float) -> None:
    options = {} if asked == "map" else {asked: True}
    expected, found = both(outputs(shift), threshold=threshold, target_sizes=SIZES, **options)
    assert not any(image["segments_info"] for image in expected)
    assert_same(found, expected)


def test_a_mask_that_the_target_size_loses() -> None:
    """A mask of a few pixels at 384x384, and a target of 2x2 pixels that samples none of them."""
    given = outputs()
    given.masks_queries_logits[:] = -9.0
    given.masks_queries_logits[:, 0, 3, 4] = 9.0
    expected, found = both(given, threshold=0.0, target_sizes=[(2, 2), SIZES[1]])
    assert [len(image["segments_info"]) > 0 for image in expected] == [False, True]
    assert_same(found, expected)


def test_both_forms_at_once_are_refused_as_before() -> None:
    sprompt.patch.mask2former()
    with pytest.raises(ValueError, match="can not be both set to True"):
        Mask2FormerImageProcessorPil().post_process_instance_segmentation(
            outputs(), return_coco_annotation=True, return_binary_maps=True
        )
