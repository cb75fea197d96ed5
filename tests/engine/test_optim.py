"""Learning rates equal tables written by hand. Parameter groups, and the configuration's errors."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from toy import Task, config

from sprompt.commands.parsing import parse
from sprompt.engine.config import TrainConfig
from sprompt.engine.optim import factor_at, load_optimiser, make_optimiser, optimiser_tensors, set_rate
from sprompt.methods.supervised import Supervised
from sprompt.models.protocol import ParameterGroup
from sprompt.models.registry import MODELS, build
from sprompt.settings import from_plain


def test_steps_and_warm_up_by_hand() -> None:
    c = TrainConfig(epochs=12, warmup_steps=4, warmup_factor=0.2, drops=(8, 11), drop_factor=0.1)
    table = {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1, 79: 1, 80: 0.1, 109: 0.1, 110: 0.01, 119: 0.01}  # epochs of 10 steps
    for step, factor in table.items():
        assert factor_at(c, step, 10) == pytest.approx(factor), step


def test_cosine_by_hand() -> None:
    c = TrainConfig(epochs=4, schedule="cosine", warmup_steps=0)
    for step, factor in {0: 1, 10: 0.5 + 0.5**1.5, 20: 0.5, 30: 0.5 - 0.5**1.5, 40: 0}.items():
        assert factor_at(c, step, 10) == pytest.approx(factor, abs=1e-12)


def test_the_cosine_behind_one_epoch_of_warm_up_by_hand() -> None:
    """Mask Auto-Labeler: 10 epochs, here of 2000 steps. Half-way between epochs 1 and 10 the rate is 0.2 + 0.8 / 2."""
    c = TrainConfig(epochs=10, schedule="epoch_cosine", warmup_steps=500)
    table = {0: 0, 500: 0.25, 1000: 0.5, 1999: 0.9995, 2000: 1, 11000: 0.6, 20000: 0.2, 30000: 0.2}
    table |= {5000: 0.6 + 0.2 * 3**0.5}  # a sixth of the way: cos 30° = √3 / 2
    for step, factor in table.items():
        assert factor_at(c, step, 2000) == pytest.approx(factor, abs=1e-12), step
    assert c.identity()["epochs"] == 10 and "epochs" not in TrainConfig().identity()
    assert factor_at(TrainConfig(epochs=1, schedule="epoch_cosine"), 5, 10) == 0.5


def test_the_recipe_of_the_paper_is_the_default() -> None:
    c = TrainConfig()
    assert (c.epochs, c.batch_size, c.learning_rate, c.weight_decay, c.clip, c.drops) == (
        12,
        96,
        1e-4,
        0.05,
        1.0,
        (8, 11),
    )
    assert factor_at(c, 0, 1286) == pytest.approx(0.001) and factor_at(c, 500, 1286) == pytest.approx(0.5005)


def test_groups() -> None:
    task = Task()
    task.head.bias.requires_grad_(False)
    optimiser = make_optimiser(task, config(backbone_lr_factor=0.25))
    set_rate(optimiser, 0.1)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert {n: rates.get(id(p)) for n, p in task.named_parameters()} == {
        "backbone.weight": 0.025, "backbone.bias": 0.025, "norm.weight": None, "norm.bias": None, "head.weight": 0.1, "head.bias": None,
    }  # fmt: skip
    assert all(group["weight_decay"] == 0.05 for group in optimiser.param_groups)
    with pytest.raises(ValueError, match="must have a parameter to train, got none"):
        make_optimiser(task.requires_grad_(False), config())


@pytest.mark.parametrize(("given", "weight", "bias"), [(None, 0.5, 1), (0.25, 0.25, 0.25), (0.0, 0.0, 0.0)])
def test_parameters_with_factors_of_their_own(given: float | None, weight: float, bias: float) -> None:
    """A factor on the backbone's learning rate replaces that of the task; it is not multiplied by it."""
    task = Task().requires_grad_(True)
    backbone, norm = [task.backbone.weight], [task.norm.weight, task.norm.bias]
    task.parameter_groups = lambda: [ParameterGroup(backbone, rate=0.5), ParameterGroup(norm, decay=0)]
    optimiser = make_optimiser(task, config(backbone_lr_factor=given))
    set_rate(optimiser, 1.0)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}
    assert {n: found[id(p)] for n, p in task.named_parameters()} == {
        "backbone.weight": (weight, 0.05), "backbone.bias": (bias, 0.05), "norm.weight": (1, 0), "norm.bias": (1, 0),
        "head.weight": (1, 0.05), "head.bias": (1, 0.05),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "factor"), [("knet", 0.25), ("mask2former", 0.1)])
