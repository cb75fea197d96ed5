"""The command line as users see it: the whole chain at the smallest size, --help, presets, and errors."""

import json
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sprompt import cli
from sprompt.commands import parsing, run_folder
from sprompt.commands.finetune import Finetune
from sprompt.commands.pretrain import Pretrain
from sprompt.commands.propose import Propose
from sprompt.data.synthetic import write_scenes
from sprompt.data.transforms import Augment
from sprompt.models.fastinst import FastInstConfig
from sprompt.models.mask2former import Mask2FormerConfig
from sprompt.models.queryinst import QueryInstConfig
from sprompt.models.registry import MODELS
from sprompt.nn.resnet import ResNet
from sprompt.nn.weights import save_backbone
from sprompt.settings import from_plain

NETWORK = "--model.depth 18 --model.backbone-width 8 --model.channels 16 --model.kernels 8 --model.heads 2 --model.feedforward 32"
SMALL = "--augment.short 64 --augment.long 64 --train.workers 0 --train.batch-size 4 --train.log-steps 1 --cpu True"
TEST = "--test.short 64 --test.long 64 --test.workers 0 --test.batch-size 4"


def sprompt(line: str) -> int:
    return cli.main(shlex.split(line))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scenes and a backbone. `chain` adds the files that the commands make from them."""
    import torch

    folder = tmp_path_factory.mktemp("chain")
    write_scenes(folder / "scenes", 8, seed=0, size=(64, 64))
    torch.manual_seed(0)
    save_backbone(folder / "backbone.safetensors", ResNet(18, width=8))
    return folder


@pytest.fixture(scope="module")
def chain(folder: Path) -> Path:
    scenes, backbone = folder / "scenes", folder / "backbone.safetensors"
    labels = f"images {scenes}/images --data.annotations {scenes}/instances.json".replace(
        "images ", "--data.images ", 1
    )
    assert (
        sprompt(
            f"propose --images {scenes}/images --backbone {backbone} --out {folder}/proposals.json --cpu True --proposals.level C3 "
            "--proposals.short 128 --proposals.long 128 --proposals.min-score 0.3"
        )
        == 0
    )
    assert (
        sprompt(
            f"pretrain --images {scenes}/images --proposals {folder}/proposals.json --backbone {backbone} --out {folder}/pre "
            f"--train.epochs 1 {NETWORK} {SMALL}"
        )
        == 0
    )
    assert (
        sprompt(
            f"finetune {labels} --data.fraction 0.5 {labels.replace('data.', 'val.')} --checkpoint {folder}/pre --out {folder}/fine "
            f"--train.epochs 2 --evaluate-every 1 {SMALL} {TEST}"
        )
        == 0
    )
    return folder


def test_the_chain_leaves_what_it_says(chain: Path) -> None:
    record = json.loads((chain / "proposals.json").read_text())
    assert len(record["images"]) == 8 and record["annotations"]
    for run in ("pre", "fine"):
        assert (chain / run / "model.safetensors").is_file()
        lines = [json.loads(line) for line in (chain / run / "log.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps and steps == sorted(set(steps))
    assert 0 <= json.loads((chain / "fine" / "metrics.json").read_text())["AP"] <= 1
    logged = [json.loads(line) for line in (chain / "fine" / "log.jsonl").read_text().splitlines()]
    assert any("val/AP" in line for line in logged)


def test_a_broken_picture_does_not_end_the_training_of_a_backbone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(folder / "scenes/images", images)
    (images / "photo.jpg").write_bytes(b"cut off")
    line = f"backbone --images {images} --out {tmp_path}/out --cpu True --densecl.depth 18 --densecl.width 4 --densecl.queue 16 "
    assert sprompt(line + "--views.size 32 --train.epochs 1 --train.batch-size 3 --train.workers 0") == 0
    said = capsys.readouterr()
    assert said.err.count(f"left out: {images}/photo.jpg: is not a picture that can be read") == 1
    assert "9 pictures" in said.out and (tmp_path / "out/backbone.safetensors").stat().st_size > 0


def test_evaluation_gives_the_numbers_of_fine_tuning(chain: Path, tmp_path: Path) -> None:
    data = f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json"
    assert sprompt(f"evaluate --checkpoint {chain}/fine {data} --out {tmp_path}/e --cpu True {TEST}") == 0
    own, trained = (json.loads((p / "metrics.json").read_text()) for p in (tmp_path / "e", chain / "fine"))
    assert own == trained
    assert sprompt(f"evaluate --results {tmp_path}/e/predictions.json {data} --out {tmp_path}/r") == 0
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["AP"] == own["AP"]


def test_a_pretrained_model_is_measured_without_classes(chain: Path, tmp_path: Path) -> None:
    data = f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json"
    assert (
        sprompt(f"evaluate --checkpoint {chain}/pre {data} --out {tmp_path}/e --cpu True {TEST} --class-agnostic True")
        == 0
    )
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["class_agnostic"] is True


def test_predictions_and_gallery(chain: Path, tmp_path: Path) -> None:
    assert (
        sprompt(
            f"predict --images {chain}/scenes/images --checkpoint {chain}/fine --out {tmp_path}/p --cpu True {TEST}"
        )
        == 0
    )
    pictures = json.loads((tmp_path / "p" / "pictures.json").read_text())
    results = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert {r["image_id"] for r in results} <= {i["id"] for i in pictures["images"]}
    assert {r["category_id"] for r in results} <= {c["id"] for c in pictures["categories"]}
    assert sprompt(f"view {chain}/pre {chain}/fine --out {tmp_path}/view --limit 3 --cpu True") == 0
    page = (tmp_path / "view" / "index.html").read_text()
    for section in ("proposals", "prompts", "predictions", "curves", "kernels"):
        assert f'id="{section}"' in page


def test_more_masks_than_kernels_are_said(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(
        a["image_id"] for a in json.loads((chain / "scenes" / "instances.json").read_text())["annotations"]
    )
    most = max(counts.values())
    labels = f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json"
    for kernels in (most - 1, most):
        network = NETWORK.replace("kernels 8", f"kernels {kernels}")
        assert sprompt(f"finetune {labels} --out {tmp_path}/{kernels} --train.epochs 1 {network} {SMALL}") == 0
        said = f"{list(counts.values()).count(most)} pictures have more masks, up to {most}, than the model has queries"
        assert (said in capsys.readouterr().out) == (kernels < most)


def test_a_finished_run_started_again_does_nothing_new(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (chain / "pre" / "log.jsonl").read_text(), (chain / "pre" / "model.safetensors").read_bytes()
    assert sprompt(f"pretrain --config {chain}/pre/config.yaml") == 0
    assert before == ((chain / "pre" / "log.jsonl").read_text(), (chain / "pre" / "model.safetensors").read_bytes())


def test_a_run_with_other_settings_is_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sprompt(f"pretrain --config {chain}/pre/config.yaml --train.learning-rate 0.5") == 1
    assert "learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("propose --images {0}/none --backbone {0}/backbone.safetensors", "--images: there is no folder"),
        ("propose --images {0}/scenes/images --backbone {0}/none.pth", "--backbone: there is no file"),
        (
            "propose --images {0}/scenes/images --backbone {0}/backbone.safetensors --shard 4/4",
            "--shard: must be index/count",
        ),
        ("pretrain --images {0} --proposals {0}/none.json --backbone {0}/b.pth", "--proposals: there is no file"),
        ("finetune", "--data.images: must be given"),
        ("finetune --data.images {0}/scenes/images", "--data.annotations: must be given for format coco"),
        (
            "finetune --data.images {0}/scenes/images --data.annotations {0}/backbone.safetensors",
            "backbone.safetensors",
        ),
        ("evaluate --data.images {0} --data.annotations {0}", "--checkpoint: give either a trained model or --results"),
        ("predict --images {0}/scenes/images --checkpoint {0}/scenes", "holds no model.safetensors"),
        ("view --proposals {0}/proposals.json", "--images: must be given"),
        (
            "pretrain --preset huge",
            "--preset: must be one of class-agnostic, class-agnostic-tiny, d1, d3, paper, photographs, segprompt, segprompt-tiny, "
            "study-cpu, study-gpu, tiny, or a file NAME.yaml, got huge",
        ),
        ("pretrain --config {0}/scenes/instances.json", "is not a setting"),
    ],
)
def test_errors_are_one_line(folder: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sprompt(line.format(folder)) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"sprompt {line.split()[0]}: ") and "Traceback" not in error


def test_a_model_of_other_classes_is_refused(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json"
    assert sprompt(f"evaluate --checkpoint {chain}/pre {data} --out {chain}/e") == 1
    assert "got ['object']; --class-agnostic True" in capsys.readouterr().err
    record = json.loads((chain / "scenes" / "instances.json").read_text())
    for category, name in zip(record["categories"], reversed([c["name"] for c in record["categories"]]), strict=True):
        category["name"] = name
    (chain / "renamed.json").write_text(json.dumps(record))
    renamed = data.replace("scenes/instances.json", "renamed.json")
    assert sprompt(f"evaluate --checkpoint {chain}/fine {renamed} --out {chain}/e") == 1
    assert "the order counts" in capsys.readouterr().err
    assert (
        sprompt(f"finetune {renamed} --checkpoint {chain}/fine --reset-classifier False --out {chain}/again {SMALL}")
        == 1
    )
    assert "--reset-classifier: must be True" in capsys.readouterr().err
    line = f"finetune --config {chain}/fine/config.yaml --data.annotations {chain}/renamed.json"
    assert sprompt(line) == 1  # the folder holds a run on other labels
    assert "classes" in capsys.readouterr().err


def test_classes_can_be_pooled_for_any_model(chain: Path, tmp_path: Path) -> None:
    data = f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json"
    assert (
        sprompt(f"evaluate --checkpoint {chain}/fine {data} --out {tmp_path}/e --cpu True {TEST} --class-agnostic True")
        == 0
    )
    assert json.loads((tmp_path / "e" / "metrics.json").read_text())["class_agnostic"] is True


def test_a_refused_start_changes_nothing(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (chain / "fine").iterdir() if path.is_file()}
    data = f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json"
    assert sprompt(f"finetune --config {chain}/fine/config.yaml --train.learning-rate 0.5") == 1
    assert sprompt(f"evaluate --checkpoint {chain}/fine {data} --out {chain}/fine") == 1
    assert "is the folder of a run of finetune" in capsys.readouterr().err
    assert sprompt(f"finetune {data} --checkpoint {chain}/pre --model.kernels 9 --out {chain}/none {SMALL}") == 1
    assert "--model.kernels: is 9, but the model of --checkpoint has 8" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (chain / "fine").iterdir() if path.is_file()}


def test_a_method_and_an_evaluator_by_name(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json"
    pretrain = (
        f"pretrain --method supervised --images {chain}/scenes/images --proposals {chain}/proposals.json "
        f"--backbone {chain}/backbone.safetensors --out {tmp_path}/pseudo --train.epochs 1 {NETWORK} {SMALL}"
    )
    assert sprompt(pretrain) == 0
    config = (tmp_path / "pseudo/config.yaml").read_text()
    assert "method:\n  name: supervised\n" in config and "model:\n  name: knet\n" in config
    capsys.readouterr()
    assert sprompt(f"finetune {data} --method saliency-prompt --out {tmp_path}/f {NETWORK} {SMALL}") == 1
    assert "does not say where the seeds of its masks lay" in capsys.readouterr().err
    assert sprompt(f"finetune {data} --method magic --out {tmp_path}/f") == 1
    assert (
        "--method: must be one of saliency-prompt, segprompt, supervised, or package.module:Class"
        in capsys.readouterr().err
    )
    line = f"evaluate --checkpoint {chain}/fine {data} --out {tmp_path}/e --cpu True {TEST}"
    assert sprompt(f"{line} --evaluator coco --evaluator.max-results 3") == 0
    few = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert {"AR1", "AR3"} <= few.keys() and "AR100" not in few
    assert "AR3" in capsys.readouterr().out


def test_recall_without_classes(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with one class is measured on labels of several classes, and its results file has the same metrics."""
    data = (
        f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json --evaluator open-world"
    )
    (tmp_path / "groups.json").write_text('{"one": [1], "others": [2, 3]}')
    groups = f"--evaluator.groups {tmp_path}/groups.json"
    assert sprompt(f"evaluate --checkpoint {chain}/pre {data} {groups} --out {tmp_path}/e --cpu True {TEST}") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("AR100", "hit rate", "all", "one", "others", "merged"))
    metrics = json.loads((tmp_path / "e/metrics.json").read_text())
    assert metrics["pictures"] == 8 and metrics["groups"].keys() == {"one", "others"} and metrics["AR100"] >= 0
    assert metrics["class_agnostic"] is True, "for sprompt view"
    assert {r["category_id"] for r in json.loads((tmp_path / "e/predictions.json").read_text())} <= {1}
    again = f"evaluate --results {tmp_path}/e/predictions.json {data} {groups} --out {tmp_path}/again"
    assert sprompt(again) == 0
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == metrics
    assert sprompt(f"{again} --class-agnostic True") == 1
    assert "--class-agnostic: must be left out" in capsys.readouterr().err


