"""Overlays: which pixels get colour, and which do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sprompt.data import draw
from sprompt.data.draw import PALETTE, Mark, colour, heat_map, overlay, scaled
from sprompt.masks import BitMasks

GREY = (120, 120, 120)


def bits(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (60, 90)) -> BitMasks:
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return BitMasks.from_dense(masks)


def changed(drawn: Image.Image) -> np.ndarray:
    return (np.abs(np.asarray(drawn).astype(int) - GREY) > 6).any(-1)


def test_small_pictures_are_enlarged_and_large_ones_reduced() -> None:
    assert scaled(Image.new("RGB", (90, 60))).size == (900, 600)
    assert scaled(Image.new("L", (1000, 500))).size == (1000, 500)
    assert scaled(Image.new("RGB", (1280, 5120))).size == (320, 1280)
    assert scaled(Image.new("RGB", (9000, 1))).size == (1280, 1)


@pytest.mark.parametrize("style", ["solid", "hatched", "dashed"])
def test_colour_stays_in_and_around_the_mask(style: str) -> None:
    picture = Image.new("RGB", (90, 60), GREY)
    drawn = overlay(picture, bits((20, 10, 50, 40)), [Mark((255, 0, 0), style=style)])
    where = changed(drawn)
    inside, far = where[150:350, 250:450], where.copy()
    far[80:420, 180:520] = False  # 20 pixels around the outline
    assert not far.any()
    edge = where[90:110, 300:400].any(0).mean()
    assert inside.all()
    assert (np.asarray(drawn)[150:350, 250:450, 1].std() > 10) == (style == "hatched")
    assert edge == 1 if style != "dashed" else edge > 0.4
    red = np.asarray(drawn).astype(int)[200:300, 300:400].reshape(-1, 3).mean(0)
    assert red[0] > 140 and red[1] < 100


def test_the_outline_follows_the_border_of_the_mask() -> None:
    drawn = np.asarray(overlay(Image.new("RGB", (90, 60), GREY), bits((20, 10, 50, 40)), [Mark((255, 0, 0))])).astype(
        int
    )
    row = drawn[250, :, 0] - drawn[250, :, 1]  # redness
    assert abs(int(row[150:250].argmax()) + 150 - 200) <= 1 and abs(int(row[450:550].argmax()) + 450 - 499) <= 1


def test_tiny_and_empty_masks() -> None:
    picture = Image.new("RGB", (3000, 2000), GREY)
    marks = [Mark((255, 0, 0), "1"), Mark((0, 255, 0), "")]
    drawn = overlay(picture, bits((1500, 1000, 1501, 1001), (0, 0, 0, 0), size=(2000, 3000)), marks)
    where = changed(drawn)
    assert where[420:434, 633:647].any()  # visible although it is less than half a pixel wide
    assert where.sum() < 0.01 * where.size
    assert not changed(overlay(picture, bits((0, 0, 0, 0), size=(2000, 3000)), marks[:1])).any()


def test_masks_at_the_corner_and_one_pixel_pictures() -> None:
    drawn = overlay(Image.new("RGB", (90, 60), GREY), bits((60, 30, 90, 60)), [Mark((255, 0, 0), "12")])
    assert changed(drawn)[590, 890] and not changed(drawn)[100, 100]
    overlay(
        Image.new("RGB", (1, 1), GREY),
        bits((0, 0, 1, 1), size=(1, 1)),
        [Mark((255, 0, 0), "1", box=(0, 0, 1, 1), seed=(0.5, 0.5))],
    )
    overlay(Image.new("RGB", (2, 400), GREY), bits((0, 0, 2, 9), size=(400, 2)), [Mark((255, 0, 0), "1")])


def test_small_masks_lie_over_large_ones() -> None:
    masks = bits((40, 20, 50, 30), (10, 5, 80, 55))
    drawn = np.asarray(overlay(Image.new("RGB", (90, 60), GREY), masks, [Mark((0, 255, 0)), Mark((255, 0, 0))])).astype(
        int
    )
    assert drawn[250, 450, 1] > drawn[250, 450, 0] and drawn[100, 200, 0] > drawn[100, 200, 1]


def test_boxes_seeds_and_badges_are_at_their_places() -> None:
    picture = Image.new("RGB", (90, 60), GREY)
    empty = bits((0, 0, 0, 0))
    boxed = changed(overlay(picture, empty, [Mark((255, 0, 0), box=(20, 10, 50, 40))]))
    rows, columns = np.nonzero(boxed)
    assert abs(rows.min() - 100) <= 4 and abs(rows.max() - 400) <= 4 and abs(columns.min() - 200) <= 4
    assert not boxed[150:350, 250:450].any()
    rows, columns = np.nonzero(changed(overlay(picture, empty, [Mark((255, 0, 0), seed=(30.5, 20.5))])))
    assert abs(rows.mean() - 205) < 2 and abs(columns.mean() - 305) < 2
    masks = bits((20, 10, 60, 50))
    badge = np.asarray(overlay(picture, masks, [Mark((255, 0, 0), "7")])).astype(int)
    plain = np.asarray(overlay(picture, masks, [Mark((255, 0, 0))])).astype(int)
    rows, columns = np.nonzero(np.abs(badge - plain).sum(-1))
    assert abs(rows.mean() - 300) < 20 and abs(columns.mean() - 400) < 20  # the centre of the mask


def test_wrong_sizes_are_refused() -> None:
    picture = Image.new("RGB", (90, 60))
    with pytest.raises(ValueError, match="masks must be 1 of 60x90 pixels"):
        overlay(picture, bits((0, 0, 1, 1), size=(90, 60)), [Mark((1, 2, 3))])
    with pytest.raises(ValueError, match="masks must be 2 of 60x90 pixels"):
        overlay(picture, bits((0, 0, 1, 1)), [Mark((1, 2, 3))] * 2)


def test_colours_repeat_and_differ() -> None:
    assert len(set(PALETTE)) == len(PALETTE) >= 10 and colour(len(PALETTE) + 1) == colour(1)


def test_heat_maps() -> None:
    ramp = np.asarray(heat_map(np.linspace(0, 1, 50)[None])).astype(float)[0]
    lightness = ramp @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all() and lightness[0] < 20 and lightness[-1] > 230
    assert (np.asarray(heat_map(np.ones((2, 3)))) == np.asarray(heat_map(np.zeros((2, 3))))).all()
    assert (
        np.asarray(heat_map(np.array([[0, np.nan, 2.0]])))[0, 1] == np.asarray(heat_map(np.array([[0, 2.0]])))[0, 0]
    ).all()
    assert heat_map(np.full((2, 2), np.nan)).size == (2, 2)
    half = heat_map(np.array([[0.5, 1.0]]), 0.0, 2.0)
    assert half.getpixel((1, 0)) == heat_map(np.array([[0.0, 0.5, 1.0]])).getpixel((1, 0))
    with pytest.raises(ValueError, match=r"values must be \(H, W\)"):
        heat_map(np.zeros((2, 2, 2)))


# -- draw_picture
def _prediction(number: int) -> tuple[BitMasks, torch.Tensor, torch.Tensor]:
    dense = torch.zeros(number, 60, 90, dtype=torch.bool)
    for i in range(number):
        dense[i, 5:30, 10 + i : 40 + i] = True
    return BitMasks.from_dense(dense), torch.linspace(0.1, 0.9, number), torch.arange(number) % 2


def test_a_prediction_is_drawn_with_names_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    whole = draw.overlay
    monkeypatch.setattr(draw, "overlay", lambda p, m, marks: seen.extend(marks) or whole(p, m, marks))
    picture = Image.new("RGB", (90, 60), (128, 128, 128))
    drawn = draw.draw_picture(picture, *_prediction(3), ["cat", "dog"])
    assert [m.name for m in seen] == ["cat 0.10", "dog 0.50", "cat 0.90"]
    assert [m.colour for m in seen] == [draw.colour(2), draw.colour(1), draw.colour(0)]
    assert drawn.size == draw.scaled(picture).size == (900, 600)
    pixels = np.asarray(drawn).astype(int)
    assert (np.abs(pixels[500:] - 128) <= 1).all()  # no mask, no change
    inside = pixels[280, 200]
    assert np.abs(inside - 128).max() > 20


def test_a_single_class_is_not_named_and_many_masks_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(draw, "overlay", lambda p, m, marks: seen.extend(marks) or p)
    masks, scores, labels = _prediction(40)
    draw.draw_picture(Image.new("RGB", (90, 60)), masks, scores, labels * 0, ["object"])
    assert [m.name for m in seen][:16] == [""] * 16 and [m.name for m in seen][-1] == "0.90"
    assert sum(bool(m.name) for m in seen) == 24


def test_a_picture_without_masks_and_wrong_predictions() -> None:
    picture = Image.new("RGB", (90, 60), (9, 9, 9))
    masks, scores, labels = _prediction(2)
    assert draw.draw_picture(picture, masks[:0], scores[:0], labels[:0], ["a"]).getextrema() == ((9, 9),) * 3
    empty = BitMasks.from_dense(torch.zeros(2, 60, 90))
    assert draw.draw_picture(picture, empty, scores, labels, ["a", "b"]).getextrema() == ((9, 9),) * 3
    with pytest.raises(ValueError, match="must be of one number, got 2, 1 and 2"):
        draw.draw_picture(picture, masks, scores[:1], labels, ["a", "b"])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\), the classes, got 1"):
        draw.draw_picture(picture, masks, scores, labels, ["a"])
    with pytest.raises(ValueError, match="overlay: masks must be 2 of 90x60 pixels"):
        draw.draw_picture(picture.rotate(90, expand=True), masks, scores, labels, ["a", "b"])
