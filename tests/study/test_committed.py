"""The studies in docs/study: their pages agree with their results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sprompt.study.tables import markdown
from sprompt.study.variants import QUESTIONS, VARIANTS

DOCS = Path(__file__).parents[2] / "docs"
STUDIES = sorted(path.parent for path in DOCS.glob("study/*/results.json"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_tables_are_those_of_the_results(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert (folder / "tables.md").read_text() == markdown(results)
    assert {cell["variant"] for cell in results["cells"]} <= set(VARIANTS) and not results["failed"]
    assert all((folder / name).is_file() for name in ("curves.png", "kernels.png"))
    # predictions are committed for scenes only: photographs belong to others
    assert (folder / "predictions.jpg").is_file() == (results["study"]["images"] is None)


def test_the_page_names_every_claim_and_links_to_what_is_there() -> None:
    page = (DOCS / "study.md").read_text()
    assert all(question.claim in page for question in QUESTIONS.values())
    links = re.findall(r"\]\(([^)#]+)", page)
    assert links and all((DOCS / link).exists() for link in links if "://" not in link)
    assert all(f"study/{folder.name}/tables.md" in page for folder in STUDIES)
