"""activation_queries: tables by hand, ties, logits that are not finite, the same bits on every backend."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sprompt
from sprompt.ops import activation_queries
from sprompt.testing.compare import assert_same_bits
from sprompt.testing.specs.activation_queries import oracle

pytestmark = pytest.mark.usefixtures("backend")
NAN, INF = math.nan, math.inf


def logits_of(scores: list[list[float]], classes: list[list[int]], number: int) -> Tensor:
    """Logits (1, number + 1, h, w) whose softmax has these scores at these classes: log a there, 0 or less elsewhere."""
    a, k = torch.tensor(scores, dtype=torch.float64), torch.tensor(classes)
    one = F.one_hot(k, number + 1).movedim(-1, 0).double()
    rest = torch.zeros_like(one)
    rest[-1] = 1 - a  # "no object"
    return (one * a + rest).log().float()[None]


def test_by_hand():
    scores = [[0.5, 0.4, 0.9, 0.3], [0.2, 0.6, 0.8, 0.1], [0.05, 0.7, 0.45, 0.35]]
    classes = [[0, 0, 1, 0], [1, 0, 1, 0], [2, 2, 2, 1]]
    index, found, labels = activation_queries(logits_of(scores, classes, 3), 12)
    # Maxima: 0.9 of class 1 (cell 2), 0.7 of class 2 (9), 0.6 of class 0 (5), 0.3 of class 0 (3), 0.2 of class 1 (4). Cell 3 has
    # neighbours of class 1 and a smaller one; cell 11 (0.35) has 0.8 of its class beside it.
    assert index.tolist() == [[2, 9, 5, 3, 4, 6, 0, 10, 1, 11, 7, 8]]
    assert labels.tolist() == [[1, 2, 0, 0, 1, 1, 0, 2, 0, 1, 0, 2]]
    torch.testing.assert_close(found[0], torch.tensor([0.9, 0.7, 0.6, 0.3, 0.2, 0.8, 0.5, 0.45, 0.4, 0.35, 0.1, 0.05]))
    for count in range(13):
        assert_same_bits(
            activation_queries(logits_of(scores, classes, 3), count),
            (index[:, :count], found[:, :count], labels[:, :count]),
        )


def test_tied_neighbours_are_both_maxima():
    index, _, _ = activation_queries(logits_of([[0.3, 0.3, 0.2, 0.6]], [[0, 0, 0, 1]], 2), 4)
    assert index.tolist() == [[3, 0, 1, 2]]


def test_equal_scores_go_to_the_lowest_cell():
    index, scores, labels = activation_queries(torch.zeros(2, 3, 4, 5), 7)
    assert index.tolist() == [list(range(7))] * 2
    assert not labels.any() and (scores == scores[0, 0]).all()


def test_equal_logits_go_to_the_lowest_class():
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0, 5.0])[None, :, None, None]
    assert [x.tolist() for x in activation_queries(logits, 1)][::2] == [[[0]], [[1]]]


def test_background_is_no_class():
    """The class is the best foreground class, although "no object" is far more likely."""
    index, scores, labels = activation_queries(logits_of([[1e-3, 2e-3]], [[1, 0]], 2), 2)
    assert index.tolist() == [[1, 0]] and labels.tolist() == [[0, 1]]
    torch.testing.assert_close(scores[0], torch.tensor([2e-3, 1e-3]))


@pytest.mark.parametrize(("least", "first"), ((1.1e-6, 0), (0.9e-6, 1)))
def test_maxima_have_a_least_score(least: float, first: int):
    """Cell 0 is alone in its class. As a maximum it comes before cell 1, which has a larger neighbour."""
    index, _, _ = activation_queries(logits_of([[least, 0.4, 0.5]], [[1, 0, 0]], 2), 3)
    assert index.tolist() == [[2, *([0, 1] if first == 0 else [1, 0])]]


def test_maxima_come_before_larger_scores():
    index, _, _ = activation_queries(logits_of([[0.9, 0.89, 0.01]], [[0, 0, 1]], 2), 3)
    assert index.tolist() == [[0, 2, 1]]


def test_one_class():
    index, _, labels = activation_queries(logits_of([[0.1, 0.2, 0.1, 0.3]], [[0, 0, 0, 0]], 1), 4)
    assert index.tolist() == [[3, 1, 0, 2]] and not labels.any()


@pytest.mark.parametrize(
    ("column", "label"),
    (((NAN, 1.0, 2.0, 0.0), 2), ((0.0, 0.0, 1.0, NAN), 2), ((0.0, INF, 0.0, 0.0), 1), ((1.0, 0.0, 0.0, INF), 0),
     ((NAN,) * 4, 0), ((-INF,) * 4, 0), ((-INF, NAN, -INF, 0.0), 0)),
)  # fmt: skip
def test_not_a_number(column: tuple[float, ...], label: int):
    """The cell comes last, with the score NaN, and does not hide the maximum beside it."""
    logits = logits_of([[0.3, 0.5, 0.2, 0.1]], [[2, 2, 2, 2]], 3)
    logits[0, :, 0, 1] = torch.tensor(column)
    index, scores, labels = activation_queries(logits, 4)
    assert index.tolist() == [[0, 2, 3, 1]] and labels.tolist() == [[2, 2, 2, label]]
    assert scores.isnan().tolist() == [[False, False, False, True]]


def test_minus_infinity_is_a_class_that_cannot_be():
    logits = torch.tensor([[-INF, 1.0, -INF, 1.0], [-INF, -INF, -INF, 2.0]]).T[None, :, None]
    index, scores, labels = activation_queries(logits, 2)
    assert index.tolist() == [[0, 1]] and scores.tolist() == [[0.5, 0.0]] and labels.tolist() == [[1, 0]]


def test_enough_maxima_fill_all_queries():
    """The acceptance check of FastInst: with 100 maxima, all queries are maxima, and max pooling of the volume finds them."""
    logits = torch.randn(1, 81, 20, 27, generator=torch.Generator().manual_seed(1))
    index, _, _ = activation_queries(logits, 100)
    score, label = logits.double().softmax(1)[:, :-1].max(1, keepdim=True)
    volume = torch.zeros(1, 80, 20, 27, dtype=torch.float64).scatter(1, label, score)
    maxima = ((F.max_pool2d(volume, 3, 1, 1) == volume) & (volume >= 1e-6)).any(1).flatten()
    assert maxima.sum() >= 100 and maxima[index[0]].all()
    assert_same_bits(index, oracle(logits.double(), 100)[0])


def hard_logits(channels: int, h: int, w: int) -> Tensor:
    """Logits that show a difference of one bit: many exponents, and scores that are tied after rounding to float32."""
    g = torch.Generator().manual_seed(2)
    scales = torch.tensor([1e-3, 0.1, 1.0, 2.0, 5.0, 20.0, 90.0])[:, None, None, None]
    drawn = torch.randn(7, channels, h, 2 * w, generator=g)
    return scales * torch.cat((drawn[..., :w], drawn[..., w:].round(decimals=1)), -1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_same_bits_on_every_backend(dtype: torch.dtype, backend: str):
    if backend == "triton" and dtype != torch.float32:
        pytest.skip("the kernel computes in float32 for every dtype")
    logits = (hard_logits(5, 11, 8) if backend == "triton" else hard_logits(21, 60, 40)).to(dtype)
    count = logits.shape[2] * logits.shape[3]
    with sprompt.use_backend("reference", ["activation_queries"]):
        expected = activation_queries(logits, count)
    assert_same_bits(activation_queries(logits, count), expected)


def test_equal_columns_have_equal_scores_at_every_place():
    """The last cells of a map are computed like all others, whatever its width."""
    for h, w in itertools.product((1, 2, 3), (1, 3, 15, 16, 17, 33, 64, 65)):
        column = torch.randn(9, generator=torch.Generator().manual_seed(h * w))
        index, scores, _ = activation_queries(column[None, :, None, None].expand(1, 9, h, w), h * w)
        assert index.tolist() == [list(range(h * w))] and (scores == scores[0, 0]).all()
