"""A ViT equals transformers' ViTModel and Dinov2Model; its stem, its positions and its sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers_vit import TINY, by_our_names, randomised, theirs

from sprompt.nn.vit import ConvStem, Vit, VitConfig, resized_positions


def compared(own: Vit, other: Any, images: Tensor, loose: tuple[str, ...] = (), **how: Any) -> None:
    """Maps to 1e-9; gradients to 1e-9 of the largest of each tensor, or to 1e-5 for tensors in `loose`."""
    patch, width = own.config.patch, own.config.width
    (own_map,) = own(images)
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    tokens = other(images, **how).last_hidden_state[:, 1:]
    wanted = tokens.transpose(1, 2).reshape(len(images), width, *grid)
    torch.testing.assert_close(own_map, wanted, rtol=0, atol=1e-9)
    weight = torch.randn(own_map.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    for found in (own_map, wanted):
        (found * weight).sum().backward()
    gradients = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    gradients = by_our_names(gradients, own.config)
    for name, parameter in own.named_parameters():
        scale = max(float(gradients[name].abs().max()), 1.0)
        bound = (1e-5 if name in loose else 1e-9) * scale
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("size", [(32, 32), (48, 72), (24, 16), (16, 64)])
def test_vit_model(size: tuple[int, int]) -> None:
    """The learned square of 4x4 patches, and larger, smaller and other rectangles of the same number of patches."""
    other, own = theirs().double(), Vit(TINY).double().eval()
    own.load_state_dict(by_our_names(other.state_dict(), TINY))
    images = torch.randn(2, 3, *size, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    compared(own, other, images, interpolate_pos_encoding=True)


@pytest.mark.parametrize("size", [(28, 28), (56, 56)])
def test_dinov2_model(size: tuple[int, int]) -> None:
    """transformers resizes these positions in float32. At twice the size all of its products are exact for the positions of this test,
    but not its sums of gradients."""
    config = VitConfig(patch=14, width=32, depth=2, heads=4, grid=2, layer_scale=True)
    other, own = theirs(config, "Dinov2Model").double(), Vit(config).double().eval()
    table = other.embeddings.position_embeddings
    table.data.copy_((table.data * 16).round() / 16)
    own.load_state_dict(by_our_names(other.state_dict(), config))
    images = torch.randn(2, 3, *size, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    compared(own, other, images, loose=() if size == (28, 28) else ("pos_embed",))


def cubic(x: float) -> float:
    """The weight of a cell at a distance, with a = -3/4."""
    x = abs(x)
    if x <= 1:
        return 1.25 * x**3 - 2.25 * x**2 + 1
    return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("size", [(3, 5), (7, 2), (4, 8), (1, 1)])
def test_positions_by_the_formula(size: tuple[int, int]) -> None:
    table = torch.randn(1, 1 + 16, 3, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    square = table[0, 1:].reshape(4, 4, 3).numpy()
    wanted = np.zeros((*size, 3))
    for r in range(size[0]):
        for c in range(size[1]):
            y, x = (r + 0.5) * 4 / size[0] - 0.5, (c + 0.5) * 4 / size[1] - 0.5
            for i in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    cell = square[min(max(i, 0), 3), min(max(j, 0), 3)]
                    wanted[r, c] += cubic(y - i) * cubic(x - j) * cell
    found = resized_positions(table, *size)
    assert torch.equal(found[:, 0], table[:, 0])
    np.testing.assert_allclose(found[0, 1:].reshape(*size, 3).numpy(), wanted, rtol=0, atol=1e-12)


def test_positions_stay_as_they_are() -> None:
    table = torch.randn(1, 10, 4)
    assert resized_positions(table, 3, 3) is table
    half = resized_positions(table.half(), 5, 5)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), resized_positions(table.half().float(), 5, 5), rtol=1e-3, atol=1e-4)


def test_the_convolutional_stem_by_its_formula() -> None:
    stem = randomised(ConvStem(VitConfig(width=16, heads=2, conv_stem=True))).double()
    assert [tuple(conv.weight.shape) for conv in stem.convs] == [
        (2, 3, 3, 3), (4, 2, 3, 3), (8, 4, 3, 3), (16, 8, 3, 3),
    ]  # fmt: skip
    assert all(conv.bias is None for conv in stem.convs) and tuple(stem.proj.weight.shape) == (16, 16, 1, 1)
    images = torch.randn(2, 3, 32, 48, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    x = images.numpy()
    for conv, norm in zip(stem.convs, stem.norms, strict=True):
        weight, (height, width) = conv.weight.detach().numpy(), x.shape[2:]
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        x = np.zeros((2, len(weight), height // 2, width // 2))
        for i in range(3):
            for j in range(3):
                x += np.einsum("oc,bchw->bohw", weight[:, :, i, j], padded[:, :, i : i + height : 2, j : j + width : 2])
        mean, variance = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
        gain, offset = norm.weight.detach().numpy(), norm.bias.detach().numpy()
        x = (x - mean) / np.sqrt(variance + 1e-6) * gain[:, None, None] + offset[:, None, None]
        x = x * (1 + torch.special.erf(torch.from_numpy(x) / 2**0.5).numpy()) / 2
    weight, bias = stem.proj.weight.detach().numpy()[:, :, 0, 0], stem.proj.bias.detach().numpy()
    wanted = np.einsum("oc,bchw->bohw", weight, x) + bias[:, None, None]
    np.testing.assert_allclose(stem(images).detach().numpy(), wanted, rtol=0, atol=1e-10)


def test_a_stem_takes_the_place_of_the_patches() -> None:
    config = VitConfig(width=16, depth=1, heads=2, grid=3, conv_stem=True)
    own = randomised(Vit(config)).double()
    images = torch.randn(1, 3, 32, 48, dtype=torch.double)
    (found,) = own(images)
    assert found.shape == (1, 16, 2, 3)
    plain = Vit(VitConfig(width=16, depth=1, heads=2, grid=3)).double().eval()
    plain.load_state_dict({name: t for name, t in own.state_dict().items() if "patch_embed" not in name}, strict=False)
    plain.patch_embed = own.patch_embed
    assert torch.equal(found, plain(images)[0])


def test_names_and_size_of_the_common_network() -> None:
    with torch.device("meta"):
        model = Vit()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    block = {
        "norm1.weight": (768,), "norm1.bias": (768,), "attn.qkv.weight": (2304, 768), "attn.qkv.bias": (2304,),
        "attn.proj.weight": (768, 768), "attn.proj.bias": (768,), "norm2.weight": (768,), "norm2.bias": (768,),
        "mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,), "mlp.fc2.weight": (768, 3072), "mlp.fc2.bias": (768,),
    }  # fmt: skip
    first = {name.removeprefix("blocks.11."): s for name, s in shapes.items() if name.startswith("blocks.11.")}
    assert first == block
    assert {name: s for name, s in shapes.items() if not name.startswith("blocks.")} == {
        "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "patch_embed.proj.weight": (768, 3, 16, 16),
        "patch_embed.proj.bias": (768,), "norm.weight": (768,), "norm.bias": (768,),
    }  # fmt: skip
    # a ViT-B/16 with its classifier of 1000 classes has 86 567 656 parameters
    assert sum(p.numel() for p in model.parameters()) == 86_567_656 - 768 * 1000 - 1000
    assert (model.strides, model.channels) == ((16,), [768])
    assert all(norm.eps == 1e-6 for norm in model.modules() if isinstance(norm, nn.LayerNorm))


def test_autocast() -> None:
    own = randomised(Vit(TINY))
    images = torch.randn(1, 3, 40, 24)
    own.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = own(images)
    (wanted,) = own(images)
    assert float((found.float() - wanted).abs().mean()) < 0.05 * float(wanted.abs().mean())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch": 0}, "patch must be a whole number from 1 to 64, got 0"),
        ({"width": 10**9}, "width must be a whole number from 1 to 4096"),
        ({"depth": 129}, "depth must"),
        ({"heads": True}, "heads must be a whole number"),
        ({"heads": 7}, "heads must divide the width 768, got 7"),
        ({"grid": 257}, "grid must be a whole number from 1 to 256, got 257"),
        ({"conv_stem": True, "patch": 14}, "conv_stem must be False unless .*, got True with a patch of 14"),
        ({"conv_stem": True, "width": 12}, "conv_stem must .* a width of 12"),
        ({"eps": 0.0}, "eps must be a number above 0 and at most 0.001, got 0.0"),
        ({"eps": float("nan")}, "eps must"),
    ],
)  # fmt: skip
def test_bad_sizes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"VitConfig: {message}"):
        VitConfig(**values)


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match=r"Vit: images must have sides that are multiples of 8, got \(1, 3, 64, 70\)"):
        Vit(TINY)(torch.zeros(1, 3, 64, 70))
