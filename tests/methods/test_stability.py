"""Stability of matching, on models with kernels that stay in place, or change places."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_pretraining import model_of

from sprompt.data.coco import CocoDataset
from sprompt.data.synthetic import write_scenes
from sprompt.data.transforms import Augment
from sprompt.methods.saliency_prompt import Pretraining
from sprompt.methods.saliency_prompt.stability import FILE, Stability


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, 5, size=(64, 64), seed=3)
    return CocoDataset(out / "images", out / "instances.json", class_agnostic=True)


@torch.no_grad()
def change_places(task: Pretraining) -> None:
    """Kernel n becomes kernel n + 1, so a proposal matched to n is then matched to n + 1."""
    for value in task.model.parameters():
        if value.shape[0] == 20:
            value.copy_(value.roll(1, 0))


def test_kernels_that_stay_and_kernels_that_change_places(scenes: CocoDataset, tmp_path: Path) -> None:
    task = Pretraining(model_of("knet"))
    stability = Stability(task, scenes, Augment((64, 80), 96), tmp_path)
    assert stability(1) == {}
    assert stability(2) == {"monitor/same_kernel": 1.0}
    before = stability.matched()
    assert len(before) >= len(scenes) and len(set(before)) > 1
    change_places(task)
    assert stability.matched() == [(k + 1) % 20 for k in before]
    assert stability(3) == {"monitor/same_kernel": 0.0}
    # a run resumed in another process reads the file; a repeated epoch replaces its own numbers
    again = Stability(task, scenes, Augment((64, 80), 96), tmp_path)
    assert again(3) == {"monitor/same_kernel": 0.0}
    assert again(4) == {"monitor/same_kernel": 1.0}
    assert again(6) == {}
    assert list(json.loads((tmp_path / FILE).read_text())["epochs"]) == ["1", "2", "3", "4", "6"]


def test_only_one_process_writes(scenes: CocoDataset, tmp_path: Path) -> None:
    stability = Stability(Pretraining(model_of("knet")), scenes, Augment(64, 96), tmp_path)
    assert stability(1, keep=False) == {} and not (tmp_path / FILE).exists()


def test_it_sees_neither_prompts_nor_chance(scenes: CocoDataset, tmp_path: Path) -> None:
    stability = Stability(Pretraining(model_of("knet")), scenes, Augment(64, 96, flip=0.5, crop=(32, 32)), tmp_path)
    first = stability.matched()
    torch.manual_seed(99)
    assert stability.matched() == first
    assert not stability.task.training
