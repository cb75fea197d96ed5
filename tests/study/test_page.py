"""The page of a study, read as text and in a real browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sprompt.data.errors import DataError
from sprompt.study.page import write_page
from sprompt.study.predictions import Side

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser", "chrome"))), None)
NAMES = ("scratch", "backbone", "pseudo", "prompts", "site-late", "site-proposal")
QUESTIONED = ["head", "start", "site"]  # other questions would only repeat rows of start
VOID = {"meta", "link", "img", "input", "br", "hr"}
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def study(seeds: int = 3, fractions: tuple[float, ...] = (0.05, 0.1)) -> dict[str, Any]:
    cells = []
    for fraction in fractions:
        for seed in range(seeds):
            for place, name in enumerate(NAMES):
                ap = 0.1 * fraction * 10 + 0.02 * place + 0.005 * ((seed * 7 + place) % 3)
                curve = [[e, ap * e / 40, 2 * ap * e / 40] for e in range(4, 41, 4)]
                cells.append({
                    "variant": name, "fraction": fraction, "seed": seed, "curve": curve,
                    "metrics": {"AP": ap, "AP50": 2 * ap, "AP75": ap, "APs": -1, "APm": ap, "APl": ap, "pooled": 2 * ap},
                    "pretrained": {"AP": ap, "box/AP": ap}, "monitors": {"prompt_ratio": 2.0, "kernels_per_prompt": 4.5},
                })  # fmt: skip
    return {
        "version": 1, "study": {"variants": list(NAMES), "jobs": 2}, "machine": "2 cores", "hours": 1.5, "cells": cells,
        "data": {"name": "scenes", "train": 9, "fractions": list(fractions), "seeds": list(range(seeds)), "epochs": 40},
        "proposals": {"saliency": {"pictures": 10, "masks": 30, "precision": 0.5, "recall": None}},
        "failed": [{"cell": "prompts, 5 %, seed 9", "why": f"{'x' * 200}: no such file", "log": "finetune/a/output.txt"}],
    }  # fmt: skip


def maps(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, 12, 12), np.float32)


class Reader(HTMLParser):
    """Collects the text of each section, and checks that tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section = "head"
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attributes)["id"]

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = f"{self.text.get(self.section, '')} {data}"


def test_all_sections_in_order(tmp_path: Path) -> None:
    page = write_page(tmp_path, study(), {"prompts": maps(5), "scratch": maps(50)})
    assert page == tmp_path / "index.html"
    text = Reader(page.read_text()).text
    assert list(text) == [
        *QUESTIONED, "convergence", "progress", "cells", "proposals", "pretrained", "monitors", "kernels", "failed", "settings"
    ]  # fmt: skip
    assert "36 of 36 cells done, 1 failed, in 1.5 hours" in text["head"]
    assert "Pre-training with prompts is a better start" in text["start"] and "10 % of the labels" in text["start"]
    assert "above by more than the spread" in text["start"] and "baseline" in text["start"]
    assert "5 kernels, median spread 0.4" in text["kernels"] and "36 of 50 kernels" in text["kernels"]
    assert len(list((tmp_path / "pictures").iterdir())) == 5 + 36
    assert "no such file" in text["failed"] and "study.jobs 2" in text["settings"]


def test_the_row_of_the_best_mean_is_bold_and_dots_are_at_their_numbers(tmp_path: Path) -> None:
    page = write_page(tmp_path, study(seeds=1, fractions=(0.05,))).read_text()
    best = re.findall(r'<tr class="best"><th scope="row">([^<]+)', page)
    assert best == ["prompts, cosine assignment", "added to the pooled kernels"]
    # AP is 0.05 + 0.02 place + 0.005 (place mod 3): 0.05, 0.075, 0.1, 0.11, 0.135, 0.16, which is the end of the scale
    dots = [float(d) for d in re.findall(r'<i style="left:([\d.]+)%"', page)]
    assert dots == pytest.approx([31.25, 46.875, 62.5, 68.75, 84.375, 100], abs=0.01)
    assert 'class="band' not in page and "one seed only" in page


def test_bands_are_of_more_than_one_seed(tmp_path: Path) -> None:
    page = write_page(tmp_path, study(seeds=2, fractions=(0.05,))).read_text()
    assert page.count('class="band') == page.count('class="mean') == 2 * (4 + 3)  # AP and pooled AP of each row
    assert 'aria-label="AP over epochs. ' in page


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    assert "No cell is done yet" in write_page(tmp_path / "a", {}).read_text()
    results = study(seeds=2)
    for cell in results["cells"]:
        del cell["curve"], cell["pretrained"], cell["monitors"]
    del results["data"], results["study"], results["hours"], results["machine"], results["proposals"], results["failed"]
    results["cells"][0]["metrics"] = {}
    text = Reader(write_page(tmp_path / "b", results).read_text()).text
    assert list(text) == [*QUESTIONED, "cells", "settings"] and "24 cells done." in text["head"]
    results["cells"] = results["cells"][:1]
    assert list(Reader(write_page(tmp_path / "c", results).read_text()).text) == ["head", "settings"]


