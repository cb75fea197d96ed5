"""Settings of training, for every method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sprompt.settings import check_choices

#: Fields that change neither the results nor the order of the steps. A run may be resumed with other values of these fields.
FREE = ("epochs", "max_steps", "workers", "checkpoint_seconds", "checkpoint_steps", "keep", "log_steps")


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, length, checkpoints and log of a training. The defaults are those of the pre-training recipe."""

    epochs: int = 12
    """Number of passes over the pictures."""
    max_steps: int | None = None
    """Stop after this number of steps in all, for a trial. The learning rate follows the schedule of the whole run."""
    batch_size: int = 96
    """Number of pictures of one optimiser step, over all processes and micro-batches. It must be a multiple of accumulate."""
    accumulate: int = 1
    """Number of micro-batches of a step. More micro-batches take less memory. The loss of a micro-batch is normalised by its
    own number of targets; then the losses are averaged."""
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum 0.9."""
    learning_rate: float = 1e-4
    """Highest learning rate."""
    backbone_lr_factor: float | None = None
    """Factor on the learning rate of the backbone's parameters. none: the model's own, such as 0.25 of K-Net and 0.1 of
    Mask2Former."""
    weight_decay: float = 0.05
    """Weight decay of all trained parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's averages of the gradient and of its square."""
    clip: float | None = 1.0
    """Upper bound of the gradient's norm over all parameters, above 0. A longer gradient is scaled down. none: no bound."""
    schedule: Literal["step", "cosine", "epoch_cosine"] = "step"
    """step: the learning rate drops after given epochs. cosine: it follows half a cosine down to 0 at the last step. epoch_cosine: it
    rises linearly from 0 in the first epoch, and then follows half a cosine down to a fifth at the last step."""
    warmup_steps: int = 1000
    """Number of steps in which the learning rate rises linearly to its full value, for the schedules step and cosine."""
    warmup_factor: float = 0.001
    """Factor on the learning rate at the start of these steps."""
    drops: tuple[int, ...] = (8, 11)
    """Epochs after which the learning rate drops, for schedule step."""
    drop_factor: float = 0.1
    """Factor on the learning rate at each drop."""
    precision: Literal["no", "bf16"] = "no"
    """bf16 computes the forward pass in bfloat16 where autocast allows it. The parameters stay in float32."""
    seed: int = 0
    """Seed of all random numbers: order of the pictures, augmentation, dropout."""
    workers: int = 2
    """Number of processes that prepare pictures, for each process that trains. 0 prepares them in the training process."""
    checkpoint_seconds: float = 600.0
    """Seconds between two checkpoints."""
    checkpoint_steps: int | None = None
    """Number of steps after which there is another checkpoint, in addition to checkpoint_seconds."""
    keep: int = 2
    """Number of checkpoints to keep. If the newest is damaged, a run goes on from an older one."""
    log_steps: int = 50
    """Number of steps between two lines of the log. A line holds the means over these steps."""

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
            raise ValueError(f"clip: must be above 0, got {self.clip}; none turns clipping off")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size: must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}; "
                f"take {self.accumulate * max(1, self.batch_size // self.accumulate)}"
            )

    def check_world(self, world: int) -> None:
        """Raises ValueError unless every process gets the same number of pictures of each micro-batch."""
        micro = self.batch_size // self.accumulate
        if micro % world:
            raise ValueError(
                f"batch_size: a micro-batch of {micro} pictures must divide among {world} processes, got a rest of "
                f"{micro % world}; take a batch_size of {self.accumulate * world * max(1, micro // world)}"
            )

    def identity(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the run that it goes on with."""
        free = set(FREE) - ({"epochs"} if self.schedule != "step" else set())
        return {name: value for name, value in asdict(self).items() if name not in free}
