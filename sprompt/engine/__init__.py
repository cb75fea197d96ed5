"""Training loop, checkpoints, prediction, evaluation."""