def test_the_backbone_of_a_model_has_the_models_own_factor(name: str, factor: float) -> None:
    """0.25 as in the release of K-Net, 0.1 as in that of Mask2Former: by default in fine-tuning too."""
    assert parse("finetune", ["--model", name]).train.backbone_lr_factor is None
    with torch.device("meta"):
        task = Supervised(build(MODELS.get(name).Config(depth=18, frozen_stages=-1)))
    groups = make_optimiser(task, config()).param_groups
    factors = {id(p): group["factor"] for group in groups for p in group["params"]}
    assert {factors[id(p)] for p in task.model.backbone.parameters()} == {factor}
    assert {factors[id(p)] for n, p in task.named_parameters() if "backbone" not in n} == {1.0}


def test_a_run_with_a_factor_in_its_config_goes_on_as_it_was() -> None:
    """Fine-tuning of a K-Net once had a factor of 0.25 in every config.yaml."""
    before = from_plain(TrainConfig, {"backbone_lr_factor": 0.25})
    assert before.identity()["backbone_lr_factor"] == 0.25
    with torch.device("meta"):
        task = Supervised(build(MODELS.get("knet").Config(depth=18, frozen_stages=-1)))
    old, new = (make_optimiser(task, c).param_groups for c in (before, TrainConfig()))
    assert [(g["factor"], len(g["params"])) for g in old] == [(g["factor"], len(g["params"])) for g in new]


def test_a_name_with_backbone_in_it_is_no_backbone() -> None:
    task = nn.ModuleDict({"backbones": nn.Linear(1, 1), "model": nn.ModuleDict({"backbone": nn.Linear(1, 1)})})
    sizes = {g["factor"]: len(g["params"]) for g in make_optimiser(task, config(backbone_lr_factor=0.5)).param_groups}
    assert sizes == {1.0: 2, 0.5: 2}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_goes_there_and_back_and_a_wrong_step_is_skipped(name: str) -> None:
    def step(task: Task, optimiser: torch.optim.Optimizer, found: float = 0.0) -> None:
        for parameter in task.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if found else 0.5)
        optimiser.found_inf = torch.tensor(found)  # type: ignore[attr-defined]  # fused optimisers read it
        optimiser.step()

    c = config(optimiser=name)
    first, second = Task(), Task()
    a, b = make_optimiser(first, c), make_optimiser(second, c)
    step(first, a)
    second.load_state_dict(first.state_dict())
    load_optimiser(b, second, {k: v.clone() for k, v in optimiser_tensors(a, first).items()})
    step(first, a, found=1.0)
    step(first, a)
    step(second, b)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q) and bool(p.isfinite().all())


def test_foreign_state_is_refused() -> None:
    task = Task()
    optimiser = make_optimiser(task, config())
    with pytest.raises(ValueError, match=r"must be of trained parameters, got 'neck.weight'"):
        load_optimiser(optimiser, task, {"neck.weight/exp_avg": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"head.weight/exp_avg must have shape \(1, 8\), got \(3,\)"):
        load_optimiser(optimiser, task, {"head.weight/exp_avg": torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate: must be at least 0, got nan"),
        ({"clip": 0.0}, "clip: must be above 0"),
        ({"batch_size": 10, "accumulate": 4}, "must be a multiple of accumulate, got 10 and 4; take 8"),
        ({"schedule": "linear"}, "schedule must be one of 'step', 'cosine', 'epoch_cosine', got 'linear'"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TrainConfig(), **change)


def test_processes_must_share_equally() -> None:
    TrainConfig(batch_size=12, accumulate=2).check_world(3)
    with pytest.raises(
        ValueError, match="6 pictures must divide among 4 processes, got a rest of 2; take a batch_size of 8"
    ):
        TrainConfig(batch_size=12, accumulate=2).check_world(4)