def test_names_are_text(tmp_path: Path) -> None:
    results = json.loads(json.dumps(study()).replace('"site-late"', json.dumps(HOSTILE)))
    results["data"]["name"] = results["machine"] = results["study"]["name"] = HOSTILE
    results["failed"] = [{"cell": HOSTILE, "why": HOSTILE, "log": HOSTILE}]
    results["proposals"] = {HOSTILE: {"pictures": 1, "masks": 2}}
    page = write_page(tmp_path, results, {HOSTILE: maps(2)}).read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and page.count("<script>") == 1
    assert all(
        HOSTILE in Reader(page).text[s] for s in ("head", "convergence", "cells", "proposals", "kernels", "failed")
    )


def test_a_foreign_page_stays_and_old_maps_go(tmp_path: Path) -> None:
    write_page(tmp_path, study(), {"prompts": maps(5)})
    write_page(tmp_path, study(), {"prompts": maps(2)})
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    (tmp_path / "index.html").write_text("<p>mine")
    with pytest.raises(ValueError, match="is a page of another program"):
        write_page(tmp_path, {})
    with pytest.raises(DataError, match=r"must hold numbers of shape \(N, h, w\)"):
        write_page(tmp_path / "a", {}, {"prompts": np.zeros((3, 3))})


#: The page runs in a frame, since windows cannot be as narrow as a phone.
FRAME = """<!doctype html><iframe src="probed.html" style="border:0;width:%dpx;height:900px"></iframe>
<script>addEventListener('message', e => document.documentElement.setAttribute('data-seen', JSON.stringify(e.data)))</script>"""
PROBE = """<script>
addEventListener('load', () => look().catch(e => ({error: String(e)})).then(seen => parent.postMessage(seen, '*')));
async function look() {
  const images = [...document.images];
  images.forEach(i => { i.loading = 'eager'; });
  for (let n = 0; n < 200 && !images.every(i => i.complete); n++) await new Promise(r => setTimeout(r, 50));
  const edge = e => e.getBoundingClientRect();
  const plot = document.querySelector('.plot[data-lines]'), r = edge(plot);
  plot.dispatchEvent(new PointerEvent('pointermove', {clientX: r.right, clientY: r.top + 5}));
  const tables = [...document.querySelectorAll('.study')], folded = document.querySelector('details').open;
  tables.forEach(t => { t.scrollLeft = 1e4; });
  const seen = {
    folded: !folded, tip: plot.querySelector('.tip').textContent, images: images.length,
    broken: images.filter(i => !i.naturalWidth).length, width: innerWidth, scroll: document.documentElement.scrollWidth,
    wide: [...document.querySelectorAll('main *')].filter(e => edge(e).right > innerWidth + 1 && !e.closest('.scroll'))
      .map(e => e.className),
    boxes: tables.every(t => edge(t).right <= innerWidth), held: tables.every(t => edge(t.querySelector('tbody th')).left >= 0),
    heads: [...document.querySelectorAll('.study thead th')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent),
  };
  document.querySelector('details').open = true;
  seen.unfolded = document.documentElement.scrollWidth;
  document.querySelector('#kernels a[data-full]').click();
  seen.label = document.querySelector('dialog p').textContent;
  return seen;
}
</script>"""


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--no-first-run", f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=20000",
        "--window-size=1300,1000", "--dump-dom", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_browser(width: int, tmp_path: Path) -> None:
    grey = Image.new("RGB", (60, 40), "grey")
    side = Side(f"{'x' * 80}.png", grey, grey, {name: (grey, (1, 2, 3)) for name in NAMES})
    page = write_page(tmp_path, study(), {"prompts": maps(5), "scratch": maps(7)}, [side] * 2)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    (tmp_path / "probed.html").write_text(text.replace("</body>", f"{PROBE}</body>"))
    (tmp_path / "frame.html").write_text(FRAME % width)
    done = browse(tmp_path / "frame.html")
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, f"the probe did not finish\n{done.stderr[-2000:]}"
    seen = json.loads(html.unescape(found[1]))
    assert "error" not in seen, seen["error"]
    assert (seen["width"], seen["images"], seen["broken"], seen["wide"], seen["heads"]) == (
        width,
        12 + 2 * 7,
        0,
        [],
        [],
    )
    assert seen["scroll"] <= width and seen["unfolded"] <= width and seen["boxes"] and seen["held"] and seen["folded"]
    assert seen["tip"].startswith("epoch 40\nfrom scratch  ") and "\nprompts, cosine assignment  " in seen["tip"]
    assert seen["label"].startswith("1 / 5  prompts, cosine assignment, kernel ")


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_the_console_stays_empty(tmp_path: Path) -> None:
    page = write_page(tmp_path, study(), {"prompts": maps(3)})
    done = browse(page, "--enable-logging=stderr", "--log-level=0")
    assert 'class="js"' in done.stdout and "CONSOLE" not in done.stderr
    (tmp_path / "bad.html").write_text(page.read_text().replace("</body>", "<script>1</script></body>"))
    assert "CONSOLE" in browse(tmp_path / "bad.html", "--enable-logging=stderr", "--log-level=0").stderr
