"""The page: well-formed, complete, escaped, and clear about missing sections."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from sprompt.data import draw
from sprompt.data.errors import DataError
from sprompt.report.activation import save_activation
from sprompt.report.gallery import build
from sprompt.report.page import Html, join, tag
from sprompt.report.prompts import Matches
from sprompt.report.style import STYLE

VOID = {"meta", "link", "img", "br", "hr", "input"}
SECTIONS = ["proposals", "prompts", "predictions", "confusion", "curves", "metrics", "kernels", "runs"]


class Reader(HTMLParser):
    """Checks that tags balance, and collects references and the text of each section."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, Any]] = []
        self.text: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, Any]]] = []

    def handle_startendtag(self, name: str, attributes: Any) -> None:
        self.note(name, dict(attributes))

    def handle_starttag(self, name: str, attributes: Any) -> None:
        values = dict(attributes)
        self.note(name, values)
        if name not in VOID:
            self.open.append((name, values.get("id", "")))

    def note(self, name: str, values: dict[str, Any]) -> None:
        assert all(not key.startswith("on") for key in values), values
        self.tags.append((name, values))
        if "id" in values:
            self.ids.append(values["id"])
        self.links += [values[key] for key in ("href", "src", "data-plain") if values.get(key)]
        if name == "img":
            self.images.append(values)

    def handle_endtag(self, name: str) -> None:
        assert self.open and self.open[-1][0] == name, f"</{name}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        section = next((own for name, own in self.open if name == "section"), "")
        self.text[section] = self.text.get(section, "") + data


def read(page: Path) -> Reader:
    """Parses a page, and checks the properties of every page."""
    reader = Reader()
    text = page.read_text()
    reader.feed(text)
    reader.close()
    assert reader.open == [] and len(reader.ids) == len(set(reader.ids))
    for link in reader.links:
        parts = urlsplit(link)
        assert not parts.netloc and parts.scheme in ("", "data"), link
        if link.startswith("#"):
            assert link[1:] in reader.ids, link
        elif not parts.scheme:
            assert (page.parent / unquote(parts.path)).is_file(), link
    for image in reader.images:
        assert image["alt"] and int(image["width"]) > 0 and image["loading"] == "lazy"
        with Image.open(page.parent / image["src"]) as stored:
            assert stored.size == (int(image["width"]), int(image["height"]))
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    return reader


def full(disk: Any, out: Path, **more: Any) -> Path:
    maps = torch.rand(5, 20, 20, generator=torch.Generator().manual_seed(0))
    save_activation(out.parent / "maps.npz", maps)
    arguments: dict[str, Any] = {
        "proposals": (disk.images, disk.proposals), "runs": disk.runs, "prompts": disk.matches,
        "predictions": (disk.images, disk.labels, disk.predictions), "activation": out.parent / "maps.npz",
    }  # fmt: skip
    return build(out, **(arguments | more))


def test_every_section_is_there(disk: Any, tmp_path: Path) -> None:
    page = full(disk, tmp_path / "site")
    reader = read(page)
    assert page == tmp_path / "site" / "index.html"
    assert [i for i in reader.ids if i in SECTIONS] == SECTIONS and "missing" not in reader.ids
    assert len(reader.images) == 2 + 1 + 3 * 2 + 5
    text = reader.text
    assert "2proposals" in text["proposals"] and "0.95" in text["proposals"]
    assert "prompt 13" not in text["prompts"] and "prompt 23" in text["prompts"]  # three kernels take prompt 2
    assert all(
        w in text["predictions"] for w in ("2found", "1false", "1missed", "at least 0.70", "cat 0.90 · IoU 0.94")
    )
    assert "0.250" in text["metrics"] and "0.350" in text["metrics"]
    assert "none" in text["metrics"]  # COCO writes −1 for a metric without labels
    assert "method.assign" in text["runs"] and "cosine" in text["runs"] and "60" in text["runs"]


def test_nothing_at_all(tmp_path: Path) -> None:
    reader = read(build(tmp_path / "deep" / "site"))
    assert [i for i in reader.ids if i in (*SECTIONS, "missing")] == ["missing"]
    for command in ("sprompt propose", "sprompt pretrain", "sprompt finetune", "sprompt evaluate", "sprompt predict"):
        assert command in reader.text["missing"]


@pytest.mark.parametrize("left_out", SECTIONS)
def test_a_section_without_input_says_how_to_make_it(left_out: str, disk: Any, tmp_path: Path) -> None:
    argument = {"confusion": "predictions", "curves": "runs", "metrics": "runs", "kernels": "activation"}.get(
        left_out, left_out
    )
    reader = read(full(disk, tmp_path / "site", **{argument: () if argument == "runs" else None}))
    assert left_out not in reader.ids and "missing" in reader.ids


