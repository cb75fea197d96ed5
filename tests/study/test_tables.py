"""Means, differences, verdicts and convergence, computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sprompt.study.compare import compare, comparisons, epoch_reaching, seed_curves
from sprompt.study.tables import (
    comparison_grid,
    convergence,
    grids,
    markdown,
    monitors,
    percent,
    planned,
    pretrained,
    progress,
    proposals,
    summary,
)
from sprompt.study.variants import QUESTIONS, VARIANTS


def cell(variant: str, seed: int, ap: float | None, fraction: float = 0.05, **more: Any) -> dict[str, Any]:
    return {"variant": variant, "fraction": fraction, "seed": seed, "metrics": {"AP": ap}, **more}


def of(**aps: list[float | None]) -> dict[str, Any]:
    """Results with a cell for each AP, seeds 0, 1, 2, …."""
    return {"cells": [cell(v.replace("_", "-"), s, ap) for v, values in aps.items() for s, ap in enumerate(values)]}


# mean 0.31; deviations −0.03, 0.02, 0.01; squares 0.0009 + 0.0004 + 0.0001 = 0.0014; sd √0.0007 = 0.026458
PSEUDO: list[float | None] = [0.28, 0.33, 0.32]
SD = math.sqrt(0.0007)


def test_means_spreads_and_paired_differences() -> None:
    # mean 0.34, deviations ∓0.04, sd √(0.0032 / 2) = 0.04; steps 0.02, 0.01, 0.06: mean 0.03, deviations −0.01, −0.02, 0.03, sd √0.0007
    found = compare("assignment", of(pseudo=PSEUDO, prompts=[0.30, 0.34, 0.38]), 0.05)
    pseudo, prompts = found.rows
    assert (pseudo.name, prompts.name, found.best) == ("pseudo", "prompts", 1)
    base, own, step = pseudo.figures["AP"], prompts.figures["AP"], prompts.difference
    assert base and own and step
    assert (base.mean, base.sd, base.n) == (pytest.approx(0.31), pytest.approx(SD), 3)
    assert (own.mean, own.sd) == (pytest.approx(0.34), pytest.approx(0.04))
    assert (step.mean, step.sd, step.n, prompts.above) == (pytest.approx(0.03), pytest.approx(SD), 3, 3)
    assert pseudo.difference is None and pseudo.verdict == "baseline"
    assert prompts.verdict == "within the spread"  # 0.03 < 0.04, though every seed is above
    grid = comparison_grid(found)
    assert grid.rows[1] == (
        "prompts, cosine assignment", "34.00 ± 4.00", "–", "–", "–", "–", "–", "–", "3", "+3.00 ± 2.65", "3 of 3",
        "within the spread",
    )  # fmt: skip
    assert grid.title == "Assignment of prompts (Table 5), 5 % of the labels"


def test_differences_are_of_the_same_seed_whatever_the_order_of_cells() -> None:
    results = of(pseudo=PSEUDO, prompts=[0.30, 0.30, 0.34])  # steps 0.02, −0.03, 0.02
    results["cells"].reverse()
    row = compare("start", results, 0.05).rows[1]
    assert row.difference and row.difference.mean == pytest.approx(0.01 / 3) and row.above == 2
    # deviations 0.05/3, −0.1/3, 0.05/3 : squares (0.0025 + 0.01 + 0.0025) / 9, over 2
    assert row.difference.sd == pytest.approx(math.sqrt(0.015 / 9 / 2))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.31, 0.35, 0.36], "above by more than the spread"),  # 0.03 > 0.0265, the sd of both
        ([0.303, 0.353, 0.343], "within the spread"),  # 0.023 above in every seed
        ([0.25, 0.30, 0.29], "below by more than the spread"),
        ([0.26, 0.31, 0.30], "within the spread"),
        ([0.20, 0.36, 0.52], "within the spread"),  # 0.05 above, its own sd 0.16
        ([0.90], "one seed only"),
        ([None, None, 0.90], "one seed only"),
        ([None, None, None, 0.9, 0.8], "–"),  # no seed in common
        ([-1.0, float("nan")], "–"),
    ],
)
def test_verdicts(values: list[float | None], words: str) -> None:
    rows = compare("assignment", of(pseudo=PSEUDO, prompts=values), 0.05).rows
    assert {row.name: row.verdict for row in rows} == {"pseudo": "baseline", "prompts": words}


def test_a_single_seed_has_no_spread_and_what_coco_has_not_is_a_dash() -> None:
    results = of(pseudo=[0.1], prompts=[0.2])
    results["cells"][1]["metrics"].update(APs=-1, APm=None, AP50=0.5)
    row = comparison_grid(compare("start", results, 0.05)).rows[1]
    assert row[1:] == ("20.00", "50.00", "–", "–", "–", "–", "–", "1", "+10.00", "1 of 1", "one seed only")


def test_means_and_verdicts_survive_without_a_baseline() -> None:
    found = compare("start", of(scratch=[0.1, 0.2], prompts=[0.3, 0.4]), 0.05)
    assert [(r.name, r.difference, r.verdict) for r in found.rows] == [("scratch", None, "–"), ("prompts", None, "–")]
    assert found.best == 1
    assert compare("start", of(scratch=[None], prompts=[None]), 0.05).best is None


def test_questions_need_two_variants_and_every_fraction_has_its_table() -> None:
    results = of(pseudo=PSEUDO, random=[0.3], pseudo_kernel=[0.3])
    assert [c.key for c in comparisons(results)] == ["assignment", "supervision"]
    results["cells"] += [cell("pseudo", 0, 0.5, 0.1), cell("random", 0, 0.4, 0.1)]
    assert [(c.key, c.fraction) for c in comparisons(results)] == [
        ("assignment", 0.05), ("assignment", 0.1), ("supervision", 0.05)
    ]  # fmt: skip
    titles = [grid.title for grid in grids(results)]
    assert titles[1] == "Assignment of prompts (Table 5), 10 % of the labels"


def test_questions_that_only_repeat_an_earlier_one_are_left_out() -> None:
    core = of(scratch=[0.1], pseudo=PSEUDO, prompts=PSEUDO)
    assert [c.key for c in comparisons(core)] == [
        "start"
    ]  # all other questions would only repeat its rows pseudo and prompts
    core["cells"] += [cell("pseudo", 0, 0.5, 0.1), cell("prompts", 0, 0.4, 0.1), cell("prompts-kernel", 0, 0.4)]
    # supervision repeats rows of start, but it compares prompts-kernel with prompts
    assert [(c.key, c.fraction) for c in comparisons(core)] == [
        ("start", 0.05), ("start", 0.1), ("supervision", 0.05)
    ]  # fmt: skip


def curve(*aps: float) -> list[list[float]]:
    """Tests every second epoch; pooled AP is twice as high."""
    return [[2.0 * (i + 1), ap, 2 * ap] for i, ap in enumerate(aps)]


CURVES = {
    "cells": [
        cell("scratch", 0, 0.2, curve=curve(0.0, 0.1, 0.15, 0.2)),
        cell("scratch", 1, 0.3, curve=curve(0.0, 0.1, 0.2, 0.3)),  # mean 0, 0.1, 0.175, 0.25
        cell("backbone", 0, 0.3, curve=curve(0.1, 0.2, 0.3, 0.3)),
        cell("backbone", 1, 0.4, curve=curve(0.1, 0.2, 0.3, 0.4)),  # mean 0.1, 0.2, 0.3, 0.35
        cell("prompts", 0, 0.4, curve=curve(0.2, 0.3, 0.38, 0.4)),
        cell("prompts", 1, 0.5, curve=curve(0.1, 0.3, 0.34, 0.5)),  # mean 0.15, 0.3, 0.36, 0.45
        cell("random", 0, 0.1, curve=curve(0.0, 0.0, 0.0, 0.1)),
        cell("pseudo", 0, 0.1),  # no curve
    ]
}


def test_progress() -> None:
    grid = progress(
        {"cells": [cell("pseudo", 0, 0.2, curve=curve(0.1, 0.2)), cell("pseudo", 1, 0.3, curve=curve(0.2, 0.3))]}, 0.05
    )
    assert grid is not None and grid.title == "AP by epoch, 5 % of the labels"
    assert (grid.head, grid.rows) == (("", "2", "4"), [("pseudo-labels", "15.0", "25.0")])
    assert progress({"cells": [cell("pseudo", 0, 0.2)]}, 0.05) is None


def test_convergence() -> None:
    assert epoch_reaching(CURVES, "prompts", 0.25, 0.05) == 4 and epoch_reaching(CURVES, "prompts", 0.35, 0.05) == 6
    assert epoch_reaching(CURVES, "scratch", 0.25, 0.05) == 8 and epoch_reaching(CURVES, "scratch", 0.35, 0.05) is None
    grid = convergence(CURVES, 0.05)
    assert grid and grid.head[-2:] == (
        "reaches the 25.00 of “from scratch”",
        "reaches the 35.00 of “backbone only”",
    )
    assert {row[0]: row[1:] for row in grid.rows} == {
        "from scratch": ("2", "8", "25.00 ± 7.07", "8 (100 %)", "never"),
        "backbone only": ("2", "8", "35.00 ± 7.07", "6 (75 %)", "8 (100 %)"),
        "prompts, random assignment": ("1", "8", "10.00", "never", "never"),
        "prompts, cosine assignment": ("2", "8", "45.00 ± 7.07", "4 (50 %)", "6 (75 %)"),
    }


def test_curves_are_taken_where_all_seeds_were_tested() -> None:
    results = {"cells": [
        cell("scratch", 0, 0.2, curve=[[2, 0.1, 0.2], [4, 0.2, 0.3], [4, 0.25, 0.35], [5, None, None]]),
        cell("scratch", 1, 0.3, curve=[[4, 0.3, 0.5], [5, 0.4, -1]]),
        cell("scratch", 2, 0.3, curve=[]),
    ]}  # fmt: skip
    assert seed_curves(results, "scratch", 0.05) == [(4, [0.25, 0.3])]  # the later of two tests of an epoch counts
    assert seed_curves(results, "scratch", 0.05, pooled=True) == [(4, [0.35, 0.5])]
    assert convergence({"cells": [cell("prompts", 0, 0.1, curve=curve(0.1))]}, 0.05) is None  # nothing to reach


def test_models_before_fine_tuning_count_once_for_all_fractions() -> None:
    found = {"box/AP": 0.06, "AP": 0.05, "AP50": -1.0}
    other = {"box/AP": 0.08, "AP": 0.07, "AP50": -1.0}
    results = {"cells": [
        cell("prompts", 0, 0.1, pretrained=found, monitors={"prompt_ratio": 2.0, "target_cosine": -0.25}),
        cell("prompts", 0, 0.1, 0.1, pretrained=found, monitors={"prompt_ratio": 2.0, "target_cosine": -0.25}),
        cell("prompts", 1, 0.1, 0.1, pretrained=other, monitors={"prompt_ratio": 3.0}),
        cell("scratch", 0, 0.1, pretrained=None, monitors={}),
    ]}  # fmt: skip
    before, ends = pretrained(results), monitors(results)
    assert before and before.head == ("", "box AP", "AP", "seeds")
    assert before.rows == [("prompts, cosine assignment", "7.00 ± 1.41", "6.00 ± 1.41", "2")]
    assert ends and ends.head == ("", "prompt / kernel", "target cosine", "seeds")
    assert ends.rows == [("prompts, cosine assignment", "2.5", "-0.25", "2")]


def test_masks_to_learn_from() -> None:
    grid = proposals({"proposals": {
        "saliency": {"pictures": 1200, "masks": 4320, "precision": 0.6149, "recall": 0.0},
        "truth": {"pictures": 0, "masks": 0, "precision": None},
    }})  # fmt: skip
    assert grid and grid.rows == [
        ("saliency", "1,200", "4,320", "3.6", "61.5 %", "0.0 %"), ("truth", "0", "0", "–", "–", "–")
    ]  # fmt: skip


def test_markdown_is_a_table_with_numbers_to_the_right() -> None:
    text = markdown(of(pseudo=[0.1, 0.2], sequential=[0.3, 0.3]))
    head, sides, first, second = text[text.index("| ") :].strip().split("\n")
    assert head == (
        "|  | AP | AP50 | AP75 | APs | APm | APl | pooled AP | seeds | difference to “pseudo-labels” | seeds above | verdict |"
    )
    assert sides == "| :-- |" + " --: |" * 10 + " :-- |"
    assert first == "| pseudo-labels | 15.00 ± 7.07 | – | – | – | – | – | – | 2 | – | – | baseline |"
    assert second == (
        "| **prompts, sequential assignment** | **30.00 ± 0.00** | **–** | **–** | **–** | **–** | **–** | **–** | **2** "
        "| **+15.00 ± 7.07** | **2 of 2** | **above by more than the spread** |"
    )
    assert "### Assignment of prompts (Table 5), 5 % of the labels" in text


def test_markdown_of_hostile_names_stays_a_table() -> None:
    results = {"proposals": {"<img src=x>|a\n**b**`": {"pictures": 1, "masks": 1}}, "data": {"name": "<b>"}}
    text = markdown(results)
    assert r"| \<img src=x\>\|a \*\*b\*\*\` | 1 | 1 | 1.0 | – | – |" in text and r"\<b\>" in text


@pytest.mark.parametrize(
    "results", [{}, {"cells": []}, {"cells": [], "data": {}, "study": {}, "proposals": {}, "failed": []}]
)
def test_nothing_yet(results: dict[str, Any]) -> None:
    assert grids(results) == [] and "0 cells done" in summary(results) and markdown(results)


def test_the_summary_says_what_is_done() -> None:
    results = of(pseudo=[0.1]) | {
        "data": {"name": "nuclei", "train": 1200, "val": 150, "classes": ["cell"], "fractions": [0.05, 0.1], "seeds": [0, 1, 2],
                 "epochs": 40},
        "study": {"variants": ["pseudo", "prompts"], "longer": 4}, "hours": 1.934, "machine": "a machine", "failed": [{"cell": "x"}],
    }  # fmt: skip
    assert planned(results) == 12 and planned({"study": {"variants": []}}) is None
    assert summary(results) == (
        "Nuclei: pictures 1,200 with labels to draw from, 150 to test on. 1 class: cell. Fine-tuned on 5 % and 10 % of the labels "
        "for 40 epochs. Pre-trained 4 times as long as the settings say. 1 of 12 cells done, 1 failed, in 1.93 hours of processes "
        "on a machine."
    )


def test_shares_are_written_as_people_do() -> None:
    assert [percent(f) for f in (0.05, 0.07, 1.0, 0.005, 1 / 3)] == ["5 %", "7 %", "100 %", "0.5 %", "33.33 %"]


def test_every_question_is_about_known_variants() -> None:
    for question in QUESTIONS.values():
        assert set(question.variants) <= set(VARIANTS) and question.baseline in question.variants
