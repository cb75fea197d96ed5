"""`sprompt study` from the command line, at the smallest size: its commands, its files, its messages on failures."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sprompt.commands.study import Study
from sprompt.data.synthetic import write_scenes

SETTINGS = """
backbone:
  cpu: true
  densecl: {depth: 18, width: 8, queue: 32, embedding: 16, dense_level: C3}
  views: {size: 32}
  train: {epochs: 1, batch_size: 4, optimiser: adamw, learning_rate: 1.0e-3, workers: 0, warmup_steps: 1}
propose:
  cpu: true
  proposals: {short: 64, long: 64, level: C3, min_score: 0.0, centre: 0.0, max_masks: 4}
pretrain:
  cpu: true
  model: &model {depth: 18, backbone_width: 8, channels: 16, kernels: 20, heads: 2, feedforward: 32, stages: 1}
  augment: &augment {short: 64, long: 64}
  train: &train {epochs: 1, batch_size: 4, learning_rate: 1.0e-3, workers: 0, warmup_steps: 1, drops: [], log_steps: 1}
finetune:
  cpu: true
  model: {<<: *model, frozen_stages: 1}
  augment: *augment
  train: {<<: *train, epochs: 2}
  test: &test {short: 64, long: 64, batch_size: 4, workers: 0}
evaluate:
  cpu: true
  test: *test
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "toy.yaml"
    path.write_text(SETTINGS)
    return path