def test_a_folder_of_an_earlier_version_is_refused_in_a_sentence(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chain / "fine", tmp_path / "old")
    config = (tmp_path / "old/config.yaml").read_text()
    (tmp_path / "old/config.yaml").write_text(config.replace("checkpoint:", "init:").replace("  name: knet\n", ""))
    assert sprompt(f"view {tmp_path}/old --out {tmp_path}/view") == 1
    assert "is not of this version of sprompt (init: is not a setting" in capsys.readouterr().err


def test_a_second_run_in_the_folder_of_a_running_one_is_refused(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json"
    with run_folder.begun(tmp_path / "busy", parsing.parse("finetune", shlex.split(data))):
        assert sprompt(f"finetune {data} --out {tmp_path}/busy {NETWORK} {SMALL}") == 1
    assert "another run writes into" in capsys.readouterr().err
    assert not (tmp_path / "busy/config.yaml").exists()
    with run_folder.begun(tmp_path / "busy", parsing.parse("finetune", shlex.split(data))):
        pass  # the run before has released the lock


def test_the_size_of_pictures_comes_from_the_model(chain: Path, tmp_path: Path) -> None:
    data = f"--data.images {chain}/scenes/images --data.annotations {chain}/scenes/instances.json"
    assert sprompt(f"evaluate --checkpoint {chain}/fine {data} --out {tmp_path}/e --cpu True --test.workers 0") == 0
    own, trained = (json.loads((p / "metrics.json").read_text()) for p in (tmp_path / "e", chain / "fine"))
    assert own["AP"] == pytest.approx(trained["AP"], abs=1e-3) and own["results"] == trained["results"]


def test_overview_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert sprompt("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert sprompt("--version") == 0 and capsys.readouterr().out.strip()
    assert sprompt("pretain") == 2 and "pretain is not a command" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "env"])
