"""The commands of a study's cells."""

from dataclasses import replace
from pathlib import Path

import pytest

from sprompt.commands.parsing import parse
from sprompt.commands.study import lengthened
from sprompt.models.fastinst import FastInstConfig
from sprompt.models.mask2former import Mask2FormerConfig
from sprompt.models.registry import ModelConfig
from sprompt.study.plan import Cell, Inputs, Pretraining
from sprompt.study.variants import VARIANTS

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


@pytest.mark.parametrize(("name", "config"), [("mask2former", Mask2FormerConfig), ("fastinst", FastInstConfig)])
def test_another_model_has_its_own_preset_and_only_its_own_variants(name: str, config: type[ModelConfig]) -> None:
    """Every command names the model, so that the preset of that name is taken from the folder of the model."""
    study = parse("study", ["--preset", "study-cpu", "--model", name])
    assert (study.model, study.settings, study.likeness) == (name, "study-cpu", 0.8)
    given = replace(GIVEN, model=("--model", name))
    pretraining = Pretraining(0, "prompts")
    commands = [*pretraining.commands(Path("out"), given), Cell(pretraining, 0.05).command(Path("out"), given, 5)]
    for command, *options in commands:
        model = parse(command, options).model
        assert isinstance(model, config)
        assert model.queries == 20 or command == "evaluate"  # that takes the sizes from the checkpoint
    assert study._variants(known=True) == [name for name in VARIANTS if name not in ("site-late", "site-proposal")]


def test_without_a_model_the_commands_are_those_of_earlier_studies() -> None:
    """A finished cell is known again by its command."""
    assert parse("study", ["--preset", "study-cpu"]).model is None
    assert all("--model" not in command for command in Pretraining(0, "prompts").commands(Path("out"), GIVEN))


def _pretrain(given: Inputs) -> tuple[str, list[str]]:
    name, *options = Pretraining(0, "prompts").commands(Path("out"), given)[0]
    return name, options
