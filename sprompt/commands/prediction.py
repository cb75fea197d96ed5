"""Settings of prediction that `finetune`, `evaluate` and `predict` share."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Prediction:
    """Size of the pictures, and which results are kept."""

    short: int | None = None
    """Shorter side that pictures are resized to, pixels; default: that of the model's training."""
    long: int | None = None
    """Longest that the longer side becomes, pixels; default: that of the model's training."""
    keep_ratio: bool = True
    """False stretches every picture to long x short pixels."""
    threshold: float = 0.5
    """Probability above which a pixel is in the mask (the paper's COCO results: 0.3)."""
    max_per_image: int = 100
    """Results of a picture."""
    batch_size: int = 1
    """Pictures at a time."""
    workers: int = 2
    """Processes that read pictures."""

    def sized(self, trained: tuple[int, int]) -> dict[str, Any]:
        """Arguments of `sprompt.engine.predict.predict`, for a model trained on pictures of this short and long side."""
        own = {"short": self.short or trained[0], "long": self.long or trained[1]}
        return {**dataclasses.asdict(self), **own}
