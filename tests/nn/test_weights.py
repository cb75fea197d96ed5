"""Checkpoints in the layouts of other projects, and files of this library."""

import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sprompt.nn.resnet import ResNet
from sprompt.nn.weights import load_backbone, open_backbone, save_backbone


def network(depth: int = 18, width: int = 4, variant: str = "plain", seed: int = 1) -> ResNet:
    """A ResNet with different values in all tensors."""
    generator = torch.Generator().manual_seed(seed)
    made = ResNet(depth, width=width, variant=variant)
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        else:
            tensor.fill_(7)
    return made


def same(a: ResNet, b: ResNet, *, counters: bool = True) -> bool:
    names = [name for name in a.state_dict() if counters or not name.endswith("tracked")]
    return all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in names)


def behind(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def foreign(kind: str, right: ResNet) -> object:
    """The content of a project's checkpoint, as torch.load returns it. Tensors that are not in `right` hold other values."""
    good, other = right.state_dict(), network(right.depth, right.width, seed=2).state_dict()
    odd = torch.full((2, 2), 9.0)
    if kind == "torchvision":
        return {**{k: v for k, v in good.items() if not k.endswith("tracked")}, "fc.weight": odd, "fc.bias": odd[0]}
    if kind == "MoCo v2":
        fc = {"fc.0.weight": odd, "fc.0.bias": odd[0], "fc.2.weight": odd, "fc.2.bias": odd[0]}
        q, k = behind("module.encoder_q.", {**good, **fc}), behind("module.encoder_k.", {**other, **fc})
        state = {**q, **k, "module.queue": odd, "module.queue_ptr": odd[0, :1]}
        return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}
    if kind == "DenseCL, whole":
        neck = {"neck.mlp.0.weight": odd, "neck.mlp2.0.weight": odd}
        q, k = behind("encoder_q.0.", good), behind("encoder_k.0.", other)
        state = {"queue": odd, "queue2": odd, **behind("backbone.", good), **q, **k, **neck}
        return {"meta": {"epoch": 200, "time": "now"}, "state_dict": state}
    if kind == "DenseCL, extracted":
        return {"state_dict": dict(good), "author": "DenseCL"}
    if kind == "SwAV":
        heads = {"module.projection_head.0.weight": odd, "module.prototypes.weight": odd}
        return {**behind("module.", good), **heads}
    if kind == "K-Net":
        heads = {
            "neck.lateral_convs.0.conv.weight": odd,
            "rpn_head.init_kernels.weight": odd,
            "roi_head.mask_head.0.x": odd,
        }
        return {"meta": {"mmdet_version": "2.14"}, "state_dict": {**behind("backbone.", good), **heads}}
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "says", "left_out"),
    [
        ("torchvision", "a torchvision checkpoint", "fc (2)"),
        (
            "MoCo v2",
            "a MoCo v2 checkpoint",
            "module.encoder_q (4), module.encoder_k (124), module.queue, module.queue_ptr",
        ),
        ("DenseCL, whole", "a DenseCL checkpoint;", "queue, queue2, encoder_q (120), encoder_k (120), neck (2)"),
        ("DenseCL, extracted", "a DenseCL checkpoint, extracted", None),
        ("SwAV", "a SwAV checkpoint", "module.projection_head, module.prototypes"),
        ("K-Net", "a K-Net checkpoint", "neck, rpn_head, roi_head"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors"])
def test_foreign_checkpoints(kind, says, left_out, suffix, tmp_path):
    right, path = network(), tmp_path / f"file{suffix}"
    held = foreign(kind, right)
    if suffix == ".safetensors":
        save_file({k: v.clone() for k, v in held.get("state_dict", held).items()}, path)
    else:
        torch.save(held, path)
    loaded = ResNet(18, width=4)
    sentence = load_backbone(loaded, path)
    assert same(loaded, right, counters=kind != "torchvision")
    if suffix != ".safetensors" or kind != "DenseCL, extracted":  # there only the author's name tells
        assert says in sentence
    count = 100 if kind == "torchvision" else 120
    assert f"{path}: {count} tensors of a ResNet-18 of width 4 from" in sentence
    if suffix != ".safetensors":  # these are in the order of the file
        assert sentence.endswith(f"; left out: {left_out}") if left_out else "left out" not in sentence
    assert same(open_backbone(path), right, counters=kind != "torchvision")


@pytest.mark.parametrize(
    ("depth", "width", "variant"),
    [(18, 8, "plain"), (34, 4, "plain"), (50, 4, "plain"), (101, 2, "plain"), (18, 4, "d"), (50, 4, "d-dcn")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_own_files(depth, width, variant, dtype, tmp_path):
    right, path = network(depth, width, variant=variant), tmp_path / "new" / "backbone.safetensors"
    save_backbone(path, right, dtype)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["sprompt"]) == {
            "backbone": {"depth": depth, "width": width, "variant": variant}
        }
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118  # not a dict
    opened = open_backbone(path)
    assert (opened.depth, opened.width, opened.variant, opened.training) == (depth, width, variant, False)
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    rounded = {name: t.to(dtype).to(t.dtype) if t.is_floating_point() else t for name, t in right.state_dict().items()}
    right.load_state_dict(rounded)
    assert same(opened, right, counters=False)
    assert "from a backbone of this library" in load_backbone(ResNet(depth, width=width, variant=variant), path)
    assert os.listdir(path.parent) == ["backbone.safetensors"]


#: timm's resnet50d but for its blocks, typed from its modules: the name of a module, its kind, and its sizes at width 64.
TIMM = """
conv1.0              conv  32 3 3
conv1.1              norm  32
conv1.3              conv  32 32 3
conv1.4              norm  32
conv1.6              conv  64 32 3
bn1                  norm  64
layer1.0.downsample.1  conv  256 64 1
layer1.0.downsample.2  norm  256
layer2.0.downsample.1  conv  512 256 1
layer2.0.downsample.2  norm  512
layer3.0.downsample.1  conv  1024 512 1
layer3.0.downsample.2  norm  1024
layer4.0.downsample.1  conv  2048 1024 1
layer4.0.downsample.2  norm  2048
"""


def timm_file() -> dict[str, Tensor]:
    """A file of timm's resnet50d, with a sixteenth of its channels."""
    generator = torch.Generator().manual_seed(5)

    def add(name: str, kind: str, *sizes: int) -> None:
        if kind == "conv":
            outputs, inputs, side = sizes
            shape = (outputs // 16, inputs if inputs == 3 else inputs // 16, side, side)
            held[f"{name}.weight"] = torch.rand(shape, generator=generator)
            return
        for part in ("weight", "bias", "running_mean", "running_var"):
            held[f"{name}.{part}"] = torch.rand(sizes[0] // 16, generator=generator)
        held[f"{name}.num_batches_tracked"] = torch.tensor(9)

    held: dict[str, Tensor] = {}
    for line in TIMM.strip().splitlines():
        name, kind, *sizes = line.split()
        add(name, kind, *map(int, sizes))
    inputs = 64
    for layer, count in enumerate((3, 4, 6, 3), start=1):
        planes = 32 * 2**layer
        for i in range(count):
            for number, (to, of, side) in enumerate(
                ((planes, inputs, 1), (planes, planes, 3), (4 * planes, planes, 1)), start=1
            ):
                add(f"layer{layer}.{i}.conv{number}", "conv", to, of, side)
                add(f"layer{layer}.{i}.bn{number}", "norm", to)
            inputs = 4 * planes
    return held | {"fc.weight": torch.rand(1000, 128), "fc.bias": torch.rand(1000)}


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_file_of_timm(prefix, tmp_path):
    """It goes into a network with deformable convolutions too, whose offsets start at 0."""
    held, path = timm_file(), tmp_path / "resnet50d.pth"
    torch.save(behind(prefix, held), path)
    plain = open_backbone(path)
    assert (plain.depth, plain.width, plain.variant) == (50, 4, "d")
    assert plain.state_dict().keys() == held.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(tensor, held[name]) for name, tensor in plain.state_dict().items())
    deformable = network(50, 4, variant="d-dcn")
    origin = "a checkpoint with names behind 'backbone.'" if prefix else "a timm checkpoint"
    assert load_backbone(deformable, path) == (
        f"{path}: 330 tensors of a ResNet-50-D of width 4 with deformable convolutions from {origin}; its offsets start at 0; "
        f"left out: {'backbone' if prefix else 'fc'} (2)"
    )
    own = deformable.state_dict()
    offsets = {name for name in own if "conv2_offset" in name}
    assert own.keys() - held.keys() == offsets and len(offsets) == 18
    assert all(
        torch.equal(tensor, torch.zeros_like(tensor) if name in offsets else held[name]) for name, tensor in own.items()
    )


def test_offsets_are_all_there_or_none(tmp_path):
    state = dict(network(50, variant="d-dcn").state_dict())
    del state["layer4.2.conv2_offset.bias"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"1 tensors missing \(layer4.2.conv2_offset.bias\).*is it the right file"):
        load_backbone(network(50, variant="d-dcn"), tmp_path / "x.pth")


def test_half_precision_must_hold_the_values(tmp_path):
    right = network()
    right.bn1.running_var[0] = 1e6
    with pytest.raises(ValueError, match=r"finite in torch.float16, got NaN or infinity in bn1.running_var"):
        save_backbone(tmp_path / "x.safetensors", right, torch.float16)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("held", "asked", "message"),
    [
        ((18, 4), (50, 4), r"the file holds a ResNet-18: --model\.depth 18 \(depth=18 in Python\)"),
        ((50, 4), (18, 4), r"the file holds a ResNet-50: --model\.depth 50 \("),
        (
            (101, 2),
            (50, 2),
            r"255 too many \(layer3.6.conv1.weight, .*the file holds a ResNet-101: --model\.depth 101 ",
        ),
        ((50, 2), (101, 2), r"255 tensors missing \(layer3.6.conv1.weight.*: --model\.depth 50 "),
        (
            (18, 8),
            (18, 4),
            r"conv1.weight is \(8, 3, 7, 7\), must be \(4, 3, 7, 7\).*of width 8: --model\.backbone-width 8 \(width=8 in Python\)",
        ),
        (
            (34, 8),
            (18, 4),
            r"a ResNet-34 of width 8: --model\.depth 34 --model\.backbone-width 8 \(depth=34, width=8 in Python\)",
        ),
        (
            (50, 4, "d-dcn"),
            (50, 4, "d"),
            r"18 too many .*with deformable convolutions: --model\.backbone-variant d-dcn \(variant='d-dcn'",
        ),
        ((50, 4, "d"), (50, 4), r"a ResNet-50-D: --model\.backbone-variant d \("),
        (
            (101, 4, "d"),
            (50, 4, "d-dcn"),
            r"a ResNet-101-D with deformable convolutions: --model\.depth 101 \(depth=101 in Python\)",
        ),
        ((50, 4), (50, 4, "d-dcn"), r"a ResNet-50: --model\.backbone-variant plain"),
    ],
)
def test_another_network_is_refused_with_advice(held, asked, message, tmp_path):
    path = tmp_path / "x.pth"
    state = network(*held).state_dict()
    torch.save({name: t for name, t in state.items() if not name.endswith("tracked")}, path)
    target = network(*asked, seed=3)
    with pytest.raises(ValueError, match=message) as raised:
        load_backbone(target, path)
    assert str(raised.value).startswith(str(path))
    assert same(target, network(*asked, seed=3))


class Unknown:
    """An object of another class in a checkpoint."""

    def __reduce__(self):
        return os.mkdir, ("made-by-the-file",)


def spoiled(kind: str, path) -> None:
    state = dict(network().state_dict())
    if kind == "other names":
        torch.save({f"blocks.{i}.weight": torch.zeros(1) for i in range(9)}, path)
    elif kind == "no tensors":
        torch.save({"state_dict": {}}, path)
    elif kind == "a list":
        torch.save([torch.zeros(1)], path)
    elif kind == "a tensor missing":
        torch.save({name: t for name, t in state.items() if name != "layer2.1.bn2.running_var"}, path)
    elif kind == "NaN":
        torch.save({**state, "layer2.1.bn2.running_var": torch.full((8,), torch.nan)}, path)
    elif kind == "code":
        torch.save({"state_dict": state, "meta": Unknown()}, path)
    elif kind == "a plain pickle":
        path.write_bytes(pickle.dumps({"model": Unknown()}))
    elif kind == "cut off":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "a folder":
        path.mkdir()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other names", r"must hold a ResNet .* got blocks.0.weight, .*blocks.4.weight, \.\.\."),
        ("no tensors", r"must hold tensors by name, got dict without any"),
        ("a list", r"must hold tensors by name, got list"),
        ("a tensor missing", r"1 tensors missing \(layer2.1.bn2.running_var\)"),
        ("NaN", r"must be finite, got NaN or infinity in layer2.1.bn2.running_var"),
        ("code", r"only running code from the file can make; if you trust where it comes from, convert it once"),
        ("a plain pickle", r"only running code from the file can make"),
        ("cut off", r"must be a whole file of torch.save"),
        ("empty", r"must be a whole file of torch.save"),
        ("nothing", r"got nothing there"),
        ("a folder", r"got a folder"),
    ],
)
def test_files_that_fit_nowhere(kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    spoiled(kind, path)
    target = network(seed=3)
    for call in (lambda: load_backbone(target, path), lambda: open_backbone(path)):
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert str(raised.value).startswith(str(path))
    assert same(target, network(seed=3))
    assert not (tmp_path / "made-by-the-file").exists()


@pytest.mark.parametrize("damage", ["cut off", "not safetensors"])
def test_damaged_safetensors(damage, tmp_path):
    path = tmp_path / "x.safetensors"
    save_backbone(path, network())
    path.write_bytes(path.read_bytes()[:9000] if damage == "cut off" else b"hello, this is text")
    with pytest.raises(ValueError, match=r"x.safetensors: must be a whole safetensors file"):
        load_backbone(network(), path)