def test_help_names_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert ("--out" in text or name == "check") and "--preset" in text


@pytest.mark.parametrize(("model", "preset"), [(m, p) for m in MODELS.names() for p in parsing.preset_names(m)])
def test_presets_are_settings(model: str, preset: str) -> None:
    for name, plain in parsing.preset(preset, model).items():
        settings = from_plain(parsing.command(name), plain, parsing.required_missing(parsing.command(name)))
        if "model" in plain and name != "study":
            assert MODELS.name(type(settings.model)) == model


def test_the_paper_preset_is_the_default_and_the_paper() -> None:
    """The preset has the values of the paper's recipe, and a user without a preset gets the same values."""
    given = shlex.split("pretrain --preset paper --images a --proposals b --backbone c")
    paper = parsing.parse(given[0], given[1:])
    assert paper == Pretrain(Path("a"), Path("b"), Path("c"))
    assert (paper.train.epochs, paper.train.batch_size, paper.train.drops, paper.train.clip) == (12, 96, (8, 11), 1.0)
    assert (paper.train.learning_rate, paper.train.weight_decay, paper.train.warmup_steps) == (1e-4, 0.05, 1000)
    assert (paper.model.kernels, paper.model.stages, paper.method.dropout) == (100, 3, 0.1)
    assert (paper.model.loss_class, paper.model.loss_dice, paper.model.loss_mask, paper.method.kernel_weight) == (
        2,
        4,
        1,
        1,
    )
    fine = parsing.parse("finetune", ["--preset", "paper"])
    assert (fine.train, fine.model, fine.augment) == (Finetune().train, Finetune().model, Finetune().augment)
    assert (fine.train.epochs, fine.train.drops, fine.test.threshold) == (48, (36, 44), 0.3)
    propose = shlex.split("--preset paper --images a --backbone c")
    assert parsing.parse("propose", propose) == Propose(Path("a"), Path("c"))


