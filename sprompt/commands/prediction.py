"""Settings of prediction that `finetune`, `evaluate` and `predict` share."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Prediction:
    """Size of the pictures, and choice of the results."""

    short: int | None = None
    """Shorter side of the resized pictures, pixels. Default: as in the model's training."""
    long: int | None = None
    """Upper bound of the longer side of the resized pictures, pixels. Default: as in the model's training."""
    keep_ratio: bool = True
    """False stretches every picture to long x short pixels."""
    threshold: float = 0.5
    """A pixel is in the mask if its probability is above this threshold (0.3 in the paper's COCO results)."""
    max_per_image: int = 100
    """Largest number of results of a picture; the best are kept."""
    batch_size: int = 1
    """Number of pictures in a batch."""
    workers: int = 2
    """Number of processes that read pictures. 0 reads them in the main process."""

    def sized(self, trained: tuple[int, int]) -> dict[str, Any]:
        """Arguments of `sprompt.engine.predict.predict`, for a model trained on pictures of this short and long side."""
        own = {"short": self.short or trained[0], "long": self.long or trained[1]}
        return {**dataclasses.asdict(self), **own}
