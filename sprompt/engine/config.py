"""How a model is trained, whatever the method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sprompt.settings import check_choices

#: Fields that change neither the numbers nor the order of the steps, so that a run may be resumed with other values.
FREE = ("epochs", "max_steps", "workers", "checkpoint_seconds", "checkpoint_steps", "keep", "log_steps")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, length, and what a run leaves behind. The defaults are those of the pre-training recipe."""

    epochs: int = 12
    """Passes over the pictures."""
    max_steps: int | None = None
    """Stop after so many steps in all, for a trial; the learning rate keeps the course of the whole run."""
    batch_size: int = 96
    """Pictures that one optimiser step sees, over all processes and micro-batches."""
    accumulate: int = 1
    """Micro-batches of a step: as many times less memory. Each is normalised by its own number of targets, then they are averaged."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum 0.9."""
    learning_rate: float = 1e-4
    """Highest learning rate."""
    backbone_lr_factor: float = 1.0
    """Factor on the learning rate of the backbone's parameters."""
    weight_decay: float = 0.05
    """Weight decay, of all trained parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's two averages of the gradient."""
    clip: float | None = 1.0
    """Longest gradient, as the norm over all parameters; none: as long as it is."""
    schedule: Literal["step", "cosine"] = "step"
    """step: drops after given epochs; cosine: half a cosine down to 0 at the last step."""
    warmup_steps: int = 1000
    """Steps in which the learning rate rises linearly to its full value."""
    warmup_factor: float = 0.001
    """Where that rise begins, as a part of the full value."""
    drops: tuple[int, ...] = (8, 11)
    """Epochs after which the learning rate drops, for schedule step."""
    drop_factor: float = 0.1
    """What a drop multiplies it by."""
    precision: Literal["no", "bf16"] = "no"
    """bf16 computes the forward pass in bfloat16 where that is safe (autocast); the parameters stay in float32."""
    seed: int = 0
    """Of everything random: order, augmentation, dropout."""
    workers: int = 2
    """Processes that prepare pictures, for each process that trains."""
    checkpoint_seconds: float = 600.0
    """Seconds between checkpoints."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints, as well."""
    keep: int = 2
    """Checkpoints kept: the newest, and those that it falls back to when the newest is damaged."""
    log_steps: int = 50
    """Steps that a line of the log is the mean of."""

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("warmup_steps", 0), ("workers", 0), ("keep", 1),
            ("log_steps", 1), ("max_steps", 1), ("checkpoint_steps", 1), ("learning_rate", 0), ("backbone_lr_factor", 0),
            ("weight_decay", 0), ("warmup_factor", 0), ("drop_factor", 0), ("checkpoint_seconds", 0), ("seed", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= least:  # also NaN
                raise ValueError(f"{name}: must be at least {least}, got {value}")
        check_choices(type(self), vars(self))
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: must be above 0, got {self.clip}; none clips nothing")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size: must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}; "
                f"{self.accumulate * max(1, self.batch_size // self.accumulate)} is one"
            )

    def check_world(self, world: int) -> None:
        """Raises ValueError unless every process gets equally many pictures of each micro-batch."""
        micro = self.batch_size // self.accumulate
        if micro % world:
            raise ValueError(
                f"batch_size: a micro-batch of {micro} pictures must divide among {world} processes, got a rest of "
                f"{micro % world}; a batch_size of {self.accumulate * world * max(1, micro // world)} does"
            )

    def identity(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the run that it goes on with."""
        free = set(FREE) - ({"epochs"} if self.schedule == "cosine" else set())
        return {name: value for name, value in asdict(self).items() if name not in free}
