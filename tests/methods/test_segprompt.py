"""SegPrompt: visibility of the groups, the choice of targets and categories, the prompts, and the losses of slots."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sprompt.data.coco import CocoDataset
from sprompt.data.errors import DataError
from sprompt.data.sample import Batch
from sprompt.data.synthetic import write_scenes
from sprompt.masks import BitMasks
from sprompt.methods.segprompt import SegPrompt, SegPromptConfig
from sprompt.methods.segprompt.choice import Choice, Lists, choose
from sprompt.methods.segprompt.prompts import PromptCache
from sprompt.methods.segprompt.task import EXTRACT, PROMPT, chosen
from sprompt.models.mask2former import Mask2Former, Mask2FormerConfig, loss
from sprompt.models.mask2former.model import Outputs
from sprompt.models.protocol import IF_MATCHED, NOTHING, OBJECT, QueryGroup, Slots, Targets
from sprompt.seeding import generator

TINY = Mask2FormerConfig(
    depth=18, backbone_width=8, channels=16, queries=12, heads=4, encoder_layers=1, encoder_feedforward=16, decoder_layers=4,
    decoder_feedforward=16, points=40, num_classes=1,
)  # fmt: skip
SMALL = SegPromptConfig(categories=4, copies=3, instances=3, least_area=20)
CLASSES = 6


def drawn_batch(counts: tuple[int, ...] = (5, 0, 2), size: tuple[int, int] = (64, 96)) -> Batch:
    random = generator(7)
    most = max([*counts, 1])
    noise = torch.randn(len(counts), most, 5, 6, generator=random)
    masks = torch.nn.functional.interpolate(noise, size, mode="bilinear") > 0.4
    real = torch.arange(most) < torch.tensor(counts)[:, None]
    labels = torch.randint(0, CLASSES, (len(counts), most), generator=random)
    return Batch(
        torch.randn(len(counts), 3, *size, generator=random), BitMasks.from_dense(masks & real[..., None, None]),
        torch.where(real, labels, 0), torch.tensor(counts), [size] * len(counts), list(range(10, 10 + len(counts))),
        [f"{i}.png" for i in range(len(counts))], [size] * len(counts),
    )  # fmt: skip


def task_of(config: SegPromptConfig = SMALL, seed: int = 0, lists: dict[int, Lists] | None = None) -> SegPrompt:
    torch.manual_seed(seed)
    task = SegPrompt(Mask2Former(TINY), config, vocabulary=CLASSES, lists=lists, seed=seed)
    for parameter in task.model.parameters():  # so that no prediction is degenerate
        if parameter.dim() > 1:
            torch.nn.init.xavier_uniform_(parameter)
    return task


def decoded(task: SegPrompt, batch: Batch, step: int = 0) -> Any:
    choices = task._choices(batch, step)
    extracted = chosen(batch, [c.extracted for c in choices], task.config.instances)
    groups = task._groups(choices, extracted.masks, step)
    network = task.network
    return network.decode(network.encode(batch.images), None, Targets(batch.masks, batch.labels, batch.counts, groups))


# -- visibility
@pytest.mark.parametrize("copies", [1, 10])
def test_who_sees_whom(copies: int) -> None:
    task = task_of(replace(SMALL, copies=copies))
    batch = drawn_batch()
    choices = task._choices(batch, 0)
    extracted = chosen(batch, [c.extracted for c in choices], SMALL.instances)
    prompt, extract = task._groups(choices, extracted.masks, 0)
    own, prompted, M = TINY.queries, 4 * copies, SMALL.instances
    assert prompt.sees.shape == (prompted, own + prompted + M) and extract.sees.shape == (M, own + prompted + M)
    for reader, read in itertools.product(range(prompted), range(own + prompted + M)):
        of_own = read < own
        of_block = own <= read < own + prompted and (read - own) // copies == reader // copies
        assert bool(prompt.sees[reader, read]) == (of_own or of_block)
    for reader, read in itertools.product(range(M), range(own + prompted + M)):
        assert bool(extract.sees[reader, read]) == (read >= own + prompted)


def test_the_model_predicts_the_same_with_and_without_groups() -> None:
    task, batch = task_of().double(), drawn_batch()
    batch = replace(batch, images=batch.images.double())
    task.cache.prompts.normal_()
    task.cache.seen.fill_(True)
    network = task.network
    alone = network.decode(network.encode(batch.images))
    first = decoded(task, batch)
    torch.nn.init.normal_(task.content.weight, std=100)
    second = decoded(task, batch, step=5)
    assert not torch.equal(first.groups[PROMPT].hidden[-1], second.groups[PROMPT].hidden[-1])
    for joined in (first, second):
        for name in ("classes", "hidden", "embeddings"):
            for own, wanted in zip(getattr(joined, name), getattr(alone, name), strict=True):
                torch.testing.assert_close(own, wanted, rtol=0, atol=1e-12)


def test_an_extraction_query_reads_the_pixels_of_its_object_only() -> None:
    """Maps change everywhere but in the cells of the object; the extracted vector does not."""
    task = task_of(replace(SMALL, instances=1)).double()
    batch = drawn_batch((1,))
    network = task.network
    features = network.encode(batch.images.double())
    dense = torch.zeros(1, 1, *batch.masks.size)
    dense[..., 3:25, 10:40] = 1
    mask = BitMasks.from_dense(dense)
    group = QueryGroup(torch.zeros(1, 1, 16).double(), None, torch.tensor([[False] * TINY.queries + [True]]), mask)
    targets = Targets(mask, batch.labels, batch.counts, [group])

    def state(maps: list[Tensor]) -> Tensor:
        outputs = network.decode(features._replace(maps=[features.maps[0], *maps]), None, targets)
        return network.group_states(outputs, 0)

    maps, outside, inside = features.maps[1:], [], []
    for level in maps:
        held = torch.nn.functional.adaptive_max_pool2d(dense, level.shape[2:]).bool()[:, 0]
        assert held.any() and not held.all()
        noise = torch.randn(level.shape, generator=generator(1), dtype=level.dtype)
        outside.append(torch.where(held[:, None], level, level + noise))
        inside.append(torch.where(held[:, None], level + noise, level))
    torch.testing.assert_close(state(outside), state(maps), rtol=0, atol=1e-12)
    assert float((state(inside) - state(maps)).detach().abs().max()) > 1e-3


def test_evaluation_and_prediction_know_no_groups() -> None:
    task, batch = task_of().eval(), drawn_batch()
    before = {name: t.clone() for name, t in task.cache.state_dict().items()}
    loss, terms = task(batch, 0)
    assert not any(name.startswith(("prompt", "extract")) for name in terms) and loss > 0
    assert all(torch.equal(t, before[name]) for name, t in task.cache.state_dict().items())
    assert not task.network.decode(task.network.encode(batch.images)).groups


# -- choice
lists_of_pictures = st.builds(
    Lists, st.frozensets(st.integers(0, 8), max_size=4), st.frozensets(st.integers(0, 8), max_size=3)
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 40)), max_size=25),
    st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), lists_of_pictures, st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_the_rules_of_the_choice(
    targets: list[tuple[int, int]], categories: int, copies: int, instances: int, lists: Lists, cap: bool, seed: int
) -> None:
    labels, areas = [t[0] for t in targets], [t[1] for t in targets]
    config = SegPromptConfig(categories, copies, instances, least_area=10, cap_targets=cap)
    choice: Choice = choose(labels, areas, 9, config, generator(seed), lists)

    def classes(places: list[int]) -> list[int]:
        return [labels[p] for p in places]

    for label in set(labels):  # at most `copies` of each, and all if there are no more
        assert classes(choice.prompted).count(label) == min(labels.count(label), copies)
    large = {p for p in choice.prompted if areas[p] > 10}
    assert choice.own == sorted(large if cap else {p for p in range(len(labels)) if areas[p] > 10})
    # extraction: different objects, large ones; as many categories as possible
    assert len(set(choice.extracted)) == len(choice.extracted) == min(len(large), instances)
    assert set(choice.extracted) <= large
    assert len(set(classes(choice.extracted))) == min(len(set(classes(list(large)))), instances)
    # categories: present ones first, then those known to be absent, then others; no category twice
    present = {labels[p] for p in large} | lists.partial
    assert len(set(choice.categories)) == len(choice.categories) == min(categories, 9)
    head = sorted(present)[: len(choice.categories)]
    assert choice.categories[: len(head)] == head
    absent = sorted(lists.absent - present)[: len(choice.categories) - len(head)]
    assert choice.categories[len(head) : len(head) + len(absent)] == absent
    assert not set(choice.categories[len(head) :]) & present
    assert choice.supervised == set(classes(choice.extracted)) - lists.partial - lists.absent
    for category, truth in zip(choice.categories, choice.truth, strict=True):
        wanted = NOTHING if category not in present else IF_MATCHED if category in choice.supervised else OBJECT
        assert truth == wanted


def test_the_choice_follows_the_generator() -> None:
    labels, areas = [0] * 20 + [1] * 20, [50] * 40
    drawn = [choose(labels, areas, 300, SegPromptConfig(), generator(seed)) for seed in (1, 1, 2)]
    assert (
        drawn[0] == drawn[1] and drawn[0].prompted != drawn[2].prompted and drawn[0].categories != drawn[2].categories
    )


def test_chosen_targets() -> None:
    batch = drawn_batch((5, 0, 2))
    part = chosen(batch, [[4, 1], [], [0]], 3)
    assert part.counts.tolist() == [2, 0, 1] and part.masks.shape == (3, 3)
    dense, whole = part.masks.to_dense(), batch.masks.to_dense()
    assert torch.equal(dense[0, 0], whole[0, 4]) and torch.equal(dense[0, 1], whole[0, 1])
    assert torch.equal(dense[2, 0], whole[2, 0]) and not dense[0, 2].any() and not dense[1].any()
    assert part.labels[0].tolist() == [int(batch.labels[0, 4]), int(batch.labels[0, 1]), 0]
    assert chosen(drawn_batch((0, 0)), [[], []]).masks.shape == (2, 0)


# -- prompts
def test_prompts_by_hand() -> None:
    cache = PromptCache(4, 2, momentum=0.9)
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 0.0], [7.0, 7.0], [8.0, 8.0]]])
    labels = torch.tensor([[2, 2, 0], [1, 3, 0]])
    real = torch.tensor([[True, True, False], [True, False, False]])
    cache.update(vectors, labels, real)
    assert torch.equal(cache.prompts, torch.tensor([[0.0, 0.0], [5.0, 0.0], [2.0, 3.0], [0.0, 0.0]]))
    assert cache.seen.tolist() == [False, True, True, False]
    cache.update(vectors[:1] + 10, labels[:1], real[:1])
    torch.testing.assert_close(cache.prompts, torch.tensor([[0.0, 0.0], [5.0, 0.0], [3.0, 4.0], [0.0, 0.0]]))


def drawn_vectors() -> tuple[Tensor, Tensor, Tensor]:
    random = generator(3)
    vectors = torch.randn(4, 3, 5, generator=random)
    return vectors, torch.randint(0, 4, (4, 3), generator=random), torch.rand(4, 3, generator=random) < 0.7


def update_part(rank: int, folder: str) -> None:
    """A process with one or three of the four pictures; it writes its cache after two updates."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = slice(0, 1) if rank == 0 else slice(1, 4)
    cache = PromptCache(4, 5, 0.8)
    vectors, labels, real = drawn_vectors()
    for step in range(2):
        cache.update(vectors[own] + step, labels[own], real[own])
    torch.save(cache.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_prompts_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """A category that only one process sees has the same prompt in both."""
    vectors, labels, real = drawn_vectors()
    seen = [set(labels[part][real[part]].tolist()) for part in (slice(0, 1), slice(1, 4))]
    assert seen[0] and seen[0] != seen[1]
    cache = PromptCache(4, 5, 0.8)
    for step in range(2):
        cache.update(vectors + step, labels, real)
    torch.multiprocessing.start_processes(update_part, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        own = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(own["seen"], cache.seen)
        torch.testing.assert_close(own["prompts"], cache.prompts)


def test_a_step_uses_the_prompts_before_it_and_updates_them_after() -> None:
    task, batch = task_of(), drawn_batch()
    task.train()
    task.cache.prompts.normal_(generator=generator(4))
    task.cache.seen.fill_(True)
    before = task.cache.prompts.clone()
    states = task.network.group_states(decoded(task, batch), EXTRACT)
    choices = task._choices(batch, 0)
    task(batch, 0)
    for category in range(CLASSES):
        vectors = [
            states[b, place]
            for b, choice in enumerate(choices)
            for place, target in enumerate(choice.extracted)
            if int(batch.labels[b, target]) == category
        ]
        wanted = before[category]
        if vectors:
            wanted = 0.9 * wanted + 0.1 * torch.stack(vectors).mean(0)
        torch.testing.assert_close(task.cache.prompts[category], wanted.detach(), rtol=1e-4, atol=1e-5)


# -- losses
def outputs_and_slots(seed: int = 0) -> tuple[Any, BitMasks, Tensor, Slots]:
    random = generator(seed)
    features = torch.randn(2, 16, 16, 24, generator=random, dtype=torch.float64)
    layers = 2

    def draw(*shape: int) -> list[Tensor]:
        return [torch.randn(2, *shape, generator=random, dtype=torch.float64).requires_grad_() for _ in range(layers)]

    outputs = Outputs(draw(8, 2), draw(8, 16), draw(8, 16), features, last=features)
    masks = BitMasks.from_dense(
        torch.nn.functional.interpolate(torch.randn(2, 5, 4, 6, generator=random), (64, 96)) > 0
    )
    counts = torch.tensor([5, 3])
    slots = Slots(
        torch.tensor([[0, 0, 2, 2, 3, 3, 5, 5], [1, 1, 2, 2, 4, 4, 5, 5]]),
        torch.tensor([[0, 0, 0, 2, 4], [2, 5, 5, 0, 0]]),
        torch.tensor(
            [
                [IF_MATCHED] * 2 + [OBJECT] * 2 + [NOTHING] * 4,
                [NOTHING] * 2 + [IF_MATCHED] * 2 + [NOTHING] * 2 + [OBJECT] * 2,
            ]
        ),
        torch.tensor([[True, True, True, False, False], [True, False, False, False, False]]),
    )
    return outputs, masks, counts, slots


def test_slots_are_matched_as_by_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three objects of class 0 for two slots, an object of a class without slots; pairs of unequal classes are dropped."""
    outputs, masks, counts, slots = outputs_and_slots()
    cost = torch.randn(2, 8, 5, generator=generator(5), dtype=torch.float64)
    monkeypatch.setattr(loss, "point_cost", lambda *args, **how: cost)
    rows = loss.slot_assignment(
        outputs.classes[0], outputs.mask_features, outputs.embeddings[0], masks, counts, slots, TINY
    )
    probability = outputs.classes[0].detach().softmax(-1)
    for image in range(2):
        number = int(counts[image])
        whole = np.zeros((8, number))
        for slot, target in itertools.product(range(8), range(number)):
            foreign = 1000.0 if int(slots.classes[image, slot]) != int(slots.labels[image, target]) else 0.0
            whole[slot, target] = float(cost[image, slot, target]) - 2 * float(probability[image, slot, 0]) + foreign
        found = dict(zip(*reversed(linear_sum_assignment(whole)), strict=True))  # {target: slot}
        for target in range(5):
            slot = found.get(target, -1)
            same = slot >= 0 and int(slots.classes[image, slot]) == int(slots.labels[image, target])
            assert int(rows[image, target]) == (slot if same else -1)
    assert int((rows[0, :3] >= 0).sum()) == 2 and int(rows[0, 4]) == -1


def test_one_slot_and_one_object_of_each_category() -> None:
    outputs, masks, counts, _ = outputs_and_slots()
    labels = torch.tensor([[3, 1, 0, 2, 4], [2, 1, 0, 3, 4]])
    slots = Slots(
        torch.arange(8).expand(2, 8), labels, torch.full((2, 8), IF_MATCHED), torch.ones(2, 5, dtype=torch.bool)
    )
    rows = loss.slot_assignment(
        outputs.classes[0], outputs.mask_features, outputs.embeddings[0], masks, counts, slots, TINY
    )
    real = torch.arange(5) < counts[:, None]
    assert torch.equal(rows, torch.where(real, labels, -1))


def test_truth_of_slots_by_hand() -> None:
    _, _, _, slots = outputs_and_slots()
    rows = torch.tensor([[1, -1, -1, 2, -1], [3, 6, -1, -1, -1]])
    truth = loss.slot_truth(rows, slots)  # 0: an object
    assert truth.tolist() == [[1, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 0, 0]]


def test_slots_of_one_class_have_the_loss_of_own_queries() -> None:
    """The loss of own queries equals transformers' (tests/models/test_mask2former.py). Points are drawn from equal seeds."""
    outputs, masks, counts, _ = outputs_and_slots()
    labels = torch.zeros(2, 5, dtype=torch.int64)
    slots = Slots(
        torch.zeros(2, 8, dtype=torch.int64), labels, torch.full((2, 8), IF_MATCHED), torch.ones(2, 5, dtype=torch.bool)
    )
    torch.manual_seed(0)
    found = loss.group_losses(outputs, masks, counts, slots, TINY)
    torch.manual_seed(0)
    terms = loss.losses(outputs, masks, labels, counts, TINY).terms
    for name, term in found.items():
        torch.testing.assert_close(term, sum(t for n, t in terms.items() if n.endswith(name)), rtol=1e-12, atol=0)


def test_only_compared_targets_teach_masks() -> None:
    outputs, masks, counts, slots = outputs_and_slots()
    terms = loss.group_losses(
        outputs, masks, counts, slots._replace(compared=torch.zeros(2, 5, dtype=torch.bool)), TINY
    )
    assert terms["mask"] == terms["dice"] == 0 and terms["class"] > 0
    rows = torch.tensor([[0, 1, -1, 2, -1], [2, -1, -1, -1, -1]])
    gradients = torch.autograd.grad(
        loss.group_losses(outputs, masks, counts, slots._replace(rows=rows), TINY)["mask"], outputs.embeddings[0]
    )[0]
    taught = gradients.abs().amax(2) > 0
    assert taught.tolist() == [[True, True] + [False] * 6, [False, False, True] + [False] * 5]


# -- training
def test_every_part_learns() -> None:
    task, batch = task_of(), drawn_batch()
    loss, terms = task.train()(batch, 3)
    loss.backward()
    assert {n for n in terms if "/" in n and not n.startswith("head")} == {
        f"{group}/{term}" for group in ("prompt", "extract") for term in ("class", "mask", "dice")
    }
    asked = sorted({c for choice in task._choices(batch, 3) for c in choice.categories})
    for table in (task.content, task.position):
        assert (
            table.weight.grad is not None
            and (table.weight.grad.abs().amax(1) > 0).nonzero().flatten().tolist() == asked
        )
    lacking = [
        n
        for n, p in task.named_parameters()
        if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())
    ]
    assert lacking == []


@pytest.mark.parametrize("counts", [(0, 0), (1,), (30, 2)])
def test_pictures_without_and_with_many_objects(counts: tuple[int, ...]) -> None:
    task = task_of().train()
    loss, _ = task(drawn_batch(counts), 0)
    loss.backward()
    assert torch.isfinite(loss)


def test_the_same_step_gives_the_same_loss_and_another_does_not() -> None:
    losses = []
    for step in (2, 2, 3):
        task = task_of().train()
        torch.manual_seed(0)
        losses.append(float(task(drawn_batch(), step)[0].detach()))
    assert losses[0] == losses[1] != losses[2]


def test_errors() -> None:
    with pytest.raises(ValueError, match="must have 1 class"):
        SegPrompt(Mask2Former(replace(TINY, num_classes=3)), SMALL, vocabulary=3)
    with pytest.raises(ValueError, match="copies: must be at most"):
        SegPrompt(Mask2Former(TINY), replace(SMALL, copies=13), vocabulary=3)
    with pytest.raises(ValueError, match="momentum"):
        SegPromptConfig(momentum=1.5)


def test_lists_of_pictures_reach_the_choice(tmp_path: Path) -> None:
    """Classes count by ascending category id; lists of other categories do not count."""
    write_scenes(tmp_path, 3, size=(64, 64))
    path = tmp_path / "instances.json"
    data = json.loads(path.read_text())
    data["images"][0] |= {"neg_category_ids": [2, 77], "not_exhaustive_category_ids": [6]}
    data["images"][2] |= {"neg_category_ids": [77], "not_exhaustive_category_ids": []}
    path.write_text(json.dumps(data))
    dataset = CocoDataset(tmp_path / "images", path)
    task = SegPrompt.on(Mask2Former(TINY), SMALL, dataset, 0)
    assert task.lists == {0: Lists(frozenset({1}), frozenset({5}))} and task.vocabulary == 6
    data["images"][1]["neg_category_ids"] = [None]
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="picture 1: neg_category_ids must be a list of category ids"):
        CocoDataset(tmp_path / "images", path)