def test_predictions_without_labels_take_pictures_by_their_order(disk: Any, tmp_path: Path) -> None:
    predictions = json.loads(disk.predictions.read_text())
    for p in predictions:
        p["image_id"] = [1, 2, 3].index(p["image_id"])  # p1.png is the first file
    disk.predictions.write_text(json.dumps(predictions))
    reader = read(build(tmp_path / "site", predictions=(disk.images, None, disk.predictions)))
    assert "p1.png" in reader.text["predictions"] and "0.80" in reader.text["predictions"]
    assert "broken" not in reader.text["predictions"]
    assert "0.05" in reader.text["predictions"]  # the best prediction of a picture without one above the threshold


def test_missed_labels_have_their_class(disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    badges: list[list[str]] = []
    overlay = draw.overlay
    monkeypatch.setattr(
        draw, "overlay", lambda p, m, marks: badges.append([k.name for k in marks]) or overlay(p, m, marks)
    )
    reader = read(build(tmp_path / "site", predictions=(disk.images, disk.labels, disk.predictions)))
    assert "dog missed" in reader.text["predictions"] and "cat missed" not in reader.text["predictions"]
    assert ["1", "dog"] in badges
    assert (
        "predictions of " in reader.text["predictions"]
        and f"{tmp_path.name}/predictions.json" in reader.text["predictions"]
    )


def test_labels_are_shown_with_their_boxes(disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file of `sprompt label`. The boxes are clipped to the picture; one that is no box is not drawn, its mask is."""
    drawn: list[list[Any]] = []
    overlay = draw.overlay
    monkeypatch.setattr(
        draw, "overlay", lambda p, m, marks: drawn.append([k.box for k in marks]) or overlay(p, m, marks)
    )
    truth = json.loads(disk.labels.read_text())
    first = truth["images"][0]
    own = next(a for a in truth["annotations"] if a["image_id"] == first["id"])
    boxes = [[-3, 2, 10.5, 4], [1e308, 0, 1e308, 4], [0, 0, "5", 5], None, [-9, -9, 1e300, 1e300]]
    truth["annotations"] = [{**own, "id": n, "bbox": box} for n, box in enumerate(boxes)]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({**truth, "info": {"labels": {"area": "mask"}}}))
    reader = read(build(tmp_path / "site", predictions=(disk.images, disk.labels, labels)))
    want = [(0, 2, 7.5, 6), None, None, None, (0, 0, first["width"], first["height"])]
    assert want in drawn and "the boxes that they were made from" in reader.text["predictions"]
    assert "score" not in reader.text["predictions"]
    drawn.clear()
    labels.write_text(json.dumps(truth))  # of another program
    build(tmp_path / "site", predictions=(disk.images, disk.labels, labels))
    assert not any(any(marks) for marks in drawn)


def test_predictions_of_a_folder_have_the_names_in_pictures_json(disk: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(disk.predictions, run / "predictions.json")
    categories = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]
    images = [{"id": i, "file_name": name} for i, name in ((1, "p7.png"), (2, "p2.png"), (3, "p3.png"))]
    (run / "pictures.json").write_text(json.dumps({"images": images, "categories": categories}))
    reader = read(build(tmp_path / "site", predictions=(disk.images, None, run / "predictions.json")))
    text = reader.text["predictions"]
    assert "cat 0.90" in text and "p7.png" in text and "p1.png" not in text and "run/predictions.json" in text
    assert "confusion" not in reader.ids


def test_predictions_with_and_without_labels_have_a_section_each(disk: Any, tmp_path: Path) -> None:
    reader = read(full(disk, tmp_path / "site", found=(disk.images, disk.predictions)))
    assert reader.ids.index("confusion") + 1 == reader.ids.index("found") < reader.ids.index("curves")
    assert "2found" in reader.text["predictions"] and "no labels to compare with" in reader.text["found"]
    assert len(reader.images) == 2 + 1 + 3 * 2 + 3 + 5
    with pytest.raises(DataError, match="must be the folder of the pictures"):
        build(tmp_path / "a", found=(tmp_path / "nowhere", disk.predictions))


def test_a_bar_of_nothing_has_no_width(disk: Any, tmp_path: Path) -> None:
    (disk.runs[0] / "metrics.json").write_text(json.dumps({"AP": 0.0, "AP50": 0.3}))
    reader = read(build(tmp_path / "site", runs=disk.runs[:1]))
    bars = [values for _, values in reader.tags if "bar" in values.get("class", "").split()]
    assert [values["style"] for values in bars] == ["width:0.0%", "width:75.0%"]
    for selectors, rule in re.findall(r"([^{}]+)\{([^{}]*)\}", STYLE):
        if re.search(r"\.bar(?![\w-])[^\s,>]*(,|$)", selectors):
            assert not re.search(r"(^|;)(padding|border|min-width)(-left|-right)?:", rule), (
                f"{selectors} gives a bar of value 0 a width"
            )


def test_many_categories_are_a_short_table(disk: Any, tmp_path: Path) -> None:
    """A run with the 1203 categories of LVIS, in the form of either evaluator: category c has c % 100 objects."""
    objects = {f"thing {c}": c % 100 for c in range(1203)}
    open_world = {
        name: {"group": "seen", "objects": n, "hit_rate": 0.5 if n else -1, "AR": n / 1000 if n else -1, "ARs": 0.25}
        for name, n in objects.items()
    }
    average = {name: n / 1000 if n else -1.0 for name, n in objects.items()}
    for content, first, wanted in (
        (
            {"AR": 0.2, "per_category": open_world},
            [f"thing {c}" for c in range(99, 1203, 100)],
            {"thing 99": ["99", "0.099"]},
        ),
        ({"AP": 0.2, "per_class": average}, ["thing 1", "thing 2"], {"thing 1": ["", "0.001"]}),
    ):
        (disk.runs[0] / "metrics.json").write_text(json.dumps(content))
        page = build(tmp_path / "site", runs=disk.runs[:1]).read_text()
        rows = re.findall(r'<tr><th scope="row">(thing [^<]*)</th>(.*?)</tr>', page)
        assert len(rows) == page.count("thing ") == 50
        assert [name for name, _ in rows][: len(first)] == first
        for name, cells in wanted.items():
            assert re.findall(r"<td[^>]*>([^<]*)</td>", dict(rows)[name]) == cells
        assert "in metrics.json: 1,140 with objects, 13 without objects." in page
        assert page.count("<tr") < 120


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"per_class": 3, "per_category": {"a": 1}},
        {"per_class": {"a": "b"}},
        {"per_category": {"a": {"AR": 1, "objects": "9"}}},
    ],
)
def test_categories_that_are_none_are_left_out(content: Any, disk: Any, tmp_path: Path) -> None:
    (disk.runs[0] / "metrics.json").write_text(json.dumps(content))
    assert "Categories" not in build(tmp_path / "site", runs=disk.runs[:1]).read_text()


HOSTILE = "<script>alert(1)</script>\"><img src=x onerror=alert(2)>&amp;'</style>\u202e"


def test_hostile_names_are_escaped(disk: Any, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "_") + ".png"
    (disk.images / "p1.png").rename(disk.images / name)
    for file in (disk.labels, disk.proposals):
        data = json.loads(file.read_text())
        data["images"][0]["file_name"] = name
        data["categories"] = [{"id": 3, "name": HOSTILE}, {"id": 5, "name": HOSTILE}]
        file.write_text(json.dumps(data))
    (disk.runs[0] / "log.jsonl").write_text(json.dumps({"step": 1, HOSTILE: 1.0, "stage0/</script>": 2}) + "\n")
    (disk.runs[0] / "metrics.json").write_text(json.dumps({HOSTILE: 1, "word": HOSTILE}))
    (disk.runs[0] / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE}))
    hostile_run = disk.runs[0].rename(disk.runs[0].parent / HOSTILE.replace("/", "_"))
    found = disk.matches[0]
    page = full(
        disk, tmp_path / "site", runs=[hostile_run, disk.runs[1]], title=HOSTILE,
        prompts=[Matches(HOSTILE, found.picture, found.masks, found.kernels)],
    )  # fmt: skip
    reader = read(page)
    assert sum(name == "script" for name, _ in reader.tags) == 1
    assert not any(values.get("src") == "x" for _, values in reader.tags)
    for section in ("prompts", "curves", "metrics", "runs"):
        assert "alert(1)" in reader.text[section], section  # shown as text, not lost
    assert "alert(1)" in reader.text["proposals"] and "alert(1)" in reader.text["predictions"]


def test_names_that_leave_the_folder_are_not_followed(disk: Any, tmp_path: Path) -> None:
    Image.new("RGB", (64, 40), (255, 0, 0)).save(tmp_path / "secret.png")
    data = json.loads(disk.proposals.read_text())
    data["images"][0]["file_name"] = "../secret.png"
    data["images"][1]["file_name"] = str(tmp_path / "secret.png")
    disk.proposals.write_text(json.dumps(data))
    reader = read(build(tmp_path / "site", proposals=(disk.images, disk.proposals)))
    assert reader.images == [] and "must lie in" in reader.text["proposals"]


def test_links_in_the_folder_are_followed(disk: Any, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    for picture in disk.images.iterdir():
        (tmp_path / "links" / picture.name).symlink_to(picture)
    reader = read(build(tmp_path / "site", proposals=(tmp_path / "links", disk.proposals)))
    assert reader.images and "must lie in" not in reader.text["proposals"]


def test_broken_pictures_and_masks_are_named_and_left_out(disk: Any, tmp_path: Path) -> None:
    (disk.images / "p2.png").write_bytes(b"\x89PNG broken")
    data = json.loads(disk.proposals.read_text())
    data["annotations"][0]["segmentation"]["size"] = [41, 64]
    data["annotations"] += [
        {"image_id": 99, "segmentation": {"size": [1, 1], "counts": "1"}},
        "nonsense",
        {"image_id": 1},
    ]
    disk.proposals.write_text(json.dumps(data))
    reader = read(build(tmp_path / "site", proposals=(disk.images, disk.proposals)))
    text = reader.text["proposals"]
    assert "p2.png: is" in text and "p1.png: 1 mask broken" in text and "3 of 5 masks" in text
    assert [i["alt"] for i in reader.images] == ["p1.png with 0 proposals"]


def test_a_broken_seed_is_named_and_its_proposal_drawn(disk: Any, tmp_path: Path) -> None:
    data = json.loads(disk.proposals.read_text())
    data["annotations"][0]["seed"] = [0, 50, 50]
    disk.proposals.write_text(json.dumps(data))
    reader = read(build(tmp_path / "site", proposals=(disk.images, disk.proposals)))
    assert "p1.png: seed must lie in the view" in reader.text["proposals"] and len(reader.images) == 2
    data["info"]["proposals"]["version"] = 9
    disk.proposals.write_text(json.dumps(data))
    reader = read(build(tmp_path / "site", proposals=(disk.images, disk.proposals)))
    assert "must be of version 1" in reader.text["proposals"] and len(reader.images) == 2


def test_broken_runs_are_named(disk: Any, tmp_path: Path) -> None:
    (disk.runs[0] / "log.jsonl").write_text("[1]\n")
    (disk.runs[0] / "metrics.json").write_text("{")
    (disk.runs[0] / "config.yaml").write_text("a: [")
    text = read(build(tmp_path / "site", runs=disk.runs)).text["runs"]
    assert all(word in text for word in ("log.jsonl", "metrics.json", "config.yaml"))


def test_limit_takes_pictures_evenly(disk: Any, tmp_path: Path) -> None:
    reader = read(build(tmp_path / "site", proposals=(disk.images, disk.proposals), limit=1))
    assert len(reader.images) == 1 and "1 of 2 pictures" in reader.text["proposals"]
    with pytest.raises(ValueError, match="limit: must be at least 1"):
        build(tmp_path / "site", limit=0)


def test_a_second_page_replaces_the_first_and_its_pictures_only(disk: Any, tmp_path: Path) -> None:
    out = tmp_path / "site"
    full(disk, out)
    (out / "pictures" / "mine.jpg").write_bytes(b"not of the page")
    reader = read(build(out, proposals=(disk.images, disk.proposals), limit=1))
    kept = {p.name for p in (out / "pictures").iterdir()}
    assert kept == {"mine.jpg"} | {Path(link).name for link in reader.links if link.startswith("pictures/")}


def test_foreign_pages_and_wrong_inputs_are_refused(disk: Any, tmp_path: Path) -> None:
    out = tmp_path / "site"
    out.mkdir()
    (out / "index.html").write_text("<html>my own page</html>")
    with pytest.raises(ValueError, match="is a page of another program"):
        full(disk, out)
    assert (out / "index.html").read_text() == "<html>my own page</html>"
    with pytest.raises(ValueError, match="must be a folder, got a file"):
        build(disk.labels)
    with pytest.raises(DataError, match="must be the folder of the pictures"):
        build(tmp_path / "a", proposals=(tmp_path / "nowhere", disk.proposals))
    with pytest.raises(DataError, match="must be the folder of a run"):
        build(tmp_path / "a", runs=[tmp_path / "nowhere"])
    with pytest.raises(DataError, match="must be a COCO file with images"):
        build(tmp_path / "a", proposals=(disk.images, disk.runs[0] / "metrics.json"))
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no zip")
    with pytest.raises(DataError, match="array activation"):
        build(tmp_path / "a", activation=bad)
    with pytest.raises(DataError, match=r"shape \(N, h, w\)"):
        build(tmp_path / "a", activation=np.zeros((3, 4)))
    assert not (tmp_path / "a" / "index.html").exists()


def test_tags_escape_everything_but_html() -> None:
    assert tag("b", "<", Html("<i></i>"), 1, None, ["&"], class_='"x"', hidden=True, title=None) == (
        '<b class="&quot;x&quot;" hidden>&lt;<i></i>1&amp;</b>'
    )
    assert join("a<", tag("img", src="x")) == 'a&lt;<img src="x"/>'
