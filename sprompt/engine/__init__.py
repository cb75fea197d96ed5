"""Training loop, evaluation, prediction, checkpoints: they know tasks and models, and no particular one."""

from sprompt.engine.checkpoint import CheckpointError as CheckpointError
from sprompt.engine.config import TrainConfig as TrainConfig
from sprompt.engine.guard import Interrupted as Interrupted
from sprompt.engine.guard import TrainingError as TrainingError
from sprompt.engine.train import TrainResult as TrainResult
from sprompt.engine.train import train as train