def start(out: Path, settings: Path, *options: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "sprompt.cli", "study", "--out", str(out), "--settings", str(settings), "--scenes", "8", "8", "4",
        "--scene-size", "64", "--fractions", "0.5", "--evaluate-every", "1", *options,
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(out: Path, settings: Path, *options: str) -> tuple[int, str]:
    process = start(out, settings, *options)
    said, _ = process.communicate(timeout=500)
    return process.returncode, said


WHOLE = ("--variants", "backbone", "shuffled-pseudo", "truth-prompts", "--seeds", "3", "--jobs", "2")


@pytest.fixture(scope="module")
def whole(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "whole"
    status, said = run(out, settings, *WHOLE)
    assert status == 0, said
    return out


def test_every_cell_once_with_its_commands(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert [(c["variant"], c["seed"]) for c in results["cells"]] == [
        ("backbone", 3), ("shuffled-pseudo", 3), ("truth-prompts", 3)
    ] and results["failed"] == []  # fmt: skip
    for cell in results["cells"]:
        assert [epoch for epoch, *_ in cell["curve"]] == [1, 2]
        assert (cell["pretrained"] is None) == (cell["variant"] == "backbone")
        assert ("prompt_ratio" in cell["monitors"]) == (cell["variant"] == "truth-prompts")
    made = json.loads((whole / "pretrain" / "shuffled-pseudo-s3" / "cell.json").read_text())["commands"]
    assert "--method.kernel-weight 0 --method.assign none" in made[0] and "--train.seed 3" in made[0]
    assert "shuffled.json" in made[0]
    made = json.loads((whole / "finetune" / "backbone-50%-s3" / "cell.json").read_text())["commands"]
    assert "--data.fraction 0.5 --data.subset-seed 3" in made[0]


def test_numbers_are_those_of_the_runs(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    for cell in results["cells"]:
        folder = whole / "finetune" / f"{cell['variant']}-50%-s{cell['seed']}"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert cell["metrics"]["AP"] == metrics["AP"] == cell["curve"][-1][1]
        assert cell["metrics"]["pooled"] == metrics["APpooled"] == cell["curve"][-1][2]
    assert (whole / "index.html").exists() and "Table 7" in (whole / "tables.md").read_text()
    assert all((whole / name).read_bytes()[:4] == b"\x89PNG" for name in ("curves.png", "kernels.png"))
    assert (whole / "predictions.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_a_cell_remade_by_its_command_is_the_same(whole: Path, tmp_path: Path) -> None:
    """The command in cell.json, typed into another folder, gives the same numbers."""
    import shlex

    (line,) = json.loads((whole / "finetune" / "truth-prompts-50%-s3" / "cell.json").read_text())["commands"]
    command = shlex.split(line)[1:]
    command[command.index("--out") + 1] = str(tmp_path / "again")
    subprocess.run([sys.executable, "-m", "sprompt.cli", *command], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    again, there = (
        json.loads((folder / "metrics.json").read_text())
        for folder in (tmp_path / "again", whole / "finetune" / "truth-prompts-50%-s3")
    )
    assert again == there


def test_started_again_it_runs_nothing(whole: Path, settings: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("output.txt")}
    status, said = run(whole, settings, *WHOLE)
    assert status == 0, said
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("output.txt")} == before
    assert "min left" not in said  # an estimate from cells that take no time would be wrong


def test_other_settings_in_the_folder_are_refused(whole: Path, settings: Path) -> None:
    """Other settings of the study, and other settings in the preset's file; the commands only name that file."""
    before = (whole / "results.json").read_text()
    status, said = run(whole, settings, *WHOLE, "--evaluate-every", "2")
    assert status == 1 and "was made with other settings" in said.splitlines()[-1]
    text = settings.read_text()
    try:
        settings.write_text(text.replace("epochs: 2", "epochs: 3"))
        status, said = run(whole, settings, *WHOLE)
    finally:
        settings.write_text(text)
    assert status == 1 and "backbone-50%-s3: was made with other settings" in said.splitlines()[-1]
    assert json.loads((whole / "results.json").read_text())["cells"] == json.loads(before)["cells"]


def test_killed_it_goes_on(whole: Path, settings: Path, tmp_path: Path) -> None:
    options = (
        "--variants",
        "backbone",
        "--seeds",
        "0",
        "1",
        "2",
        "--backbone",
        str(whole / "backbone" / "backbone.safetensors"),
    )
    process = start(tmp_path / "study", settings, *options)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "study").glob("finetune/*/cell.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = {path: path.read_text() for path in (tmp_path / "study").glob("finetune/*/cell.json")}
    assert 1 <= len(done) < 3
    status, said = run(tmp_path / "study", settings, *options)
    assert status == 0, said
    assert all(path.read_text() == text for path, text in done.items())
    assert len(json.loads((tmp_path / "study" / "results.json").read_text())["cells"]) == 3


@pytest.mark.parametrize("where", ["backbone", "finetune"])
def test_asked_to_end_it_leaves_no_command_behind(settings: Path, tmp_path: Path, where: str) -> None:
    """In preparation, in cells, and at the start of a command; the file appears just before that start.

    Commands hold the folder's lock.
    """
    variant = "scratch" if where == "finetune" else "backbone"
    process = start(tmp_path, settings, "--variants", variant, "--seeds", "0", "1", "2", "--jobs", "2")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(f"{where}/**/output.txt")) and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_cell_that_fails_is_named_and_the_others_run(settings: Path, tmp_path: Path) -> None:
    """A cell with a hundredth of eight pictures has no picture, so it fails."""
    status, said = run(tmp_path, settings, "--variants", "scratch", "--seeds", "0", "--fractions", "0.01", "0.5")
    assert status == 1 and "1 of 2 cells failed" in said.splitlines()[-1]
    assert "scratch, 1 %, seed 0: failed: " in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert [cell["fraction"] for cell in results["cells"]] == [0.5]
    ((failure),) = results["failed"]
    assert failure["cell"] == "scratch, 1 %, seed 0" and "must be at least one" in failure["why"]
    assert (tmp_path / "finetune" / "scratch-1%-s0" / "output.txt").is_file() and "output.txt" in failure["why"]


def test_a_preparation_that_fails_is_one_line(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    status, said = run(tmp_path, settings, "--variants", "pseudo", "--backbone", str(tmp_path / "broken.safetensors"))
    assert status == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("sprompt study: ") and "broken.safetensors" in said.splitlines()[-1]


def test_pictures_of_ones_own(settings: Path, tmp_path: Path) -> None:
    """With other pictures for pre-training, and without. Without them the training pictures are used, and their masks are
    known."""
    write_scenes(tmp_path / "mine", 10, seed=1, size=(64, 64))
    write_scenes(tmp_path / "more", 8, seed=2, size=(64, 64))
    mine, more = tmp_path / "mine" / "images", str(tmp_path / "more" / "images")
    labels = str(mine.parent / "instances.json")
    given = ("--images", str(mine), "--annotations", labels, "--val-share", "0.4", "--seeds", "0")

    status, said = run(tmp_path / "a", settings, *given, "--unlabelled", more, "--variants", "pseudo")
    assert status == 0, said
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (results["data"]["name"], results["data"]["train"], results["data"]["val"]) == ("mine", 6, 4)
    assert results["proposals"]["saliency"]["precision"] is None
    made = json.loads((tmp_path / "a" / "pretrain" / "pseudo-s0" / "cell.json").read_text())["commands"]
    assert f"--images {more}" in made[0]
    status, said = run(tmp_path / "a", settings, *given, "--unlabelled", more, "--variants", "truth-pseudo")
    assert status == 1 and "needs pictures with known masks; leave out --unlabelled" in said

    status, said = run(tmp_path / "b", settings, *given, "--variants", "truth-pseudo")
    assert status == 0, said
    tested = {record["file_name"] for record in json.loads((tmp_path / "b/data/val.json").read_text())["images"]}
    taken = {path.name for path in (tmp_path / "b" / "data" / "unlabelled").iterdir()}
    assert tested | taken == {path.name for path in mine.iterdir()} and not tested & taken and len(tested) == 4
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert results["proposals"]["truth"]["precision"] == results["proposals"]["truth"]["recall"] == 1.0


def test_settings_for_a_gpu_are_told_of_on_a_cpu(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpuinfo").write_text("flags : avx2\n")
    monkeypatch.setattr("sprompt.machine.CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("study-gpu", str(settings)):
        Study(settings=name)._say_if_slow()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("study-gpu: computes in bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--variants", "cosin"), "--variants: must be some of scratch"),
        (("--seeds", "1", "1"), "--seeds: must be different values"),
        (("--fractions", "5"), "--fractions: must be above 0 and at most 1 (0.05 is 5 %), got [5.0]"),
        (("--jobs", "0"), "--jobs: must be at least 1"),
        (("--images", "."), "--annotations: must be given with --images"),
        (("--model", "mask2forner"), "--model: must be one of knet, mask2former, fastinst, queryinst"),
        (
            ("--model", "mask2former", "--variants", "site-late"),
            "--variants: site-late is not for this model: site: must be one of first, query",
        ),
    ],
)
def test_wrong_options(options: tuple[str, ...], message: str, settings: Path, tmp_path: Path) -> None:
    status, said = run(tmp_path / "out", settings, *options)
    assert status == 1 and message in said
    assert not (tmp_path / "out").exists()
