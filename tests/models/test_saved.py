"""Models in files: saving, loading, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.knet.checkpoint import export_checkpoint, import_checkpoint
from sprompt.models.saved import load_model, read_info, save_model

TINY = KNetConfig(depth=18, backbone_width=4, channels=16, kernels=5, num_classes=3, heads=2, feedforward=24, stages=2)
CLASSES = ["disc", "ring", "bar"]


def tiny(num_classes: int = 3, seed: int = 0) -> KNet:
    torch.manual_seed(seed)
    model = KNet(TINY)
    if num_classes != 3:
        model.reset_classifier(num_classes)
    return model


def same(a: KNet, b: KNet) -> bool:
    other = b.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in a.state_dict().items())


def test_there_and_back(tmp_path: Path) -> None:
    model = tiny()
    save_model(tmp_path / "new" / "model.safetensors", model, CLASSES, {"step": 7})
    loaded, info = load_model(tmp_path / "new" / "model.safetensors")
    assert same(model, loaded) and loaded.config == TINY and not loaded.training
    assert info["classes"] == CLASSES and info["extra"] == {"step": 7} and info["model"] == "knet"
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images).masks[-1], loaded.train()(images).masks[-1])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]  # nothing temporary stays
    model.reset_classifier(2)
    save_model(tmp_path / "new" / "model.safetensors", model, ["a", "b"])  # takes the place of the old file
    assert read_info(tmp_path / "new" / "model.safetensors")["config"]["num_classes"] == 2


def test_in_half_the_size(tmp_path: Path) -> None:
    model, whole, half = tiny(), tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    save_model(whole, model, CLASSES)
    save_model(half, model, CLASSES, half=True)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    loaded, _ = load_model(half)
    for name, tensor in loaded.state_dict().items():
        own = model.state_dict()[name]
        assert tensor.dtype == own.dtype and torch.equal(tensor, own.half().float() if own.is_floating_point() else own)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, tiny(), CLASSES)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(path, tiny(seed=1), CLASSES)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_classes_must_fit_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes must have 3 names, one for each output of the model, got 2"):
        save_model(tmp_path / "m.safetensors", tiny(), CLASSES[:2])
    with pytest.raises(TypeError, match="must have a config derived from ModelConfig, got Linear"):
        save_model(tmp_path / "m.safetensors", torch.nn.Linear(1, 1), CLASSES)


def rewritten(tmp_path: Path, about: object = None, **tensors: torch.Tensor | None) -> Path:
    """A model's file with another description or other tensors. None leaves a tensor out."""
    path = tmp_path / "model.safetensors"
    save_model(path, tiny(), CLASSES)
    held: dict[str, torch.Tensor] = load_file(path)
    text = json.dumps(read_info(path))
    for name, tensor in tensors.items():
        del held[name]
        if tensor is not None:
            held[name] = tensor
    save_file(
        held, path, {"sprompt": text if about is None else about if isinstance(about, str) else json.dumps(about)}
    )
    return path


def described(tmp_path: Path, **changes: object) -> dict[str, object]:
    save_model(tmp_path / "x.safetensors", tiny(), CLASSES)
    return {**read_info(tmp_path / "x.safetensors"), **changes}


def test_wrong_descriptions(tmp_path: Path) -> None:
    config = described(tmp_path)["config"]
    assert isinstance(config, dict)
    for about, message in (
        ("{", "must say in JSON"),
        ("[" * 100_000, "must say in JSON"),
        ([1], "got tensors without a description of their model"),
        (described(tmp_path, format=2), "format must be 1, got 2"),
        (described(tmp_path, model="rnn"), "must be one of knet, mask2former, fastinst, queryinst, got 'rnn'"),
        (described(tmp_path, classes=["a"]), "must name as many classes as the model has, 3, got 1"),
        (described(tmp_path, classes="abc"), "classes must be a list of names"),
        (described(tmp_path, extra=3), "extra must be an object"),
        (described(tmp_path, config={**config, "more": 1}), "config.more: is not a setting; known: num_classes, "),
        (described(tmp_path, config=None), "config must have the fields of KNetConfig, got NoneType"),
        (described(tmp_path, config={**config, "stages": 10**9}), "stages must be a whole number from 1 to 64"),
        (described(tmp_path, config={**config, "depth": [50]}), r"config.depth: must be a whole number, got \[50\]"),
        (described(tmp_path, config={**config, "depth": 51}), "depth must be one of 18, 34, 50, 101, got 51"),
        (described(tmp_path, config={**config, "feedforward": 65536, "kernels": 99_999}), "other shapes: roi_head"),
    ):  # fmt: skip
        path = rewritten(tmp_path, about)
        with pytest.raises(ValueError, match=message) as error:
            load_model(path)
        assert str(error.value).startswith(str(path))


def test_wrong_tensors(tmp_path: Path) -> None:
    name = "rpn_head.init_kernels.weight"
    for tensor, message in (
        (None, f"missing: {name}"),
        (torch.zeros(5, 16), rf"other shapes: {name} \(5, 16\) instead of \(5, 16, 1, 1\)"),
        (torch.zeros(5, 16, 1, 1).double(), f"other dtypes: {name} torch.float64"),
        (torch.full((5, 16, 1, 1), torch.nan), f"NaN or infinity: {name}"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(rewritten(tmp_path, **{name: tensor}))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="got nothing there"):
        load_model(path)
    with pytest.raises(ValueError, match="got a folder"):
        load_model(tmp_path)
    save_model(path, tiny(), CLASSES)
    whole = path.read_bytes()
    for data in (b"", b"abc", whole[:100], whole[:-5], (1 << 40).to_bytes(8, "little") + whole[8:], b"\0" * 64):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="must be a whole safetensors file") as error:
            load_model(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["k.pth", "k.safetensors"])
