"""The rows of `benchmarks.programs` on models of transformers; released is the model as it is, ours is the model patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals import Program, Rivals
from sprompt import patch
from sprompt.masks import Size
from sprompt.testing.spec import blobs, random


def mask2former(
    *, swin: bool = False, depths: tuple[int, ...] | None = None, width: int | None = None, **config: Any
) -> nn.Module:
    """transformers' class with a ResNet of bottlenecks or a Swin, at initialisation; by default ResNet-50 or Swin-T, and the sizes of the
    release."""
    import transformers

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    if swin:
        backbone = transformers.SwinConfig(
            embed_dim=width or 96, depths=list(depths or (2, 2, 6, 2)), out_features=stages
        )
    else:
        width = width or 64
        backbone = transformers.ResNetConfig(
            embedding_size=width, hidden_sizes=[width * s for s in (4, 8, 16, 32)], depths=list(depths or (3, 4, 6, 3)),
            layer_type="bottleneck", out_features=stages,
        )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=80, **config)
    )


@contextmanager
def patched(**options: Any) -> Iterator[None]:
    patch.mask2former(**options)
    try:
        yield
    finally:
        patch.undo()


def training_step(device: torch.device, *, images: int, size: Size, targets: int = 15, **config: Any) -> Rivals:
    """Forward, matching, losses and backward of the whole model."""
    model = mask2former(**config).to(device).train()
    pictures = torch.randn(images, 3, *size, generator=random(1)).to(device)
    masks = [(blobs(targets, *size, seed) > 0.5).float().to(device) for seed in range(images)]
    labels = [torch.randint(0, 80, (targets,), generator=random(seed)).to(device) for seed in range(images)]
    parameters = list(model.parameters())

    def step() -> tuple[Tensor, tuple[Tensor | None, ...]]:
        loss = model(pictures, mask_labels=masks, class_labels=labels).loss
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    def ours(**options: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with patched(**options):
            return step()

    def check() -> str:
        torch.manual_seed(2)
        expected, wanted = step()
        torch.manual_seed(2)
        found, gradients = ours(same_draws=True)
        off = abs(float(found) - float(expected))
        assert off <= 1e-3 * float(expected), f"loss {float(found):.6g}, transformers {float(expected):.6g}"
        pairs = [(a, b) for a, b in zip(gradients, wanted, strict=True) if a is not None and b is not None]
        apart, whole = (
            sum(float(x.square().sum()) for x in each) for each in ([a - b for a, b in pairs], [b for _, b in pairs])
        )
        assert apart <= 1e-3 * whole, f"gradients are {(apart / whole) ** 0.5:.2g} from those of transformers"
        within = f"with the same draws the loss is within {off / float(expected):.0e}"
        return f"released is transformers as it is; {targets} targets an image; {within}"

    return Rivals({"ours": ours, "released": step}, check)


def inference(device: torch.device, *, size: Size, target: Size, **config: Any) -> Rivals:
    """Forward without gradient, and the instances of every query."""
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    model = mask2former(**config).to(device).train()
    picture = torch.randn(1, 3, *size, generator=random(1)).to(device)
    processor = Mask2FormerImageProcessorPil()
    # Batch norm takes its statistics from the picture: with those of initialisation all masks are empty.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(picture)
    model.eval()

    @torch.no_grad()
    def run() -> dict[str, Any]:
        outputs = model(picture)
        return processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=[target])[0]

    def ours() -> dict[str, Any]:
        with patched():
            return run()

    def check() -> str:
        found, expected = ours(), run()
        assert expected["segments_info"], "transformers finds no instance"
        same = float((found["segmentation"] == expected["segmentation"]).float().mean())
        assert same >= 0.99, f"{same:.2%} of the pixels have the instance that transformers finds"
        return f"released is transformers as it is; {len(found['segments_info'])} instances; the same at {same:.2%} of the pixels"

    return Rivals({"ours": ours, "released": run}, check)


_NAME = "Mask2Former of transformers"
_SMALL: dict[str, Any] = {
    "depths": (1, 1, 1, 1), "width": 8, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_attention_heads": 4,
    "num_queries": 12, "encoder_layers": 1, "encoder_feedforward_dim": 48, "decoder_layers": 4, "dim_feedforward": 48,
    "train_num_points": 64,
}  # fmt: skip
_TRAINING: dict[str, float] = {"time": 3, "memory": 2}  # goals
_rows: list[tuple[str, Callable[..., Rivals], Size, dict[str, Any], dict[str, float]]] = [
    ("training step", training_step, (512, 672), {"images": 1}, _TRAINING),
    ("training step", training_step, (800, 1344), {"images": 1}, _TRAINING),
    ("training step with Swin-T", training_step, (512, 672), {"images": 1, "swin": True}, _TRAINING),
    ("inference", inference, (512, 672), {"target": (480, 640)}, {}),
    ("inference", inference, (800, 1344), {"target": (480, 640)}, {}),
    ("inference with Swin-T", inference, (512, 672), {"target": (480, 640), "swin": True}, {}),
]

PATCHED = [
    Program(
        _NAME,
        f"{name}, 1 of {size[0]}x{size[1]}",
        partial(make, size=size, **more),
        partial(make, size=(96, 128), **more, **_SMALL | ({"width": 24} if "swin" in more else {})),
        goals,
    )
    for name, make, size, more, goals in _rows
]
