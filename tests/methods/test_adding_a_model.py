"""The page on models of one's own: its code runs, prints what it says, and keeps to the protocol."""

import contextlib
import inspect
import io
import re

import pytest
import torch
from tiny_queries import MODEL, PAGE, PRINTED, TRAINING, TinyQueries, run

from sprompt.methods.supervised import Supervised, check_classes
from sprompt.models.protocol import QueryModel, checked_model


def test_the_example_runs_and_prints_what_it_says() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run("example", MODEL + TRAINING)
    assert out.getvalue() == PRINTED


def test_the_example_is_a_query_model() -> None:
    model = TinyQueries()
    assert isinstance(model, QueryModel)
    assert checked_model(model) is model
    named = {n for row in re.findall(r"^\| `(.*?)` \|", PAGE, re.MULTILINE) for n in [row.split("(")[0]]}
    members = {n for n in QueryModel.__annotations__} | {
        n for n, f in inspect.getmembers(QueryModel, inspect.isfunction)
    }
    assert named == {n for n in members if not n.startswith("_")}, "the page's table and the protocol list the same"


def test_a_module_that_is_no_query_model_is_refused_by_what_it_lacks() -> None:
    with pytest.raises(
        TypeError, match=r"got Linear, one without Config, config, sites, channels, num_classes, num_queries, backbone"
    ):
        Supervised(torch.nn.Linear(1, 1))


def test_predictions_have_the_pictures_own_sizes() -> None:
    model = TinyQueries(num_classes=3).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        outputs = model.decode(model.encode(images))
    found = model.predictions(outputs, (64, 96), [(64, 90), (50, 96)], [(100, 150), (25, 48)], max_per_image=7)
    assert [p.masks.size for p in found] == [(100, 150), (25, 48)]
    assert all(len(p.masks) == len(p.scores) == len(p.labels) == 7 for p in found)


@pytest.mark.parametrize(
    ("classes", "number", "good"), [(["a"], 1, True), (["a", "b"], 2, True), (["a", "b"], 1, False)]
)
def test_check_classes(classes: list[str], number: int, good: bool) -> None:
    with contextlib.nullcontext() if good else pytest.raises(ValueError, match=r"labels, 2 \(a, b\), got 1"):
        check_classes(classes, number)


def test_supervised_sums_the_terms() -> None:
    from tiny_queries import batch_of

    torch.manual_seed(0)
    model = TinyQueries(num_classes=2)
    masks = torch.zeros(2, 1, 32, 32)
    masks[:, :, 4:20, 4:20] = 1
    batch = batch_of(masks, [1, 0])
    loss, logs = Supervised(model)(batch, 0)
    terms = model.losses(model.decode(model.encode(batch.images)), batch.masks, batch.labels, batch.counts).terms
    assert list(logs) == list(terms)
    torch.testing.assert_close(loss, terms["class"] + terms["bce"] + terms["dice"])
    loss.backward()
    assert model.queries.grad.abs().sum() > 0
    assert not any(v.requires_grad for v in logs.values())