def test_official_form_there_and_back(tmp_path: Path, name: str) -> None:
    model, other = tiny(), tiny(seed=1)
    export_checkpoint(model, tmp_path / name, CLASSES)
    assert not same(model, other)
    said = import_checkpoint(other, tmp_path / name)
    assert same(model, other) and f"{len(model.state_dict())} tensors of K-Net" in said and "anew" not in said
    if name == "k.pth":
        held = torch.load(tmp_path / name, weights_only=True)
        assert held.keys() == {"meta", "state_dict"} and held["meta"]["CLASSES"] == tuple(CLASSES)
        torch.save(held["state_dict"], tmp_path / "bare.pth")
        third = tiny(seed=2)
        import_checkpoint(third, tmp_path / "bare.pth")
        assert same(model, third)


def official(path: Path, model: KNet, **changes: torch.Tensor | None) -> Path:
    tensors = dict(model.state_dict())
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    torch.save({"meta": {"epoch": 12}, "state_dict": tensors, "optimizer": {"state": {}}}, path)
    return path


def test_official_with_other_classes(tmp_path: Path) -> None:
    path, model = official(tmp_path / "k.pth", tiny(7)), tiny(seed=1)
    for name, tensor in model.state_dict().items():
        if "conv_seg" in name or "fc_cls" in name:
            tensor.fill_(2)  # stands for weights of other classes, which must not survive
    said = import_checkpoint(model, path)
    assert "classifiers start anew, as the file has 7 classes and the model 3" in said
    source = tiny(7).state_dict()
    for name, tensor in model.state_dict().items():
        if "conv_seg" in name or "fc_cls" in name:
            assert tensor.shape[0] == 3 and (
                not name.endswith("bias") or torch.allclose(tensor, torch.tensor(-4.59512))
            )
        else:
            assert torch.equal(tensor, source[name])


def test_official_parts_of_pretraining_are_left_out(tmp_path: Path) -> None:
    extra = {"patch2query.weight": torch.zeros(2, 2), "roi_head.gen_gt_kernel.fc.bias": torch.zeros(2)}
    path, model = official(tmp_path / "k.pth", tiny(), **extra), tiny(seed=1)
    said = import_checkpoint(model, path)
    assert "patch2query.weight, roi_head.gen_gt_kernel.fc.bias" in said and same(model, tiny())
    counters = {name: None for name in model.state_dict() if name.endswith("num_batches_tracked")}
    import_checkpoint(model, official(tmp_path / "k.pth", tiny(seed=3), **counters))
    assert same(model, tiny(seed=3))


def test_official_that_does_not_fit(tmp_path: Path) -> None:
    model = tiny(seed=1)
    name = "roi_head.mask_head.0.fc_mask.bias"
    for changes, message in (
        ({name: None}, f"missing: {name}"),
        ({"more.weight": torch.zeros(1)}, "not of this model: more.weight"),
        ({name: torch.zeros(3)}, rf"other shapes: {name} \(3,\) instead of \(16,\)"),
        ({name: torch.full((16,), torch.inf)}, f"NaN or infinity: {name}"),
        ({"rpn_head.conv_seg.bias": None}, "missing: rpn_head.conv_seg.bias"),
        ({"rpn_head.conv_seg.bias": torch.zeros(4)}, "other shapes: rpn_head.conv_seg.bias"),  # 3 classes elsewhere
    ):
        with pytest.raises(ValueError, match=message):
            import_checkpoint(model, official(tmp_path / "k.pth", tiny(), **changes))
        assert same(model, tiny(seed=1))  # unchanged


class Config(dict):  # type: ignore[type-arg]  # of any keys and values
    """An object of a class that is not torch's. Official files hold such objects besides tensors."""


def test_official_with_foreign_objects(tmp_path: Path) -> None:
    path, model = tmp_path / "k.pth", tiny(seed=1)
    torch.save({"meta": Config(a=1), "state_dict": tiny().state_dict()}, path)
    with pytest.raises(ValueError, match="objects that only running code from the file can make") as error:
        import_checkpoint(model, path)
    lines = [line for line in str(error.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    exec("\n".join(line.strip() for line in lines), {})  # the code in the message works
    import_checkpoint(model, tmp_path / "k.safetensors")
    assert same(model, tiny())


def test_files_of_other_kinds(tmp_path: Path) -> None:
    model = tiny()
    for data in (b"", b"abc", pickle.dumps([1, 2], protocol=2)):
        (tmp_path / "k.pth").write_bytes(data)
        with pytest.raises(ValueError, match=r"k\.pth: must"):
            import_checkpoint(model, tmp_path / "k.pth")
    torch.save([torch.zeros(1)], tmp_path / "k.pth")
    with pytest.raises(ValueError, match="must hold tensors by name, got list"):
        import_checkpoint(model, tmp_path / "k.pth")
    with pytest.raises(ValueError, match="nothing there"):
        import_checkpoint(model, tmp_path / "no.pth")
