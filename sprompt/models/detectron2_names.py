"""The names that releases on detectron2 give to the tensors of a ResNet."""

from __future__ import annotations

import re

#: torchvision's names -> theirs, behind "backbone.". Their stage res2 is layer1.
_RULES = (
    (r"bn1\.", "stem.conv1.norm."),
    (r"conv1\.", "stem.conv1."),
    (r"layer(\d)\.(\d+)\.downsample\.1\.", "res{0}.{1}.shortcut.norm."),
    (r"layer(\d)\.(\d+)\.downsample\.0\.", "res{0}.{1}.shortcut."),
    (r"layer(\d)\.(\d+)\.bn(\d)\.", "res{0}.{1}.conv{2}.norm."),
    (r"layer(\d)\.(\d+)\.conv(\d)\.", "res{0}.{1}.conv{2}."),
)


def released_name(name: str) -> str:
    """Their name of a tensor of a model's plain ResNet. Other names stay."""
    for pattern, target in _RULES:
        if match := re.match(r"backbone\." + pattern, name):
            stage, *rest = match.groups() or ("",)
            return "backbone." + target.format(stage and int(stage) + 1, *rest) + name[match.end() :]
    return name
