"""`python knet_run.py SCENES OUT`: trains a tiny K-Net for a few steps and evaluates it, in one process or several. Writes
into OUT."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sprompt.data.coco import CocoDataset
from sprompt.data.loader import Batches
from sprompt.data.transforms import Augment, collate
from sprompt.engine import TrainConfig, evaluate, train
from sprompt.methods.supervised import Supervised
from sprompt.models.knet import KNet, KNetConfig


def tiny(classes: int) -> KNet:
    torch.manual_seed(0)
    sizes = {"channels": 16, "kernels": 8, "heads": 2, "feedforward": 32, "stages": 2}
    return KNet(KNetConfig(depth=18, backbone_width=8, num_classes=classes, **sizes))


def run(scenes: Path, out: Path) -> dict[str, Any]:
    dataset = CocoDataset(scenes / "images", scenes / "instances.json", keep_empty=True)
    model = tiny(len(dataset.classes))
    few = TrainConfig(epochs=2, batch_size=4, learning_rate=1e-3, warmup_steps=2, workers=0, log_steps=1)
    train(Supervised(model), partial(Batches, dataset, Augment(64, 96), collate), few, out, cpu=True, progress=False)
    return evaluate(model, dataset, out, short=64, long=96, batch_size=2, max_per_image=5, cpu=True, progress=False)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
