"""The task: K-Net and the example model under every setting; ablations; processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from tiny_queries import TinyQueries, batch_of
from torch import Tensor, nn

from sprompt.data.sample import Batch
from sprompt.methods.saliency_prompt import Pretraining, ProposalConfig, SaliencyPromptConfig, prompts_of
from sprompt.models.knet import KNet, KNetConfig

SITES = {"tiny": ("query",), "knet": ("kernel", "proposal", "late")}
CASES = [(name, site) for name, sites in SITES.items() for site in sites]


def model_of(name: str, num_classes: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if name == "tiny":
        return TinyQueries(num_classes)
    return KNet(
        KNetConfig(
            depth=18,
            backbone_width=4,
            channels=32,
            kernels=20,
            num_classes=num_classes,
            stages=2,
            heads=4,
            feedforward=32,
        )
    )


def batch(counts: tuple[int, ...] = (3, 0, 1), size: tuple[int, int] = (64, 96)) -> Batch:
    generator = torch.Generator().manual_seed(4)
    masks = torch.zeros(len(counts), max(counts), *size)
    seeds = torch.zeros(len(counts), max(counts), 3)
    for b, count in enumerate(counts):
        for l in range(count):
            y, x = (int(torch.randint(0, side - 24, (), generator=generator)) for side in size)
            masks[b, l, y : y + 24, x : x + 20] = 1
            seeds[b, l] = torch.tensor([x + 10.0, y + 12.0, float(l % 3)])
    return batch_of(masks, list(counts), seeds=seeds)


def outputs_of(model: Any, images: Tensor, prompter: Any = None) -> list[Tensor]:
    found: list[Tensor] = []
    for part in model.decode(model.encode(images), prompter):
        found += part if isinstance(part, list) else [part]
    return found


@pytest.mark.parametrize(("name", "site"), CASES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"assign": "sequential"},
        {"assign": "random", "pooling": "mask", "projection": "frozen_orthogonal"},
        {"assign": "none", "kernel_weight": 0.0},
        {"level": "auto", "projection": "pca", "reduction": "sum"},
        {"level": "features", "pooling": "mask", "contrast": True, "dropout_of": "image", "dropout": 0.3},
        {"projection": "linear", "release_pairing": True, "dropout": 1.0},
        {"level": "C5", "pooling": "release", "assign": "sequential", "dropout": 0.05, "kernel_weight": 0.0},
        {"level": "C5", "ratio": 0.5, "dropout": 0.0},
    ],
    ids=lambda c: "-".join(map(str, c.values())) or "default",
)
def test_every_setting_trains(name: str, site: str, config: dict[str, Any]) -> None:
    task = Pretraining(model_of(name), SaliencyPromptConfig(site=site, **config))
    loss, logs = task(batch(), 3)
    loss.backward()
    assert loss.isfinite()
    terms = {k: v for k, v in logs.items() if not k.startswith("monitor/")}
    torch.testing.assert_close(loss.detach(), torch.stack(list(terms.values())).sum())
    assert ("kernel" in terms) == (config.get("kernel_weight") != 0.0)
    assert ("monitor/prompt_ratio" in logs) == (config.get("assign") != "none")
    assert all(v.dim() == 0 and not v.requires_grad and v.isfinite() for v in logs.values())
    for parameter_name, parameter in task.named_parameters():
        if "backbone" in parameter_name:
            assert not parameter.requires_grad and parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize(("name", "site"), CASES)
@pytest.mark.parametrize("how", ["no masks", "dropout 1"])
def test_without_prompts_the_output_is_the_models_own(name: str, site: str, how: str) -> None:
    model = model_of(name)
    own = batch((0, 0)) if how == "no masks" else batch((3, 2))
    task = Pretraining(model, SaliencyPromptConfig(site=site, dropout=float(how == "dropout 1")))
    with torch.no_grad():
        features = model.encode(own.images)  # type: ignore[operator]  # a Module
        prompted = outputs_of(model, own.images, task.injection(features, own, 0))
        plain = outputs_of(model, own.images)
    assert all(torch.equal(a, b) for a, b in zip(prompted, plain, strict=True))


@pytest.mark.parametrize(("name", "site"), CASES)
def test_prompts_change_the_output_in_training_only(name: str, site: str) -> None:
    task = Pretraining(model_of(name), SaliencyPromptConfig(site=site, kernel_weight=0.0))
    plain = Pretraining(task.model, SaliencyPromptConfig(site=site, assign="none", kernel_weight=0.0))
    own = batch()
    assert task(own, 0)[0] != plain(own, 0)[0]
    task.eval()
    assert torch.equal(task(own, 0)[0], plain.eval()(own, 0)[0])
    assert not any(k.startswith("monitor/") for k in task(own, 0)[1])


def test_pseudo_labels_alone_is_the_supervised_loss() -> None:
    from sprompt.methods.supervised import Supervised

    model = model_of("knet")
    task = Pretraining(model, SaliencyPromptConfig(assign="none", kernel_weight=0.0))
    torch.testing.assert_close(task(batch(), 0)[0], Supervised(model)(batch(), 0)[0])
    assert task.projection is None


def test_labels_of_a_file_with_classes_do_not_count() -> None:
    task = Pretraining(model_of("knet"))
    a, b = batch(), batch()
    b.labels[:] = 7
    assert torch.equal(task(a, 0)[0], task(b, 0)[0])


def test_the_same_step_gives_the_same_loss() -> None:
    task = Pretraining(model_of("knet"), SaliencyPromptConfig(dropout=0.5, assign="random"))
    first, other, again = (task(batch(), step)[0] for step in (4, 5, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_backbone_stays_as_it_is() -> None:
    model = model_of("tiny")
    model.backbone.train_batchnorm = True  # type: ignore[union-attr]  # a Module
    task = Pretraining(model, SaliencyPromptConfig(site="query")).train()
    assert not any(m.training for m in model.backbone.modules())  # type: ignore[union-attr]  # a Module
    assert model.neck.training  # type: ignore[union-attr]  # a Module
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}  # type: ignore[union-attr]  # a Module
    optimizer = torch.optim.AdamW((p for p in task.parameters() if p.requires_grad), lr=0.1, weight_decay=0.5)
    task(batch(), 0)[0].backward()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.backbone.state_dict().items())  # type: ignore[union-attr]  # a Module


def test_a_trained_backbone_gets_no_gradient_from_the_seeds() -> None:
    """The weight of L_ker is far above the other weights, so a gradient of it would be visible."""
    grads = []
    for weight in (0.0, 1e6):
        config = SaliencyPromptConfig(site="query", kernel_weight=weight, freeze_backbone=False, dropout=1.0)
        task = Pretraining(model_of("tiny"), config)
        own = batch()
        features = task.model.encode(own.images)  # type: ignore[operator]  # a Module
        if weight:
            found = task.model.losses(task.model.decode(features), own.masks, own.labels, own.counts)  # type: ignore[operator]  # a Module
            detached = [m._replace(kernels=m.kernels.detach()) for m in found.matched]
            loss, _ = task._supervision(features.backbone, own, found._replace(matched=detached))
            loss.backward()
            grads.append(any(p.grad is not None for p in task.model.backbone.parameters()))  # type: ignore[union-attr]  # a Module
        else:
            task(own, 0)[0].backward()
            grads.append(any(p.grad is not None for p in task.model.backbone.parameters()))  # type: ignore[union-attr]  # a Module
    assert grads == [True, False]


def c5_task(**changes: Any) -> Pretraining:
    config = {"level": "C5", "pooling": "release", "assign": "sequential", "dropout": 0.0, "kernel_weight": 0.0}
    torch.manual_seed(1)
    return Pretraining(model_of("tiny"), SaliencyPromptConfig(**{**config, **changes}))  # type: ignore[arg-type]


def test_prompts_of_c5_train_their_layer_and_not_the_backbone() -> None:
    """As in the release for Mask2Former. The queries have a gradient without the prompts too; the backbone has none through them."""
    task, own = c5_task(freeze_backbone=False), batch()
    model: Any = task.network
    images = own.images
    with torch.no_grad():
        features = model.encode(images)
    leaves = [x.requires_grad_() for x in features.backbone]
    injection = task.injection(features._replace(backbone=leaves), own, 0)
    outputs_of(model, images, None)
    prompted = injection("query", torch.zeros(3, model.num_queries, model.channels))  # type: ignore[misc]
    prompted.square().sum().backward()
    layer: Any = task.prompt_layer
    assert layer.weight.grad.any() and layer.bias.grad.any() and all(x.grad is None for x in leaves)


def test_prompts_of_c5_by_hand() -> None:
    """W · (mean of the box) + b by sequential assignment. An image without proposals gets nothing, not the bias."""
    task, own = c5_task(), batch((3, 0, 1))
    model: Any = task.network
    with torch.no_grad():
        features = model.encode(own.images)
        queries = torch.randn(3, model.num_queries, model.channels)
        added: Any = task.injection(features, own, 0)("query", queries) - queries  # type: ignore[misc]
    layer: Any = task.prompt_layer
    c5, boxes = features.backbone[-1].double(), own.masks.boxes()
    assert c5.shape[2:] == (2, 3) and torch.equal(added[1], torch.zeros_like(added[1]))
    for image, count in ((0, 3), (2, 1)):
        r, slots = 20 // count, []
        for slot in range(20):
            slots.append(slot // r if slot < r * count else slot - r * count)
        for n in range(model.num_queries):
            x1, y1, x2, y2 = (int(v) // 32 for v in boxes[image, slots[n * 20 // model.num_queries]])
            x2, y2 = (x1 + 2 if x2 == x1 else x2), (y1 + 2 if y2 == y1 else y2)
            mean = c5[image, :, y1:y2, x1:x2].mean((1, 2))
            wanted = layer.weight.double() @ mean + layer.bias.double()
            torch.testing.assert_close(added[image, n].double(), wanted, atol=1e-5, rtol=1e-4)


def test_the_layer_of_c5_is_kept_with_the_task_and_not_with_the_model() -> None:
    task = c5_task()
    assert {"prompt_layer.weight", "prompt_layer.bias"} <= task.state_dict().keys()
    assert not any("prompt" in name for name in task.model.state_dict())
    assert c5_task(assign="none").prompt_layer is None and Pretraining(model_of("tiny")).prompt_layer is None
    with pytest.raises(ValueError, match='level: "C5" needs the linear layer of the pre-training'):
        prompts_of(batch(), task.network.encode(batch().images), task.config)(None)


@pytest.mark.parametrize("level", ["C4", "C5"])
def test_seeds_are_read_at_the_level_of_the_proposals(level: str) -> None:
    proposals = ProposalConfig(level=level)  # type: ignore[arg-type]  # a str
    task = Pretraining(model_of("tiny"), SaliencyPromptConfig(site="query"), proposals=proposals)
    assert task.projection is not None
    assert task.projection.weight.shape == (32, {"C4": 32, "C5": 64}[level])
    task(batch(), 0)[0].backward()


def test_errors() -> None:
    with pytest.raises(ValueError, match="model: must have 1 class, as proposals have, got 3"):
        Pretraining(model_of("tiny", num_classes=3))
    with pytest.raises(ValueError, match=r"site: must be one of first, query, the sites of this model, got 'kernel'"):
        Pretraining(model_of("tiny"), SaliencyPromptConfig(site="kernel"))
    with pytest.raises(TypeError, match="QueryModel"):
        Pretraining(nn.Linear(2, 2))
    own = batch()
    with pytest.raises(ValueError, match="kernel supervision: the batch must hold seeds"):
        Pretraining(model_of("knet"))(Batch(**{**own.__dict__, "seeds": None}), 0)
    for name in ("level", "pooling", "assign", "reduction", "projection"):
        with pytest.raises(ValueError, match=f"SaliencyPromptConfig: {name} must be one of"):
            SaliencyPromptConfig(**{name: "?"})
    for name, value in (("dropout", 1.5), ("kernel_weight", -1.0)):
        with pytest.raises(ValueError, match=f"SaliencyPromptConfig: {name} must"):
            SaliencyPromptConfig(**{name: value})


# -- processes --------------------------------------------------------------------------------------------------------------------


def part(own: Batch, begin: int, end: int) -> Batch:
    tensors = {n: getattr(own, n)[begin:end] for n in ("images", "masks", "labels", "counts", "seeds")}
    lists = {n: getattr(own, n)[begin:end] for n in ("sizes", "image_ids", "names", "original_sizes")}
    return Batch(**tensors, **lists)


def step_of(own: Batch, config: SaliencyPromptConfig) -> tuple[Tensor, dict[str, Tensor]]:
    task = Pretraining(model_of("knet"), config, seed=2)
    loss, _ = task(own, 6)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in task.named_parameters() if p.grad is not None}


def process(rank: int, path: str, config: SaliencyPromptConfig, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    own = batch((3, 0, 1))
    loss, grads = step_of(part(own, 0, 1) if rank == 0 else part(own, 1, 3), config)
    for value in (loss, *grads.values()):
        dist.all_reduce(value)
        value /= 2
    if rank == 0:
        results["loss"], results["grads"] = loss, grads
    dist.destroy_process_group()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_processes_are_one(tmp_path: Any, reduction: str) -> None:
    """Shares of unequal size; dropout and a drawn permutation included."""
    config = SaliencyPromptConfig(assign="random", dropout=0.3, projection="pca", reduction=reduction)  # type: ignore[arg-type]  # a str
    loss, grads = step_of(batch((3, 0, 1)), config)
    context = torch.multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [context.Process(target=process, args=(r, f"{tmp_path}/sync", config, results)) for r in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [w.exitcode for w in workers] == [0, 0]
        torch.testing.assert_close(results["loss"], loss, rtol=1e-5, atol=1e-6)
        got = results["grads"]
    assert got.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
