"""Training loop, evaluation, prediction and checkpoints. They work with every task and every model."""

from sprompt.engine.checkpoint import CheckpointError as CheckpointError
from sprompt.engine.config import TrainConfig as TrainConfig
from sprompt.engine.evaluate import evaluate as evaluate
from sprompt.engine.evaluators.coco import coco_metrics as coco_metrics
from sprompt.engine.evaluators.coco import metrics_table as metrics_table
from sprompt.engine.guard import Interrupted as Interrupted
from sprompt.engine.guard import TrainingError as TrainingError
from sprompt.engine.predict import Predicted as Predicted
from sprompt.engine.predict import predict as predict
from sprompt.engine.predict import predict_to_file as predict_to_file
from sprompt.engine.predict import write_results as write_results
from sprompt.engine.train import TrainResult as TrainResult
from sprompt.engine.train import train as train