def test_the_paper_preset_of_mask2former() -> None:
    """Values typed from the official recipe and the public code. Its network is the default one."""
    common = ["--preset", "paper", "--model", "mask2former"]
    before = parsing.parse("pretrain", [*common, *shlex.split("--images a --proposals b --backbone c")])
    after = parsing.parse("finetune", common)
    for settings, epochs, drops, batch, flip in ((before, 12, (8, 11), 32, 0.1), (after, 24, (18, 22), 16, 0.5)):
        train, augment = settings.train, settings.augment
        assert (train.epochs, train.drops, train.batch_size, train.drop_factor) == (epochs, drops, batch, 0.1)
        assert (train.optimiser, train.learning_rate, train.weight_decay, train.clip) == ("adamw", 1e-4, 0.05, 0.01)
        assert (train.backbone_lr_factor, train.warmup_steps, train.schedule) == (None, 0, "step")
        assert augment == Augment(1024, 1024, flip=flip, scale=(0.1, 2.0), crop=(1024, 1024))
        assert settings.model == Mask2FormerConfig(frozen_stages=-1)
    assert before.method.freeze_backbone and before.method.dropout == 0.05
    assert before.method.kernel_weight == pytest.approx(1 / before.model.decoder_layers, rel=2e-3)
    assert (after.test.short, after.test.long, after.test.threshold) == (800, 1333, 0.5)


