"""The example model of docs/adding_a_model.md, for tests: they run the code that the page shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from sprompt.data.sample import Batch
from sprompt.masks import BitMasks

PAGE = (Path(__file__).parents[2] / "docs" / "adding_a_model.md").read_text()
MODEL, TRAINING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(PRINTED,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)

_names: dict[str, Any] = {"__name__": "tiny_model"}
exec(compile(MODEL, "docs/adding_a_model.md", "exec"), _names)
TinyQueries = _names["TinyQueries"]


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
