"""Files of EfficientNet-Lite with the names of two projects, and files that do not fit."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_efficientnet import functional, normalised, package_tensors, timm_tensors
from torch import Tensor

from sprompt.nn.efficientnet import EfficientNet
from sprompt.nn.resnet import ResNet
from sprompt.nn.weights import load_backbone, open_backbone, save_backbone

LITE0 = "efficientnet-lite0"


@pytest.mark.parametrize(("prefix", "key"), [("", None), ("module.", "state_dict")])
@pytest.mark.parametrize(
    ("tensors", "says", "head"),
    [
        (package_tensors, "the names of efficientnet_pytorch", ("_conv_head", "_bn1", "_fc")),
        (timm_tensors, "the names of timm", ("conv_head", "bn2", "classifier")),
    ],
)
def test_two_projects_names(
    tensors: Callable[..., dict[str, Tensor]], says: str, head: tuple[str, ...], prefix: str, key: str | None, tmp_path: Path
) -> None:  # fmt: skip
    """Both names of the same values give the same features, those of the literal implementation."""
    path, pixels = tmp_path / "lite.pth", torch.rand(1, 3, 64, 96) * 255
    held = {prefix + name: tensor for name, tensor in tensors(LITE0, seed=3).items()}
    torch.save(held if key is None else {key: held}, path)
    made = EfficientNet(LITE0).eval()
    said = load_backbone(made, path)
    assert f"288 tensors of {LITE0} from a checkpoint with {says}" in said
    assert all(name in said.split("left out: ")[1] for name in ([prefix + head[0]] if not prefix else [prefix[:-1]]))
    opened = open_backbone(path)
    assert isinstance(opened, EfficientNet) and not opened.training
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    wanted = functional(package_tensors(LITE0, seed=3), pixels, LITE0)
    with torch.no_grad():
        for network in (made, opened):
            for found, want in zip(network(normalised(pixels)), wanted, strict=True):
                torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["efficientnet-lite1", "efficientnet-lite2", "efficientnet-lite4"])
def test_the_file_says_which_network_it_is(name: str, tmp_path: Path) -> None:
    """Lite 1 and 2 have the same blocks and other widths."""
    torch.save(package_tensors(name), tmp_path / "lite.pth")
    assert open_backbone(tmp_path / "lite.pth").name == name
    with pytest.raises(ValueError, match=f"the file holds {name}: --network.backbone {name}$"):
        load_backbone(EfficientNet(LITE0), tmp_path / "lite.pth", ("--network.backbone", "", "", ""))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_own_files(dtype: torch.dtype, tmp_path: Path) -> None:
    made = EfficientNet(LITE0)
    save_backbone(tmp_path / "own.safetensors", made, dtype)
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        assert json.loads(file.metadata()["sprompt"]) == {"backbone": {"name": LITE0}}
    opened = open_backbone(tmp_path / "own.safetensors").state_dict()
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(opened[name], tensor.to(dtype).to(tensor.dtype), rtol=0, atol=0)


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda held: held.pop(name)


@pytest.mark.parametrize(
    ("tensors", "change", "message"),
    [
        (package_tensors, without("_blocks.3._bn0.bias"), "got 1 tensors missing (blocks.2.0.bn1.bias)"),
        (timm_tensors, without("bn1.running_var"), "got 1 tensors missing (bn1.running_var)"),
        (
            package_tensors,  # EfficientNet-B0 has the sizes of Lite 0, and other blocks
            lambda held: held.update({"_blocks.0._se_reduce.weight": torch.zeros(8, 32, 1, 1)}),
            "got 1 too many (_blocks.0._se_reduce.weight); is it the right file?",
        ),
        (
            timm_tensors,
            lambda held: held.update({"blocks.0.0.se.conv_reduce.weight": torch.zeros(8, 32, 1, 1)}),
            "got 1 too many (blocks.0.0.se.conv_reduce.weight); is it the right file?",
        ),
        (
            timm_tensors,
            lambda held: held.update({"conv_stem.weight": torch.zeros(40, 3, 3, 3)}),
            "1 of another shape (conv_stem.weight is (40, 3, 3, 3), must be (32, 3, 3, 3))",
        ),
        (
            package_tensors,
            lambda held: held.update({f"_blocks.{'9' * 5000}._bn0.weight": torch.zeros(96)}),
            "got 1 too many (_blocks.9999",
        ),
        (
            package_tensors,
            lambda held: held["_blocks.15._bn2.weight"].fill_(torch.nan),
            "tensors must be finite, got NaN or infinity in blocks.6.0.bn3.weight",
        ),
    ],
)
def test_files_that_do_not_fit(
    tensors: Callable[..., dict[str, Tensor]], change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:  # fmt: skip
    held = tensors(LITE0)
    change(held)
    torch.save(held, tmp_path / "lite.pth")
    made = EfficientNet(LITE0)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_backbone(made, tmp_path / "lite.pth")
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())


def test_blocks_of_another_network(tmp_path: Path) -> None:
    held = {name: t for name, t in package_tensors(LITE0).items() if not name.startswith("_blocks.15.")}
    torch.save(held, tmp_path / "lite.pth")
    with pytest.raises(
        ValueError, match=r"lite.pth: must hold efficientnet-lite0 or .* got blocks or widths of another"
    ):
        open_backbone(tmp_path / "lite.pth")


def test_another_kind_of_network_is_named(tmp_path: Path) -> None:
    save_backbone(tmp_path / "resnet.safetensors", ResNet(18, width=8))
    with pytest.raises(ValueError, match=r"must hold an EfficientNet-Lite .* the file holds a ResNet$"):
        load_backbone(EfficientNet(LITE0), tmp_path / "resnet.safetensors")
    save_backbone(tmp_path / "lite.safetensors", EfficientNet(LITE0))
    with pytest.raises(ValueError, match=rf"must hold a ResNet .* the file holds {LITE0}: --model.backbone {LITE0}$"):
        load_backbone(ResNet(18, width=8), tmp_path / "lite.safetensors")