@pytest.mark.parametrize(("preset", "layers", "short", "long"), [("d1", 1, 576, 777), ("d3", 3, 640, 853)])
def test_the_presets_of_fastinst(preset: str, layers: int, short: int, long: int) -> None:
    """Values typed from the recipe of the release. Its network is the default one."""
    common = ["--preset", preset, "--model", "fastinst"]
    before = parsing.parse("pretrain", [*common, *shlex.split("--images a --proposals b --backbone c")])
    after = parsing.parse("finetune", common)
    for settings in (before, after):
        train = settings.train
        assert (train.optimiser, train.learning_rate, train.weight_decay, train.clip) == ("adamw", 1e-4, 0.05, None)
        assert (train.backbone_lr_factor, train.warmup_steps, train.batch_size, train.drop_factor) == (None, 0, 16, 0.1)
        assert settings.augment == Augment((416, 640), 853, flip=0.5)
        assert settings.model == FastInstConfig(frozen_stages=-1, decoder_layers=layers)
    assert (after.train.epochs, after.train.drops, after.train.seed) == (50, (44, 48), 42)
    assert round(368_750 * 16 / 118_000) == 50  # COCO's training pictures: 118 thousand
    assert before.method.kernel_weight == pytest.approx(1 / layers, rel=2e-3)
    assert (after.test.short, after.test.long, after.test.threshold) == (short, long, 0.5)


def test_the_paper_preset_of_queryinst() -> None:
    """Values typed from the recipe. Its network is the default one, and its backbone is trained."""
    common = ["--preset", "paper", "--model", "queryinst"]
    before = parsing.parse("pretrain", [*common, *shlex.split("--images a --proposals b --backbone c")])
    after = parsing.parse("finetune", common)
    for settings, epochs, drops, warmup in ((before, 12, (8, 11), 1000), (after, 24 * 8, (18 * 8, 22 * 8), 0)):
        train = settings.train
        assert (train.epochs, train.drops, train.warmup_steps, train.drop_factor) == (epochs, drops, warmup, 0.1)
        assert (train.optimiser, train.learning_rate, train.weight_decay, train.clip) == ("adamw", 1e-4, 1e-4, 0.1)
        assert (train.backbone_lr_factor, train.batch_size) == (None, 16)
        assert settings.model == QueryInstConfig()
    assert before.augment == Augment(800, 1333, flip=0.1)
    assert not before.method.freeze_backbone and before.method.dropout == 0.05
    assert before.method.kernel_weight == pytest.approx(1 / before.model.stages, rel=3e-3)


def test_later_settings_come_on_top(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {epochs: 3, batch_size: 4}\n")
    line = f"--preset tiny --config {tmp_path}/c.yaml --train.epochs 5 --images a --proposals b --backbone c"
    settings = parsing.parse("pretrain", shlex.split(line))
    assert (settings.train.epochs, settings.train.batch_size, settings.model.depth) == (5, 4, 18)
