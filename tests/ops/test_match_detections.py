"""match_detections: tables by hand, equality with pycocotools on many lists, numbers that are none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sprompt.ops import mask_iou, match_detections
from sprompt.testing.specs.match_detections import LEVELS, pycocotools_matches


def doubles(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def matches(
    iou: torch.Tensor, level: float, ignored: list[bool] | None = None, crowd: list[bool] | None = None
) -> list[int]:
    """The matches at one threshold."""
    flags = [None if f is None else torch.tensor(f) for f in (ignored, crowd)]
    return match_detections(iou, doubles(level), *flags)[0].tolist()


def test_tables() -> None:
    # The first detection takes the best target, also where the second one has no other.
    assert matches(doubles([0.6, 0.8], [0.1, 0.9]), 0.5) == [1, -1]
    # The threshold is included, and equal targets go to the last.
    assert matches(doubles([0.5, 0.5, 0.4]), 0.5) == [1]
    assert matches(doubles([0.5, 0.5, 0.4], [0.5, 0.5, 0.4], [0.5, 0.5, 0.4]), 0.5) == [1, 0, -1]
    # A real target comes before an ignored one of larger IoU.
    assert matches(doubles([0.9, 0.5]), 0.5, [True, False]) == [1]
    # An ignored target is taken once, a crowd by every detection.
    assert matches(doubles([0.9], [0.9]), 0.5, [True]) == [0, -1]
    assert matches(doubles([0.9], [0.9]), 0.5, None, [True]) == [0, 0]
    assert matches(doubles([0.6, 0.9], [0.6, 0.9]), 0.5, None, [False, True]) == [0, 1]
    # Above 1 − 1e-10 every threshold is that number.
    assert matches(doubles([1.0], [1.0]), 1.0) == [0, -1]
    assert matches(doubles([1 - 0.9e-10]), 3.0) == [0] and matches(doubles([1 - 1.1e-10]), 3.0) == [-1]


def test_quotients_reach_their_thresholds() -> None:
    """7 of 10 pixels have an IoU of 0.7 in float64. In float32 it is below."""
    whole = torch.ones(1, 1, 10)
    part = (torch.arange(10) < 7).float()[None, None]
    iou = mask_iou(part, whole, dtype=torch.float64)
    assert matches(iou, 0.7) == [0]
    assert matches(mask_iou(part, whole).double(), 0.7) == [-1]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 12), st.integers(0, 9), st.integers(0, 2**31), st.sampled_from([2, 4, 20, 1000]))
def test_equals_pycocotools(detections: int, targets: int, seed: int, steps: int) -> None:
    """IoUs are multiples of 1/steps: few values have many ties."""
    g = torch.Generator().manual_seed(seed)
    iou = torch.randint(0, steps + 1, (4, detections, targets), generator=g).double() / steps
    ignored, crowd = (torch.rand(4, targets, generator=g) < share for share in (0.4, 0.2))
    for flags in ((None, None), (ignored, None), (None, crowd), (ignored, crowd)):
        assert torch.equal(match_detections(iou, LEVELS, *flags), pycocotools_matches(iou, LEVELS, *flags))


def test_many_targets() -> None:
    g = torch.Generator().manual_seed(1)
    iou = torch.rand(40, 300, generator=g, dtype=torch.float64)
    ignored = torch.rand(300, generator=g) < 0.5
    assert torch.equal(match_detections(iou, LEVELS, ignored), pycocotools_matches(iou, LEVELS, ignored))


def test_nan_is_no_match() -> None:
    nan = float("nan")
    assert matches(doubles([nan, 0.6, nan], [0.9, nan, nan]), 0.5) == [1, 0]
    assert matches(doubles([nan, 0.6, nan]), nan) == [-1]
    assert match_detections(doubles([0.6, 0.2]), doubles(nan, 0.5, nan)).tolist() == [[-1], [0], [-1]]
    assert matches(doubles([float("inf"), 0.6]), 0.5) == [0]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_lists_do_not_mix(threads: int) -> None:
    """A list gives the same matches alone and in a batch of many, whatever thread it falls to."""
    g = torch.Generator().manual_seed(2)
    iou = torch.randint(0, 21, (300, 30, 8), generator=g).double() / 20
    ignored, crowd = (torch.rand(300, 8, generator=g) < 0.3 for _ in range(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = match_detections(iou, LEVELS, ignored, crowd)
    finally:
        torch.set_num_threads(before)
    for b in range(0, 300, 23):
        assert torch.equal(together[b], match_detections(iou[b], LEVELS, ignored[b], crowd[b]))
