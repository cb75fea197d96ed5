"""The rows of `benchmarks.programs` on Mask2Former; the rival is transformers' class with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.draws import Draws
from benchmarks.measure import Call
from benchmarks.rivals import Program, Rivals, regions
from sprompt.masks import BitMasks, Size
from sprompt.models.mask2former import Mask2Former, Mask2FormerConfig
from sprompt.models.mask2former.checkpoint import to_transformers
from sprompt.models.mask2former.loss import Points, losses
from sprompt.models.protocol import Features
from sprompt.ops import pack_masks
from sprompt.testing.spec import blobs


def theirs(model: Mask2Former) -> Any:
    """transformers' class with the weights of `model`. The backbone is a small one that no row uses."""
    import transformers

    c = model.config
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=model.backbone.channels, depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_labels=c.num_classes, num_queries=c.queries, feature_size=c.channels,
        mask_feature_size=c.channels, hidden_dim=c.channels, num_attention_heads=c.heads, encoder_layers=c.encoder_layers,
        encoder_feedforward_dim=c.encoder_feedforward, decoder_layers=c.decoder_layers + 1,
        dim_feedforward=c.decoder_feedforward, train_num_points=c.points,
    )  # fmt: skip
    other = transformers.Mask2FormerForUniversalSegmentation(config)
    weights = {to_transformers(n): t for n, t in model.state_dict().items() if not n.startswith("backbone.")}
    missing, unknown = other.load_state_dict(weights, strict=False)
    assert not unknown and all("pixel_level_module.encoder." in n or n.startswith("criterion.") for n in missing)
    return other


def head_step(
    device: torch.device, *, images: int, pixels: bool, size: Size = (800, 1344), targets: int = 15, **config: Any
) -> Rivals:
    """Forward, matching, losses and backward at initialisation, on given maps with gradient.

    With `pixels` the inputs are the maps of the backbone, otherwise those of the pixel decoder.
    """
    torch.manual_seed(0)
    model = Mask2Former(Mask2FormerConfig(num_classes=1, **config)).to(device).train()
    other = theirs(model).to(device).train()
    channels = model.backbone.channels if pixels else [model.channels] * 4
    shapes = [(size[0] // stride, size[1] // stride) for stride in (4, 8, 16, 32)]
    maps = [
        regions(width, shape, images, seed).to(device).requires_grad_()
        for seed, (width, shape) in enumerate(zip(channels, shapes, strict=True))
    ]
    dense = [(blobs(targets, *size, seed) > 0.5).to(device) for seed in range(images)]
    bits = BitMasks.stack([pack_masks(each) for each in dense])
    floats = [each.float() for each in dense]
    labels = torch.zeros(images, targets, dtype=torch.int64, device=device)
    counts = torch.full((images,), targets, device=device)

    def trained(module: nn.Module, skipped: tuple[str, ...]) -> list[Tensor]:
        return [p for name, p in module.named_parameters() if not name.startswith(skipped)]

    own = trained(model, ("backbone.",) if pixels else ("backbone.", "pixel_decoder."))
    level = "model.pixel_level_module."
    known = trained(other, (f"{level}encoder.",) if pixels else (level,))

    def ours(points: Points | None = None) -> Tensor:
        outputs = model.decode(Features([], model.pixel_decoder(maps) if pixels else maps))
        return torch.stack(list(losses(outputs, bits, labels, counts, model.config, points).terms.values())).sum()

    def released() -> Tensor:
        if pixels:
            decoded = other.model.pixel_level_module.decoder(maps)
            levels, features = decoded.multi_scale_features, decoded.mask_features
        else:
            levels, features = maps[:0:-1], maps[0]
        module = other.model.transformer_module
        states = module(multi_scale_features=levels, mask_features=features, output_hidden_states=True)
        classes = tuple(other.class_predictor(s.transpose(0, 1)) for s in states.intermediate_hidden_states)
        masks = states.masks_queries_logits
        auxiliary = other.get_auxiliary_logits(classes, masks)
        terms = other.get_loss_dict(masks[-1], classes[-1], floats, list(labels), auxiliary)
        return other.get_loss(terms)

    def step(loss: Callable[[], Tensor], parameters: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss()
        return value.detach(), torch.autograd.grad(value, [*maps, *parameters], allow_unused=True)

    calls: dict[str, Call] = {"ours": lambda: step(ours, own), "released": lambda: step(released, known)}

    def check() -> str:
        with Draws.of(other) as draws:
            expected, wanted = step(released, known)
        found, gradients = step(lambda: ours(draws.points(images)), own)
        off = abs(float(found) - float(expected))
        assert off <= 1e-3 * float(expected), f"loss {float(found):.6g}, transformers {float(expected):.6g}"
        pairs = list(zip(gradients[: len(maps)], wanted[: len(maps)], strict=True))
        apart, whole = (
            sum(float((a - b).square().sum()) for a, b in pairs),
            sum(float(b.square().sum()) for _, b in pairs),
        )
        assert apart <= 1e-3 * whole, (
            f"gradients to the maps are {(apart / whole) ** 0.5:.2g} from those of transformers"
        )
        within = f"with the same draws the loss is within {off / float(expected):.0e}"
        return f"released is transformers' class; {targets} targets an image; {within}"

    return Rivals(calls, check)


_SMALL: dict[str, Any] = {
    "size": (96, 128), "targets": 4, "depth": 18, "backbone_width": 8, "channels": 32, "heads": 4, "queries": 12,
    "encoder_layers": 1, "encoder_feedforward": 48, "decoder_layers": 3, "decoder_feedforward": 48, "points": 64,
}  # fmt: skip

MASK2FORMER = [
    Program(
        "Mask2Former head step" if pixels else "Mask2Former decoder step",
        f"{'pixel decoder, decoder and' if pixels else 'decoder and'} losses, {images} of 800x1344",
        partial(head_step, images=images, pixels=pixels),
        partial(head_step, images=images, pixels=pixels, **_SMALL),
        {"time": 2.5, "memory": 3},
        images,
    )
    for pixels in (False, True)
    for images in (1, 2)
]
