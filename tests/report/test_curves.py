"""Curves and bars: every number is drawn at its place."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from sprompt.report.curves import Line, chart, curves, histogram, metric_bars, number, smoothed
from sprompt.report.runs import Run, read_runs


def run(name: str = "a", steps: int = 10, **values: float) -> Run:
    log = [
        {"step": s, "loss": 1.0 / s, "seconds": 0.1, "monitor/cosine": 0.5, "head/bce": 2.0}
        for s in range(1, steps + 1)
    ]
    return Run(name, log, values, {}, {})


def test_smoothing_is_a_window_in_the_middle_and_keeps_lines_and_gaps() -> None:
    line = [(float(x), 3.0 * x + 1) for x in range(200)]
    assert [y for _, y in smoothed(line)][10:-10] == pytest.approx([y for _, y in line][10:-10])
    rng = np.random.default_rng(0)
    noise = [(float(x), float(y)) for x, y in enumerate(rng.normal(5, 1, 400))]
    mean = np.array([y for _, y in smoothed(noise)], float)
    half = 10
    assert mean[200] == pytest.approx(np.mean([y for _, y in noise[200 - half : 200 + half + 1]]))
    assert mean.std() < 0.35 and abs(mean.mean() - 5) < 0.1
    holes = [(x, None if 50 <= x < 60 else 7.0) for x in range(100)]
    assert [y for _, y in smoothed(holes)] == [None if 50 <= x < 60 else 7.0 for x in range(100)]
    assert smoothed([]) == [] and smoothed([(0, 1.0)]) == [(0, 1.0)]


def test_paths_go_through_the_values() -> None:
    html = chart("loss", [Line("a", [(0, 0.0), (50, 10.0), (100, None), (150, 5.0), (200, 5.0)], 0)])
    (path,) = re.findall(r'd="([^"]+)" class="mean r0"', html)
    high = 10.4  # a little above the highest
    assert (
        path
        == f"M0.0 1000.0L250.0 {1000 * (1 - 10 / high):.1f}M750.0 {1000 * (1 - 5 / high):.1f}L1000.0 {1000 * (1 - 5 / high):.1f}"
    )
    ticks = re.findall(r'class="y" style="bottom:([\d.]+)%">([^<]+)<', html)
    assert [(float(t) / 100 * high) for t, _ in ticks] == pytest.approx([float(label) for _, label in ticks], abs=0.01)
    assert "from 0 to 5" in html and 'class="raw' not in html


def test_noisy_lines_are_drawn_twice_and_spikes_do_not_squeeze_them() -> None:
    values = [(x, 1 + 0.1 * math.sin(x)) for x in range(200)]
    values[77] = (77, 1e6)
    html = chart("loss", [Line("a", values, 1)])
    assert html.count('class="raw r1"') == html.count('class="mean r1"') == 1
    top = max(float(label) for label in re.findall(r'class="y"[^>]*>([^<]+)<', html))
    assert top < 2


def test_a_band_lies_around_its_line_and_the_axis_holds_it() -> None:
    html = chart("AP", [Line("a", [(4, 5.0), (8, 5.0)], 1, [(4, 0.0, 10.0), (8, 5.0, 20.0)])], unit="epoch")
    (path,) = re.findall(r'd="([^"]+)" class="band r1"', html)
    y = [
        f"{1000 * (1 - v / 20.8):.1f}" for v in (0.0, 5.0, 20.0, 10.0)
    ]  # along the lower edge and back along the upper edge
    assert path == f"M0.0 {y[0]}L1000.0 {y[1]}L1000.0 {y[2]}L0.0 {y[3]}Z"
    assert 'aria-label="AP over epochs. ' in html and 'data-unit="epoch"' in html
    assert html.index("band r1") < html.index("mean r1")  # the mean is drawn over its band
    assert "band" not in chart("AP", [Line("a", [(4, 5.0), (8, 5.0)], 1)])


def test_ticks_of_short_curves_are_whole_epochs() -> None:
    for last, wanted in ((1, ["1", "2"]), (2, ["1", "2"]), (3, ["1", "2", "3"]), (7, ["2", "4", "6"])):
        html = chart("AP", [Line("a", [(1, 5.0), (last, 6.0)], 1)], unit="epoch")
        assert re.findall(r'class="x[^>]*>([^<]*)<', html) == wanted


@pytest.mark.parametrize(
    "points",
    [[(5, 1.0)], [(5, 0.0), (6, 0.0)], [(1, -3.0), (2, -1.0)], [(1, 1e-30), (9, 2e-30)], [(1, 1e30), (2, 1e31)]],
)
def test_odd_ranges(points: list[tuple[float, float]]) -> None:
    html = chart("x", [Line("a", points, 0)])
    assert "nan" not in html and "inf" not in html and '<path d="M0.0' in html


def test_lines_without_a_finite_value_say_so() -> None:
    assert "no finite value" in chart("loss", [Line("a", [(1, None)], 0)])


def test_all_terms_come_up_once_in_groups() -> None:
    html = curves([run("a"), run("b")])
    assert re.findall(r"<h3>([^<]+)", html) == ["head", "Monitors", "Speed and learning rate"]
    assert re.findall(r"<b>([^<]+)", html) == ["loss", "bce", "cosine", "seconds"]
    assert html.count("chart large") == 1 and html.index(">loss<") < html.index(">bce<")
    hover = json.loads(re.findall(r'data-lines="([^"]+)"', html)[0].replace("&quot;", '"'))
    assert [line["name"] for line in hover] == ["a", "b"] and hover[0]["points"][1] == [2, 0.5]


def test_bars_are_as_long_as_their_numbers() -> None:
    html = metric_bars([run("a", AP=0.3, AP50=0.6, pictures=5.0, AR=-1.0), run("b", AP=0.15)])
    assert [float(w) for w in re.findall(r"width:([\d.]+)%", html)] == pytest.approx([50, 25, 100])
    assert re.findall(r"<h3>([^<]+)", html) == ["AP", "AP50"]
    assert metric_bars([run("a", seconds=3.0)]) == ""


def test_histograms_count() -> None:
    html = histogram([0, 0.1, 0.9, 1.0, 2.0], 0, 1, 2, "score")
    assert re.findall(r'title="([^"]+)"', html) == ["0: 2", "0.5: 3"]
    assert [float(h) for h in re.findall(r"height:([\d.]+)%", html)] == pytest.approx([200 / 3, 100], abs=0.1)
    assert histogram([], 0, 1, 3, "x").count("<span title=") == 3


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 0.25, 12345.6, 1e-5, 2.5e-4, 1e7, -3)] == [
        "0",
        "0.25",
        "12,346",
        "1e-5",
        "2.5e-4",
        "1e7",
        "-3",
    ]


def test_runs_are_read_as_they_were_left(tmp_path: Path) -> None:
    for place in ("x/run", "y/run"):
        (tmp_path / place).mkdir(parents=True)
    lines = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "AP": 0.5}, {"step": 2, "loss": None}]
    (tmp_path / "x/run/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    first, second = read_runs([tmp_path / "x/run", tmp_path / "y/run"])
    assert (first.name, second.name) == ("x/run", "y/run")
    assert first.curve("loss") == [(1, 2.0), (2, None)] and first.curve("AP") == [(2, 0.5)]
    assert second.log == [] and second.problems == []
