"""The page in a real browser, without a window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sprompt.report.gallery import build

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser", "chrome"))), None)

#: The page runs in a frame, since windows cannot be as narrow as a phone. Its message is stored in an attribute.
FRAME = """<!doctype html><iframe src="probed.html" style="border:0;width:%dpx;height:900px"></iframe>
<script>addEventListener('message', e => document.documentElement.setAttribute('data-seen', JSON.stringify(e.data)))</script>"""

#: Waits for the pictures, uses the page, and reports its state.
PROBE = """
<script>
addEventListener('load', () => look().catch(e => ({error: String(e)})).then(seen => parent.postMessage(seen, '*')));
async function look() {
  const images = [...document.images];
  images.forEach(i => { i.loading = 'eager'; });
  for (let n = 0; n < 200 && !images.every(i => i.complete); n++) await new Promise(r => setTimeout(r, 50));
  const seen = {
    images: images.length, broken: images.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
    width: innerWidth, scroll: document.documentElement.scrollWidth, js: document.documentElement.className,
    wide: [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
      && !e.closest('.scroll')).map(e => e.className),
  };
  seen.bars = [...document.querySelectorAll('#metrics .bar')].map(e => e.getBoundingClientRect().width);
  document.querySelector('[data-kind=false]').click();
  seen.filtered = [...document.querySelectorAll('#compared figure')].map(f => f.hidden);
  document.querySelector('[data-kind=all]').click();
  const link = document.querySelector('#predictions a[data-full]');
  link.click();
  const box = document.querySelector('dialog'), stage = () => [...box.querySelectorAll('.stage img')].map(i => i.getAttribute('src'));
  seen.open = box.open; seen.stage = stage(); seen.label = box.querySelector('p').textContent;
  const key = k => box.dispatchEvent(new KeyboardEvent('keydown', {key: k, bubbles: true}));
  key('m'); seen.plain = stage(); key('ArrowRight'); seen.next = box.querySelector('p').textContent;
  key('ArrowLeft'); key('ArrowLeft'); seen.last = box.querySelector('p').textContent;
  box.querySelector('[data-act=close]').click(); seen.closed = !box.open;
  const plot = document.querySelector('.plot[data-lines]'), r = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent('pointermove', {clientX: r.right, clientY: r.top + 5}));
  seen.tip = plot.querySelector('.tip').textContent;
  return seen;
}
</script>
"""


def look(page: Path, width: int) -> dict[str, Any]:
    """The report of the probe from a page of this width."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    (page.parent / "probed.html").write_text(text.replace("</body>", f"{PROBE}</body>"))
    (page.parent / "frame.html").write_text(FRAME % width)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--no-first-run", f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=20000",
        "--window-size=1300,1000", "--dump-dom", (page.parent / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, f"the probe did not finish\n{done.stderr[-2000:]}"
    seen = json.loads(html.unescape(found[1]))
    assert "error" not in seen, seen["error"]
    return seen  # type: ignore[no-any-return]  # JSON is Any


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_works_in_a_browser(width: int, disk: Any, tmp_path: Path) -> None:
    (disk.runs[0] / "metrics.json").write_text(json.dumps({"AP": 0.0, "AP50": 0.35}))
    page = build(
        tmp_path / "site", proposals=(disk.images, disk.proposals), runs=disk.runs, prompts=disk.matches,
        predictions=(disk.images, disk.labels, disk.predictions), activation=torch.rand(9, 20, 20),
        title="A rather long title of a gallery_with_words_that_do_not_break_and_go_on",
    )  # fmt: skip
    seen = look(page, width)
    assert seen["width"] == width and seen["js"] == "js"
    assert seen["images"] == 2 + 1 + 3 * 2 + 9 and seen["broken"] == []
    assert seen["scroll"] <= width and seen["wide"] == []
    assert seen["bars"][0] == 0 and len(seen["bars"]) == 3 and min(seen["bars"][1:]) > 30
    assert seen["filtered"] == [False, True, True]  # only p1 has a false prediction
    assert seen["open"] and seen["closed"] and seen["label"] == "1 / 3  p1.png"
    assert seen["stage"] == ["pictures/predictions-000.jpg", "pictures/labels-000.jpg"]
    assert seen["plain"] == ["pictures/predictions-000-plain.jpg"]
    assert seen["next"] == "2 / 3  p2.png" and seen["last"] == "3 / 3  p3.png"
    assert seen["tip"].startswith("step 60\nrun0  ") and "\nrun1  " in seen["tip"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
def test_the_policy_lets_the_pages_own_script_run_and_no_other(disk: Any, tmp_path: Path) -> None:
    page = build(tmp_path / "site", proposals=(disk.images, disk.proposals))
    text = page.read_text()
    assert text.count("<script>") == 1
    evil = "<script>document.documentElement.setAttribute('data-evil', '1')</script></body>"
    (page.parent / "evil.html").write_text(text.replace("</body>", evil))
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (page.parent / "evil.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    assert 'class="js"' in done.stdout and 'data-evil="1"' not in done.stdout
