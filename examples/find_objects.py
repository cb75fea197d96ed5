"""A trained model in a program: load its file, find the objects of pictures, draw them.

The model here is a tiny K-Net with random weights, so its objects mean nothing. Give `load` a run folder of `sprompt finetune` instead.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from sprompt.engine.trained import load
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.saved import save_model

torch.manual_seed(0)
config = KNetConfig(
    num_classes=3, depth=18, backbone_width=8, channels=16, kernels=8, stages=2, heads=2, feedforward=32
)
pixels = np.random.default_rng(0)
pictures = [pixels.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((96, 128), (80, 80))]

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "model.safetensors"
    save_model(file, KNet(config), ["cat", "dog", "bird"], {"short": 64, "long": 96})  # the size of training pictures
    model = load(file, device="cpu")
    print(model.about.replace(folder, "FOLDER"))

    found = model.predict(pictures, max_per_image=5)  # the best five of each picture
    for objects in found:
        best = f"{objects.names[0]} {objects.scores[0]:.2f}, {int(objects.masks.area()[0])} pixels"
        print(f"{objects.name}: {len(objects)} objects of {objects.masks.size}, the best: {best}")

    drawing = Path(folder) / "objects.png"
    drawn = found[0].draw()
    drawn.save(drawing)
    print(f"{drawing.name}: {found[0].name} with its objects, {drawn.height}x{drawn.width} pixels")
assert all(0 < len(objects) <= 5 for objects in found)
