"""The sections of a gallery with pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from PIL import Image

from sprompt.data import draw
from sprompt.data.boxes import four_numbers
from sprompt.data.draw import Mark, hexadecimal
from sprompt.data.errors import DataError
from sprompt.masks import BitMasks
from sprompt.report.album import Album, dot, figure
from sprompt.report.compare import IOU, Compared, above, best_threshold, compare
from sprompt.report.curves import histogram
from sprompt.report.page import Child, Html, Section, join, tag
from sprompt.report.prompts import Matches
from sprompt.report.records import (
    Entry,
    Instance,
    Records,
    evenly,
    listed,
    masks_of,
    read_image,
    read_records,
    seed_grid,
)

_BADGES = draw.BADGES  # masks are numbered in pictures with at most this many masks
_CHIPS = 8
_UNLABELLED = 0.3  # least score of drawn predictions if there are no labels to choose a threshold by


def proposals(album: Album, images: Path, file: Path, limit: int) -> Section:
    """Pictures with their proposals by score, and the seed of each proposal."""
    records = read_records(file)
    grid = seed_grid(records, file.name)
    filled = [entry for entry in records.entries.values() if entry.instances]
    figures = []

    def add(entry: Entry, picture: Image.Image, number: int) -> None:
        masks, kept = _masks(entry, entry.instances, picture, records)
        seeds: list[tuple[float, float] | None] = [None] * len(kept)
        if grid is not None:
            for i, instance in enumerate(kept):
                try:
                    x, y, _ = grid.points([instance.seed], masks.size, entry.name)[0].tolist()
                    seeds[i] = (x, y)
                except DataError as error:
                    records.problems.append(str(error))
        order = sorted(range(len(kept)), key=lambda i: -(kept[i].score or 0))
        numbered = len(kept) <= _BADGES
        marks = [Mark(draw.colour(0))] * len(kept)
        for rank, i in enumerate(order):
            marks[i] = Mark(draw.colour(rank), str(rank + 1) if numbered else "", seed=seeds[i])
        chips = [join(dot(hexadecimal(marks[i].colour)), _score(kept[i])) for i in order]
        said = f"{entry.name} with {_many(len(kept), 'proposal')}"
        shot = album.shot(
            f"proposals-{number:03}", draw.overlay(picture, masks, marks), said, plain=draw.scaled(picture)
        )
        figures.append(figure([shot], picture.width / picture.height, entry.name, _chips(chips)))

    _each(filled, limit, images, records, add)
    counts = [len(entry.instances) for entry in records.entries.values()]
    scores = [i.score for entry in filled for i in entry.instances if i.score is not None]
    stats = [
        _stat(f"{len(counts):,}", "pictures"),
        _stat(f"{sum(counts):,}", "proposals"),
        _stat(f"{mean(counts):.1f}" if counts else "0", "a picture"),
        _stat(f"{counts.count(0):,}", "pictures without any"),
        tag(
            "li",
            histogram(counts, 0, max([*counts, 1]) + 1, min(max([*counts, 1]) + 1, 24), "proposals a picture"),
            class_="chart",
        ),
    ]
    if scores:
        low = np.floor(min(scores) * 20) / 20
        stats.append(tag("li", histogram(scores, low, max(1.0, max(scores)), 24, "score"), class_="chart"))
    what = "Masks found without labels, numbered by decreasing score."
    if grid is not None:
        what += " The white ring is the seed: the place whose features were compared with all others."
    body = join(_note(what), tag("ul", stats, class_="stats"), _problems(records.problems), _sheet(figures))
    return Section("proposals", "Proposals", body, _shown(len(figures), len(filled)))


def prompts(album: Album, matches: Sequence[Matches]) -> Section:
    """Pictures with their prompts, and the prompt that each kernel takes."""
    figures = [_prompted(album, number, match) for number, match in enumerate(matches)]
    takers = [_takers(match) for match in matches]
    total = sum(map(len, takers))
    kernels = max((len(match.kernels) for match in matches), default=0)
    stats = [
        _stat(str(kernels), "kernels"),
        _stat(f"{total / max(1, len(matches)):.1f}", "prompts a picture"),
        _stat(f"{100 * sum(bool(t) for ts in takers for t in ts) / max(1, total):.0f} %", "of the prompts are taken"),
        _stat(
            f"{100 * mean([max(map(len, ts)) / max(1, kernels) for ts in takers if ts] or [0.0]):.0f} %",
            "of the kernels take the most wanted prompt",
        ),
    ]
    note = (
        "Every kernel takes the most similar prompt of the picture. A prompt may be taken by many kernels or by none. Each "
        "small square is a kernel, in the colour of its prompt. Point at it for its number."
    )
    body = join(_note(note), tag("ul", stats, class_="stats"), tag("div", figures, class_="prompts"))
    return Section("prompts", "Prompts", body, _many(len(matches), "picture"))


def predictions(
    album: Album, images: Path, labels: Path | None, file: Path, limit: int, pooled: bool = False
) -> Section:
    """Predictions, and the labels beside them where there are any; without labels see `unlabelled`. Masks of `sprompt label` have their
    boxes. `pooled`: a prediction finds labels of any class."""
    if labels is None:
        return unlabelled(album, images, file, limit)
    truth = read_records(labels)
    records = read_records(file, images, truth)
    if pooled:
        truth, records = truth.pooled(), records.pooled()
    names = truth.categories
    records.problems += truth.problems
    known = [
        e for i, e in records.entries.items() if i in truth.entries and (e.instances or truth.entries[i].instances)
    ]
    compared: list[tuple[Entry, Image.Image, Compared]] = []

    def add(entry: Entry, picture: Image.Image, number: int) -> None:
        own, kept = _masks(entry, entry.instances, picture, records)
        other, theirs = _masks(entry, truth.entries[entry.id].instances, picture, records)
        compared.append((entry, picture, compare(own, kept, other, theirs)))

    _each(known, limit, images, records, add)
    threshold = best_threshold([c for _, _, c in compared])
    made = "labels" in records.info  # by `sprompt label`, without scores
    figures, sums = [], [0, 0, 0]
    for number, (entry, picture, whole) in enumerate(compared):
        figures.append(_pair(album, number, entry.name, picture, above(whole, threshold), names, made))
        sums = [a + b for a, b in zip(sums, above(whole, threshold).counts, strict=True)]
    true, false, missed = sums
    stats = [
        _stat(f"{true:,}", "found", "t"), _stat(f"{false:,}", "false", "f"), _stat(f"{missed:,}", "missed", "m"),
        _stat(f"{100 * true / max(1, true + false):.0f} %", "precision"),
        _stat(f"{100 * true / max(1, true + missed):.0f} %", "recall"),
    ]  # fmt: skip
    key = [
        tag("span", dot(hexadecimal(c), s), words)
        for c, s, words in (
            (draw.TRUE, "solid", f"found: IoU of at least {IOU} with a label{'' if pooled else ' of its class'}"),
            (draw.FALSE, "hatched", "false: a prediction without such a label"),
            (draw.MISSED, "dashed", "missed: a label without a matching prediction"),
        )
    ]
    shown = (
        f"The pictures show masks of {_of(file)}, and the boxes that they were made from. Masks are numbered in the order of the file."
        if made
        else f"The pictures show predictions of {_of(file)} with a score of at least {threshold:.2f}. This threshold has the best F1 on "
        "these pictures. Predictions are numbered by decreasing score."
    )
    note = f"{shown} A label has the number of the prediction that found it" + (
        "; classes are pooled." if pooled else "; a missed label has its class."
    )
    buttons = [
        tag("button", words, type="button", data_kind=kind, aria_pressed="true" if kind == "all" else "false")
        for kind, words in (
            ("all", "All"),
            ("false", "With false"),
            ("missed", "With missed"),
            ("clean", "Without a fault"),
        )
    ]
    body = join(
        _note(note), tag("ul", stats, class_="stats"), tag("p", key, class_="key"), _problems(records.problems),
        tag("div", buttons, class_="tools", data_sheet="compared", role="group", aria_label="Which pictures"),
        _sheet(figures, "pairs", "compared"),
    )  # fmt: skip
    return Section("predictions", "Predictions against labels", body, _shown(len(figures), len(known)))


# -- parts
def _pair(
    album: Album, number: int, name: str, picture: Image.Image, c: Compared, classes: dict[int, str], made: bool
) -> Html:
    """Predictions on the left, labels on the right. `made` predictions are masks that were made from boxes."""
    looks = {-1: (draw.FALSE, "hatched"), -2: (draw.IGNORED, "solid")}
    styles = [looks.get(f, (draw.TRUE, "solid")) for f in c.found]
    numbered = len(c.predictions) <= _BADGES and len(c.labels) <= _BADGES
    boxes = [_box(p, picture) if made and numbered else None for p in c.predictions]
    left = [Mark(shade, str(i + 1) if numbered else "", style, boxes[i]) for i, (shade, style) in enumerate(styles)]
    finder = {g: i for i, g in enumerate(c.found) if g >= 0}
    right, lost = [], []
    many = len(classes) > 1
    for g, label in enumerate(c.labels):
        if g in finder:
            right.append(Mark(draw.TRUE, str(finder[g] + 1) if numbered else ""))
        else:
            name_of = str(classes.get(label.category, label.category)) if many else ""
            right.append(
                Mark(draw.IGNORED, "crowd") if label.crowd else Mark(draw.MISSED, name_of if numbered else "", "dashed")
            )
            if many and not label.crowd:
                lost.append(join(dot(hexadecimal(draw.MISSED), "dashed"), f"{name_of} missed"))
    true, false, missed = c.counts
    said = f"{true} found, {false} false, {missed} missed"
    chips = [
        join(
            dot(hexadecimal(styles[i][0]), styles[i][1]),
            f"{classes.get(p.category, p.category)} " if many else None, None if made else _score(p),
            f"{'' if made else ' · '}IoU {c.ious[i]:.2f}" if c.found[i] >= 0 else None,
        )
        for i, p in enumerate(c.predictions)
    ]  # fmt: skip
    plain = draw.scaled(picture)
    shots = [
        album.shot(f"predictions-{number:03}", draw.overlay(picture, c.masks, left), f"Predictions on {name}: {said}",
                   plain=plain, title="prediction"),
        album.shot(f"labels-{number:03}", draw.overlay(picture, c.label_masks, right), f"Labels of {name}", plain=plain, title="label"),
    ]  # fmt: skip
    words = [
        tag("span", f"{n} {word}", class_=shade)
        for n, word, shade in ((true, "found", "t"), (false, "false", "f"), (missed, "missed", "m"))
        if n
    ]
    caption = join(
        tag("div", words or tag("span", "nothing here, nothing found"), class_="chips"), _chips(chips), _chips(lost)
    )
    kinds = [word for word, n in (("false", false), ("missed", missed), ("clean", not false + missed)) if n]
    return figure(shots, 2 * picture.width / picture.height, name, caption, " ".join(kinds))


def _prompted(album: Album, number: int, match: Matches) -> Html:
    """A picture with its prompts, the number of kernels that take each, and the prompt of every kernel."""
    takers = _takers(match)
    count, most = len(takers), max(map(len, takers), default=0)
    shades = [hexadecimal(draw.colour(i)) for i in range(count)]
    boxes = match.masks.boxes().tolist()
    marks = [Mark(draw.colour(i), str(i + 1), box=(x1, y1, x2, y2)) for i, (x1, y1, x2, y2) in enumerate(boxes)]
    drawn, plain = draw.overlay(match.picture, match.masks, marks), draw.scaled(match.picture)
    shot = album.shot(f"prompts-{number:03}", drawn, f"{match.name} with {_many(count, 'prompt')}", plain=plain)
    rows = []
    for i, taker in enumerate(takers):
        bar = tag("div", class_="bar", style=f"--c:{shades[i]};width:{100 * len(taker) / max(most, 1):.1f}%")
        who = f"kernels {', '.join(map(str, taker))}" if taker else "no kernel"
        rows.append(
            join(
                tag("span", dot(shades[i]), f"prompt {i + 1}"),
                tag("span", bar, class_="track"),
                tag("b", len(taker), title=who),
            )
        )
    squares = [
        tag("span", title=f"kernel {n}: prompt {p + 1}", style=f"--c:{shades[p]}")
        if 0 <= p < count
        else tag("span", title=f"kernel {n}: no prompt", class_="none")
        for n, p in enumerate(match.kernels)
    ]
    words = "; ".join(f"prompt {i + 1}: {len(t)} kernels" for i, t in enumerate(takers)) or "no prompts"
    caption = tag(
        "figcaption",
        tag("span", match.name, class_="name", title=match.name),
        tag("span", f"{_many(count, 'prompt')}, {_many(len(match.kernels), 'kernel')}", class_="meta"),
    )
    cells = tag("div", squares, class_="kernels", role="img", aria_label=f"Kernels by prompt. {words}")
    side = tag("div", caption, tag("div", rows, class_="bars"), cells)
    return tag("figure", tag("div", shot, class_="shots"), side, class_="prompt", data_title=match.name)


def _takers(match: Matches) -> list[list[int]]:
    """The kernels that take each prompt."""
    return [[n for n, p in enumerate(match.kernels) if p == i] for i in range(len(match.masks))]


def unlabelled(album: Album, images: Path, file: Path, limit: int, anchor: str = "predictions") -> Section:
    """Predictions alone. If a pictures.json of `sprompt predict` lies beside them, it names pictures and classes; otherwise the
    pictures are those of the folder in their order."""
    records = read_records(file, images, listed(file))
    names = records.categories
    filled = [entry for entry in records.entries.values() if entry.instances]
    figures = []

    def add(entry: Entry, picture: Image.Image, number: int) -> None:
        ordered = sorted(entry.instances, key=lambda i: -(i.score or 0))
        chosen = [i for i in ordered if (i.score or 0) >= _UNLABELLED] or ordered[:3]
        masks, kept = _masks(entry, chosen, picture, records)
        numbered = len(kept) <= _BADGES
        marks = [Mark(draw.colour(i), str(i + 1) if numbered else "") for i in range(len(kept))]
        chips = [
            join(
                dot(hexadecimal(m.colour)),
                f"{names.get(i.category, i.category)} " if len(names) > 1 else None,
                _score(i),
            )
            for m, i in zip(marks, kept, strict=True)
        ]
        said = f"{entry.name} with {_many(len(kept), 'prediction')}"
        shot = album.shot(
            f"{anchor}-{number:03}", draw.overlay(picture, masks, marks), said, plain=draw.scaled(picture)
        )
        figures.append(figure([shot], picture.width / picture.height, entry.name, _chips(chips)))

    _each(filled, limit, images, records, add)
    note = (
        f"Predictions of {_of(file)} with a score of at least {_UNLABELLED}. If a picture has none, its best three are shown. "
        "There are no labels to compare with."
    )
    body = join(_note(note), _problems(records.problems), _sheet(figures))
    title = "Predictions" if anchor == "predictions" else "Predictions without labels"
    return Section(anchor, title, body, _shown(len(figures), len(filled)))


def _each(
    entries: Sequence[Entry], limit: int, images: Path, records: Records, add: Callable[[Entry, Image.Image, int], None]
) -> None:
    """Calls `add` for at most `limit` entries and their pictures, spread evenly. A DataError becomes a problem of `records`."""
    number = 0
    for entry in evenly(entries, limit):
        try:
            add(entry, read_image(images, entry.name), number)
            number += 1
        except DataError as error:
            records.problems.append(str(error))


def _masks(
    entry: Entry, instances: Sequence[Instance], picture: Image.Image, records: Records
) -> tuple[BitMasks, list[Instance]]:
    masks, kept, broken = masks_of(instances, (picture.height, picture.width))
    if broken:
        records.problems.append(
            f"{entry.name}: {_many(broken, 'mask')} broken, or not of its size, {picture.height}x{picture.width}"
        )
    return masks, kept


def _box(instance: Instance, picture: Image.Image) -> tuple[float, float, float, float] | None:
    """The corners of an instance's box, clipped to its picture; None where nothing of it is there."""
    if (numbers := four_numbers(instance.box)) is None:
        return None
    x, y, width, height = numbers
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + width, picture.width), min(y + height, picture.height)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _of(file: Path) -> str:
    """The results in words: run folder and file."""
    return "/".join(file.absolute().parts[-2:])


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _shown(count: int, total: int) -> str:
    return f"{count:,} of {_many(total, 'picture')}" if count < total else _many(count, "picture")


def _score(instance: Instance) -> str:
    return "no score" if instance.score is None else f"{instance.score:.2f}"


def _chips(chips: Sequence[Html]) -> Html:
    more = [tag("span", f"and {len(chips) - _CHIPS} more")] if len(chips) > _CHIPS else []
    return tag("div", [tag("span", chip) for chip in chips[:_CHIPS]], more, class_="chips")


def _stat(value: str, words: str, shade: str | None = None) -> Html:
    return tag("li", tag("b", value, class_=shade), words)


def _note(words: Child) -> Html:
    return tag("p", words, class_="note")


def _sheet(figures: Sequence[Html], kind: str = "", anchor: str | None = None) -> Html:
    if not figures:
        return _note("There is nothing to draw.")
    return tag("div", figures, class_=f"sheet {kind}".strip(), id=anchor)


def _problems(problems: Sequence[str]) -> Html:
    if not problems:
        return Html()
    rows = [tag("li", problem) for problem in problems[:20]]
    if len(problems) > 20:
        rows.append(tag("li", f"and {len(problems) - 20} more"))
    return tag(
        "details", tag("summary", _many(len(problems), "remark") + " on the files"), tag("ul", rows), class_="problems"
    )
