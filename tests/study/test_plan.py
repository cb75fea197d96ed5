"""The commands of a study's cells."""

from dataclasses import replace
from pathlib import Path

import pytest

from sprompt.commands.parsing import parse
from sprompt.commands.study import lengthened
from sprompt.study.plan import Inputs, Pretraining

GIVEN = Inputs(
    "study-cpu", Path("unlabelled"), Path("images"), Path("labels.json"), Path("val"), Path("val.json"), Path("backbone"),
    {"saliency": Path("proposals.json")},
)  # fmt: skip


@pytest.mark.parametrize("times", [1, 4])
def test_longer_pretraining_drops_its_rate_as_much_later(times: int) -> None:
    preset = parse(*_pretrain(GIVEN)).train
    longer = parse(*_pretrain(replace(GIVEN, lengthened=tuple(lengthened(GIVEN.settings, times))))).train
    assert preset.drops and longer == replace(
        preset, epochs=times * preset.epochs, drops=tuple(times * drop for drop in preset.drops)
    )


def test_without_drops_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text("pretrain: {train: {epochs: 3, drops: []}}")
    toy = str(tmp_path / "toy.yaml")
    longer = parse(*_pretrain(replace(GIVEN, settings=toy, lengthened=tuple(lengthened(toy, 2))))).train
    assert (longer.epochs, longer.drops) == (6, ())


def _pretrain(given: Inputs) -> tuple[str, list[str]]:
    name, *options = Pretraining(0, "prompts").commands(Path("out"), given)[0]
    return name, options
