"""The names that releases on detectron2 give to the tensors of a ResNet."""

from __future__ import annotations

import re

#: Their names -> torchvision's, behind "backbone.". Their stage res2 is layer1.
_RULES = (
    (r"stem\.conv1\.norm\.", "bn1."),
    (r"stem\.conv1\.", "conv1."),
    (r"res(\d)\.(\d+)\.shortcut\.norm\.", "layer{0}.{1}.downsample.1."),
    (r"res(\d)\.(\d+)\.shortcut\.", "layer{0}.{1}.downsample.0."),
    (r"res(\d)\.(\d+)\.conv(\d)\.norm\.", "layer{0}.{1}.bn{2}."),
    (r"res(\d)\.(\d+)\.conv(\d)\.", "layer{0}.{1}.conv{2}."),
)


def resnet_name(name: str) -> str | None:
    """Our name of a tensor of a model's ResNet, None for other names."""
    for pattern, target in _RULES:
        if match := re.match(r"backbone\." + pattern, name):
            stage, *rest = match.groups() or ("",)
            return "backbone." + target.format(stage and int(stage) - 1, *rest) + name[match.end() :]
    return None
