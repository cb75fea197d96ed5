"""The example model of docs/adding_a_model.md, for tests: they run the code that the page shows."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import torch

from sprompt.data.sample import Batch
from sprompt.masks import BitMasks

PAGE = (Path(__file__).parents[2] / "docs" / "adding_a_model.md").read_text()
MODEL, TRAINING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(PRINTED,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)


def run(name: str, code: str) -> Any:
    """A module of this name with the page's code in it."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(code, "docs/adding_a_model.md", "exec"), module.__dict__)
    return module


_module = run("tiny_model", MODEL)
TinyConfig = _module.TinyConfig


def TinyQueries(num_classes: int = 1, **settings: Any) -> Any:
    return _module.TinyQueries(TinyConfig(num_classes=num_classes, **settings))


def batch_of(
    masks: torch.Tensor, counts: list[int], *, seeds: torch.Tensor | None = None, image_seed: int = 0
) -> Batch:
    """A batch of noise with dense masks (B, G, H, W)."""
    number, most, height, width = masks.shape
    noise = torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(image_seed))
    return Batch(
        images=noise + masks.sum(1, keepdim=True),
        masks=BitMasks.from_dense(masks),
        labels=torch.zeros(number, most, dtype=torch.int64),
        counts=torch.tensor(counts),
        sizes=[(height, width)] * number,
        image_ids=list(range(10, 10 + number)),
        names=[f"picture {i}" for i in range(number)],
        original_sizes=[(height, width)] * number,
        seeds=torch.zeros(number, most, 3) if seeds is None else seeds,
    )
