"""`sprompt check`, and what `sprompt finetune` checks before its first step."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from sprompt import cli
from sprompt.data.synthetic import write_scenes

NETWORK = "--model.depth 18 --model.backbone-width 8 --model.channels 16 --model.kernels 8 --model.heads 2 --model.feedforward 32"
SMALL = "--augment.short 64 --augment.long 64 --train.workers 0 --train.batch-size 4 --cpu True"


def sprompt(line: str) -> int:
    return cli.main(shlex.split(line))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "data", 6, seed=0, size=(64, 64))
    write_scenes(tmp_path / "val", 3, seed=1, size=(64, 64))
    return tmp_path


def named(folder: Path, *parts: str) -> str:
    return " ".join(f"--{p}.images {folder}/{p}/images --{p}.annotations {folder}/{p}/instances.json" for p in parts)


def break_a_mask(folder: Path, part: str) -> int:
    """Gives the first annotation of a part a polygon of words; its id."""
    file = folder / part / "instances.json"
    record = json.loads(file.read_text())
    record["annotations"][0] |= {"segmentation": [[0, 0, 5, 0, "x", 5]], "area": 100}
    file.write_text(json.dumps(record))
    return int(record["annotations"][0]["id"])


def test_good_pictures_and_the_time_of_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sprompt(f"check {named(folder, 'data', 'val')} --preset tiny {NETWORK} {SMALL} --train.epochs 50") == 0
    said = capsys.readouterr()
    assert "data: 6 pictures" in said.out and "val: 3 pictures" in said.out and "│ ring " in said.out
    assert "s a step on" in said.out and "for all 100 steps (50 epochs of 6 pictures)" in said.out  # 2 steps an epoch
    assert "peak memory of this process" in said.out
    assert said.out.rstrip().endswith("nothing would stop or spoil training")
    assert "check data: 6/6" in said.err
    assert not list(folder.rglob("*.jsonl"))


def test_a_preset_gives_the_settings_of_fine_tuning(folder: Path) -> None:
    from sprompt.commands.parsing import parse

    line = f"--preset tiny {named(folder, 'data')}"
    check, finetune = (parse(name, shlex.split(line)) for name in ("check", "finetune"))
    assert check.preset == "tiny"
    for name in ("data", "val", "cpu", "model", "method", "augment", "train", "keep_pictures"):
        assert getattr(check, name) == getattr(finetune, name)
    plain, finetune = parse("check", []), parse("finetune", [])
    assert plain.preset is None and (plain.train, plain.augment) == (finetune.train, finetune.augment)


def test_the_measured_steps_are_those_of_the_method(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"check {named(folder, 'data')} --model mask2former --preset segprompt-tiny {SMALL} --method.copies 21"
    assert sprompt(line) == 1
    assert "--method.copies: must be at most the model's 20 queries, got 21" in capsys.readouterr().err


def test_a_backbone_of_random_weights_is_not_frozen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"finetune {named(folder, 'data')} --model mask2former --preset segprompt-tiny {SMALL} --train.max-steps 1 --out {folder}/out"
    assert sprompt(line) == 1
    assert "--checkpoint: must be given, or --backbone, if --model.frozen-stages is 4" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_groups_of_categories_are_read_before_the_first_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classes of --val may be others, since open-world recall does not look at those of the results."""
    labels = json.loads((folder / "val/instances.json").read_text())
    labels["categories"].append({"id": 70, "name": "a further one"})
    (folder / "val/instances.json").write_text(json.dumps(labels))
    (folder / "groups.json").write_text('{"unseen": [71]}')
    line = f"finetune {named(folder, 'data', 'val')} --preset tiny {NETWORK} {SMALL} --out {folder}/out --evaluator open-world "
    for groups, message in (
        ("nowhere.json", "nowhere.json: no such file"),
        ("groups.json", "group unseen must have categories of the annotations"),
    ):
        assert sprompt(f"{line} --evaluator.groups {folder}/{groups}") == 1
        assert message in capsys.readouterr().err
    assert sprompt(line.replace("open-world", "coco")) == 1
    assert "--val: must have the classes of --data" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_names_of_classes_are_not_markup(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("data", "val"):
        file = folder / part / "instances.json"
        record = json.loads(file.read_text())
        record["categories"][0]["name"] = "[/b]disc"
        file.write_text(json.dumps(record))
    assert sprompt(f"check {named(folder, 'data', 'val')}") == 0
    assert sprompt(f"split --annotations {folder}/data/instances.json --out {folder}/split") == 0
    assert capsys.readouterr().out.count("│ [/b]disc ") == 2


def test_many_classes_are_a_short_table(capsys: pytest.CaptureFixture[str]) -> None:
    from sprompt.commands.check import _show

    _show({"data": {f"class {i}": (i, 2 * i) for i in range(40)}})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 30 and "… 11 more" in rows[15] and rows[0].startswith("│ class 39") and "class 0 " in rows[29]


def test_findings_and_the_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = break_a_mask(folder, "data")
    (folder / "val/images/000001.png").write_bytes(b"cut off")
    shutil.copy(folder / "data/images/000002.png", folder / "val/images/000002.png")
    assert sprompt(f"check {named(folder, 'data', 'val')} --preset tiny {NETWORK} {SMALL} --model.kernels 2") == 1
    said = capsys.readouterr().out
    assert f"annotation {broken}: polygons must be" in said
    assert "val/images/000001.png: is not a picture" in said
    assert "! pictures of val with the content of a picture of data, so that the AP will be too high: 1" in said
    assert "than the model has queries, 2," in said and "is not measured" in said and "s a step" not in said
    assert said.rstrip().endswith("findings that would stop or spoil training (marked with !): 3")


def test_a_file_that_is_refused_does_not_hide_the_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data/images/000003.png").unlink()
    (folder / "val/images/000001.png").write_bytes(b"cut off")
    assert sprompt(f"check {named(folder, 'data', 'val')}") == 1
    said = capsys.readouterr().out
    assert "1 of 6 are missing: 000003.png" in said and "000001.png: is not a picture" in said


def test_pictures_without_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data/images/000003.png").write_bytes(b"cut off")
    assert sprompt(f"check --images {folder}/data/images") == 0  # training without labels leaves it out
    said = capsys.readouterr().out
    assert "6 pictures" in said and "000003.png: is not a picture" in said and "shorter side: 64 to 64" in said
    for file in (folder / "data/images").iterdir():
        file.write_bytes(b"")
    assert sprompt(f"check --images {folder}/data/images") == 1
    assert sprompt("check") == 1 and "needs --data.images" in capsys.readouterr().err
    assert sprompt(f"check --images {folder} {named(folder, 'data')}") == 1


@pytest.mark.parametrize("what", ["mask", "picture"])
def test_fine_tuning_refuses_a_broken_val_before_the_first_step(
    folder: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"finetune {named(folder, 'data', 'val')} --out {folder}/run --train.epochs 1 {NETWORK} {SMALL} --test.workers 0"
    broken = break_a_mask(folder, "val") if what == "mask" else 0
    if what == "picture":
        whole = (folder / "val/images/000001.png").read_bytes()
        (folder / "val/images/000001.png").write_bytes(whole[:200])  # the header is whole
    assert sprompt(line) == 1
    said = capsys.readouterr().err
    assert "--val: every picture and mask must be readable, got 1 of" in said
    assert (f"annotation {broken}: polygons" if what == "mask" else "000001.png: is a broken picture") in said
    assert not (folder / "run").exists()


def test_a_run_that_goes_on_does_not_check_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"finetune {named(folder, 'data', 'val')} --out {folder}/run {NETWORK} {SMALL} --test.workers 0 --train.epochs"
    )
    assert sprompt(f"{line} 1") == 0
    assert "check --val: 3/3" in capsys.readouterr().err
    assert sprompt(f"{line} 2") == 0
    assert "check --val" not in capsys.readouterr().err
