"""How pictures are predicted, as `finetune`, `evaluate` and `predict` share it."""

import dataclasses


@dataclasses.dataclass
class Testing:
    """Size of the pictures, and which results are kept."""

    short: int = 800
    """Shorter side that pictures are resized to, pixels."""
    long: int = 1333
    """Longest that the longer side becomes, pixels."""
    threshold: float = 0.5
    """Probability above which a pixel is in the mask (the paper's COCO results: 0.3)."""
    max_per_image: int = 100
    """Results of a picture."""
    batch_size: int = 1
    """Pictures at a time."""
    workers: int = 2
    """Processes that read pictures."""
