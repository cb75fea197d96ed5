"""The confusion of classes: a table of true and predicted classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sprompt.report.compare import IOU, compare
from sprompt.report.page import Html, Section, join, tag
from sprompt.report.records import Records, classless, masks_of, read_records

SCORE = 0.3  # lower bound of the score of a prediction that counts
MOST = 30  # largest number of classes in a table
_PAIRS = 3  # number of confusions in the sentence above the table
_STRONGEST = 55  # per cent of colour in a cell that holds all of its row; text on this colour is still legible

#: Counts of (true, predicted) category ids. (id, None): a label without a prediction. (None, id): a prediction without a label.
Counts = Counter[tuple["int | None", "int | None"]]


@dataclass(frozen=True)
class Table:
    """Rows are the true classes, then "nothing there". Columns are the predicted classes, then "missed". If classes are left
    out, a row and a column "others" counts them, before the last row and column."""

    rows: list[str]
    columns: list[str]
    cells: list[list[int]]
    left_out: int  # number of classes in "others"


def count(truth: Records, found: Records) -> Counts:
    """Compares labels and predictions regardless of class, over the pictures that both have.

    By decreasing score, every prediction of at least `SCORE` takes the free label that it overlaps most, if their IoU is at least
    `IOU`. Predictions in a crowd, and crowds, do not count. Masks that cannot be read are noted in `found.problems`.
    """
    counts: Counts = Counter()
    unread = 0
    for own, entry in truth.entries.items():
        if own not in found.entries:
            continue
        chosen = [p for p in found.entries[own].instances if (p.score or 0.0) >= SCORE]
        chosen.sort(key=lambda p: -(p.score or 0.0))  # the order that `compare` keeps
        size = entry.size
        if size is None:
            unread += len(chosen) + len(entry.instances)
            continue
        masks, predicted, broken = masks_of(chosen, size)
        label_masks, labels, others = masks_of(entry.instances, size)
        unread += broken + others
        compared = compare(masks, classless(predicted), label_masks, classless(labels))
        for prediction, match in zip(predicted, compared.found, strict=True):
            if match != -2:
                counts[labels[match].category if match >= 0 else None, prediction.category] += 1
        taken = set(compared.found)
        for place, label in enumerate(labels):
            if place not in taken and not label.crowd:
                counts[label.category, None] += 1
    if unread:
        found.problems.append(f"{unread} masks cannot be read, or their picture has no size, and are not in the table")
    return counts


def tabulate(counts: Counts, names: Mapping[int, str], most: int = MOST) -> Table:
    """The table of the `most` classes with the most labels, sorted by decreasing number of labels, then by id."""
    labels: Counter[int] = Counter()
    for (true, predicted), number in counts.items():
        labels.update({true: number} if true is not None else {})
        labels.update({predicted: 0} if predicted is not None else {})
    order = sorted(labels, key=lambda own: (-labels[own], own))
    shown, rest = order[:most], order[most:]
    place = {own: i for i, own in enumerate(shown)} | {own: len(shown) for own in rest}
    size = len(shown) + bool(rest) + 1
    cells = [[0] * size for _ in range(size)]
    for (true, predicted), number in counts.items():
        row, column = (size - 1 if own is None else place[own] for own in (true, predicted))
        cells[row][column] += number
    heads = [names.get(own, str(own)) for own in shown] + (["others"] if rest else [])
    return Table([*heads, "nothing there"], [*heads, "missed"], cells, len(rest))


def worst(counts: Counts) -> list[tuple[int, int, int, int]]:
    """The most frequent confusions: true id, predicted id, number of times, and number of all labels of the true class."""
    labels: Counter[int] = Counter()
    for (true, _), number in counts.items():
        labels.update({true: number} if true is not None else {})
    pairs = [
        (true, predicted, number, labels[true])
        for (true, predicted), number in counts.items()
        if true is not None and predicted is not None and true != predicted
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))[:_PAIRS]


def section(labels: Path | None, file: Path) -> Section | None:
    """The section of the page for all pictures of a COCO file and COCO results. None without labels, with a single class, or
    if no label or prediction counts."""
    if labels is None:
        return None
    truth = read_records(labels)
    if len(truth.categories) < 2:
        return None
    found = read_records(file, like=truth)
    counts, names = count(truth, found), truth.categories
    if not counts:
        return None
    table = tabulate(counts, names)
    pairs = [
        f"{names.get(true, true)} taken for {names.get(predicted, predicted)} ({number:,} of {total:,} label{'' if total == 1 else 's'})"
        for true, predicted, number, total in worst(counts)
    ]
    said = (
        f"Most often confused: {'; '.join(pairs)}." if pairs else "No object was taken for an object of another class."
    )
    note = (
        f"All pictures, and predictions with a score of at least {SCORE}. By decreasing score, a prediction takes the label of any "
        f"class that it overlaps most, if their IoU is at least {IOU}. A row is a true class, a column a predicted class. “Missed” are "
        "labels without a prediction, “nothing there” are predictions without a label. The colour is the share of the row."
    )
    if table.left_out:
        note += f" The {MOST} classes with the most labels are shown; {table.left_out} classes are left out and counted as “others”."
    body = join(tag("p", said), tag("p", note, class_="note"), _html(table), _remarks(found))
    total = sum(number for (true, _), number in counts.items() if true is not None)
    return Section("confusion", "Confusion of classes", body, f"{total:,} labels")


def _html(table: Table) -> Html:
    head = [tag("th", tag("span", name), scope="col") for name in table.columns]
    rows = []
    for i, (name, cells) in enumerate(zip(table.rows, table.cells, strict=True)):
        total = max(sum(cells), 1)
        written = []
        for j, number in enumerate(cells):
            right = i == j and i < len(cells) - 1 - bool(table.left_out)  # in "others" the two classes may differ
            style = f"--s:{_STRONGEST * number / total:.0f}%" if number else None
            what = f"{name}, {table.columns[j]}: {number:,}"
            written.append(
                tag("td", f"{number:,}" if number else "", class_="n hit" if right else "n", style=style, title=what)
            )
        rows.append(tag("tr", tag("th", name, scope="row"), written))
    inner = tag("table", tag("caption", "True classes in rows, predicted classes in columns"), tag("thead", tag("tr", tag("td"), head)),
                tag("tbody", rows))  # fmt: skip
    return tag("div", inner, class_="scroll confusion", tabindex="0", role="region", aria_label="Confusion of classes")


def _remarks(found: Records) -> Html | None:
    return tag("ul", [tag("li", problem) for problem in found.problems], class_="problems") if found.problems else None
