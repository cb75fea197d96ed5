"""Small ViTs of ours and of transformers, for the tests of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sprompt.nn.vit import Vit, VitConfig
from sprompt.nn.vit_files import find

transformers = pytest.importorskip("transformers", reason="the independent truth of these tests")

TINY = VitConfig(patch=8, width=32, depth=2, heads=4, grid=4, eps=1e-12)


def randomised(module: Any, seed: int = 0) -> Any:
    """Large random values in all tensors, also in norms and biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return module.eval()


def theirs(config: VitConfig = TINY, kind: str = "ViTModel", **more: Any) -> Any:
    family = kind.removesuffix("Model").removesuffix("ForImageClassification").removesuffix("ForPreTraining")
    sizes = {
        "hidden_size": config.width, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "patch_size": config.patch, "image_size": config.patch * config.grid, "layer_norm_eps": config.eps,
    }  # fmt: skip
    if not family.startswith("Dinov2"):
        sizes["intermediate_size"] = 4 * config.width
    return randomised(getattr(transformers, kind)(getattr(transformers, family + "Config")(**sizes | more)))


def by_our_names(tensors: dict[str, Tensor], config: VitConfig) -> dict[str, Tensor]:
    found = find(tensors)
    assert found is not None
    assert found[1].keys() == Vit(config).state_dict().keys()
    return found[1]
