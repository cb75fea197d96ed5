"""Settings of SegPrompt."""

from __future__ import annotations

from dataclasses import dataclass

from sprompt.methods.registry import MethodConfig
from sprompt.settings import check_sizes


@dataclass(frozen=True)
class SegPromptConfig(MethodConfig):
    """Extra queries of training. The defaults are those of the paper's public code."""

    categories: int = 30
    """Categories that each picture is asked for, or all categories of the labels if they are fewer."""
    copies: int = 10
    """Prompt queries of a category: the largest number of its objects that they can find. At most the model's queries."""
    instances: int = 5
    """Objects of a picture from which prompts are extracted in a step."""
    least_area: int = 100
    """Pixels of the training picture. Objects with no more pixels are no targets of the own queries, and no prompt is extracted
    from them."""
    momentum: float = 0.9
    """Share of its old value that the prompt of a category keeps in a step, from 0 to 1."""
    cap_targets: bool = False
    """Keep at most `copies` objects of a category as targets of the own queries, as the public code does. The others then count
    as background."""

    def __post_init__(self) -> None:
        bounds = {
            "categories": (1, 100_000),
            "copies": (1, 100_000),
            "instances": (1, 10_000),
            "least_area": (0, 1 << 40),
        }
        check_sizes(self, bounds)
        if isinstance(self.momentum, bool) or not 0 <= self.momentum <= 1:
            raise ValueError(f"SegPromptConfig: momentum must lie between 0 and 1, got {self.momentum!r}")
