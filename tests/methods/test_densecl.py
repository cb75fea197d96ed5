"""DenseCL against its formulas written out, and what a step changes and leaves alone."""

import copy
import math

import pytest
import torch
from torch import Tensor

from sprompt.data.sample import Sample
from sprompt.data.synthetic import scene
from sprompt.masks import BitMasks
from sprompt.methods.densecl import DenseCL, DenseCLConfig, TwoViews, Views, collate_views
from sprompt.methods.densecl.task import correspondence
from sprompt.normalisation import MEAN, STD

CONFIG = DenseCLConfig(depth=18, width=4, embedding=8, queue=12, momentum=0.9, dense_level="C4")


def random_views(seed: int, count: int = 4, size: int = 64) -> Views:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, count, 3, size, size, generator=generator)
    return Views(first, second, [str(i) for i in range(count)])


def sample(index: int, size: tuple[int, int] = (96, 80)) -> Sample:
    image = scene(3, index, size).image
    return Sample(
        image,
        BitMasks.from_dense(torch.zeros(0, *size, dtype=torch.bool)),
        torch.zeros(0).long(),
        index,
        str(index),
        size,
    )


def trained(config: DenseCLConfig = CONFIG, steps: int = 2) -> DenseCL:
    """A task after some steps, so that its queue and key encoder differ from the start."""
    task = DenseCL(config)
    optimiser = torch.optim.SGD(task.parameters(), lr=0.1)
    for step in range(steps):
        loss, _ = task(random_views(step), step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return task


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def literal_terms(
    task: DenseCL, batch: Views, maps: list[Tensor], key_maps: list[Tensor], queues: list[Tensor]
) -> list[float]:
    """The two losses by loops over queries, cells and keys; `queues` are lists of (picture or None, vector)."""
    level = {"C4": 2, "C5": 3}[task.config.dense_level]

    def heads(module: torch.nn.Module, last: Tensor, cells: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Of one picture: last (D, h, w), cells (D, h, w)."""
        t = {name: tensor.double() for name, tensor in module.state_dict().items()}
        pooled = last.double().mean((1, 2))
        whole = (
            t["whole.2.weight"] @ (t["whole.0.weight"] @ pooled + t["whole.0.bias"]).clamp(min=0) + t["whole.2.bias"]
        )
        vectors = []
        for cell in cells.double().flatten(1).T:
            hidden = (t["dense.0.weight"][..., 0, 0] @ cell + t["dense.0.bias"]).clamp(min=0)
            vectors.append(unit(t["dense.2.weight"][..., 0, 0] @ hidden + t["dense.2.bias"]))
        return unit(whole), vectors

    q = [heads(task.heads, maps[-1][i], maps[level][i]) for i in range(len(batch))]
    k = [heads(task.key_heads, key_maps[-1][i], key_maps[level][i]) for i in range(len(batch))]
    temperature = task.config.temperature
    whole, dense = [], []
    for i in range(len(batch)):
        others = [vector.double() for owner, vector in queues[0] if owner != i]
        others += [k[j][0] for j in range(len(batch)) if j != i]
        own = math.exp(float(q[i][0] @ k[i][0]) / temperature)
        whole.append(-math.log(own / (own + sum(math.exp(float(q[i][0] @ other) / temperature) for other in others))))
        others = [vector.double() for owner, vector in queues[1] if owner != i]
        others += [unit(sum(k[j][1]) / len(k[j][1])) for j in range(len(batch)) if j != i]
        cells, key_cells = maps[level][i].double().flatten(1).T, key_maps[level][i].double().flatten(1).T
        for cell, vector in zip(cells, q[i][1], strict=True):
            alike = [float(unit(cell) @ unit(key_cell)) for key_cell in key_cells]
            place = max(range(len(alike)), key=alike.__getitem__)
            own = math.exp(float(vector @ k[i][1][place]) / temperature)
            dense.append(
                -math.log(own / (own + sum(math.exp(float(vector @ other) / temperature) for other in others)))
            )
    return [sum(whole) / len(whole), sum(dense) / len(dense)]


@pytest.mark.parametrize("level", ["C4", "C5"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_loss_by_loops(level, steps):
    """With an empty queue, a queue with free places, a full queue, and a queue with replaced keys."""
    config = DenseCLConfig(depth=18, width=4, embedding=8, queue=10, momentum=0.9, dense_level=level, dense_weight=0.3)
    task = trained(config, steps)
    batch = random_views(99)
    old = [(task.queue[p].clone(), task.dense_queue[p].clone()) for p in range(10)]
    seen = 4 * steps
    kept = [p for p in range(min(seen, 10)) if p not in [(seen + i) % 10 for i in range(4)]]
    with torch.no_grad():
        maps = copy.deepcopy(task).backbone(batch.first)  # batch norm learns in a forward pass
    loss, logs = task(batch, steps)
    key_maps = task.key_backbone(batch.second)
    queues = [[(None, old[p][which]) for p in kept] for which in (0, 1)]
    whole, dense = literal_terms(task, batch, maps, key_maps, queues)
    assert logs["global"].item() == pytest.approx(0.7 * whole, rel=1e-4)
    assert logs["dense"].item() == pytest.approx(0.3 * dense, rel=1e-4)
    assert loss.item() == pytest.approx(0.7 * whole + 0.3 * dense, rel=1e-4)
    assert all(value.ndim == 0 and not value.requires_grad for value in logs.values())


def test_correspondence_by_hand():
    directions = torch.eye(4)
    keys = directions[[2, 0, 3, 1]].T.reshape(1, 4, 2, 2)  # cell 0 has direction 2, ...
    queries = (torch.tensor([[9.0], [0.1], [3.0], [7.0]]) * directions + 0.01).T.reshape(1, 4, 2, 2)
    assert correspondence(queries, keys * torch.tensor([[0.1, 8.0], [2.0, 1.0]])).tolist() == [[1, 3, 0, 2]]
    wide = torch.cat((keys, keys), 3)  # cells 0 1 0 1 / 2 3 2 3: the first of equals
    assert correspondence(queries, wide).tolist() == [[1, 5, 0, 4]]


def test_queues_take_the_newest_keys_in_turn():
    task = DenseCL(CONFIG)
    written: list[tuple[Tensor, Tensor]] = []
    for step in range(5):  # 20 keys into 12 places
        task(random_views(step), step)
        with torch.no_grad():
            maps = task.key_backbone(random_views(step).second)
            whole, cells = task.key_heads(maps[-1], maps[2])
        mean = cells.flatten(2).mean(2)
        written += list(zip(whole, mean / mean.norm(dim=1, keepdim=True), strict=True))
        for place in range(12):
            last = max((i for i in range(len(written)) if i % 12 == place), default=None)
            want = (torch.zeros(8), torch.zeros(8)) if last is None else written[last]
            torch.testing.assert_close(task.queue[place], want[0])
            torch.testing.assert_close(task.dense_queue[place], want[1])
    assert task.keys_seen.item() == 20


def test_key_encoder_follows():
    task = trained(steps=3)
    pairs = [(task.key_backbone, task.backbone), (task.key_heads, task.heads)]
    for step, momentum in ((3, 3 / 13), (1000, 0.9)):
        before = [copy.deepcopy(pair) for pair in pairs]
        task(random_views(step), step)
        for (key, _), (old_key, query) in zip(pairs, before, strict=True):
            for name, value in key.state_dict().items():
                old, new = old_key.state_dict()[name], query.state_dict()[name]
                want = momentum * old + (1 - momentum) * new if value.is_floating_point() else new
                torch.testing.assert_close(value, want)
    fresh = DenseCL(CONFIG)
    torch.nn.init.ones_(fresh.heads.whole[0].weight)
    fresh(random_views(0), 0)
    assert torch.equal(fresh.key_heads.whole[0].weight, fresh.heads.whole[0].weight)


def test_gradients_reach_the_query_side_only():
    task = trained(steps=2)
    for module in (task.key_backbone, task.key_heads):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    task(random_views(9), 2)[0].backward()
    for name, parameter in task.named_parameters():
        if name.startswith("key_"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert not task.queue.requires_grad


def test_evaluation_changes_nothing():
    task = trained(steps=2).eval()
    before = copy.deepcopy(task.state_dict())
    first, second = task(random_views(9), 2), task(random_views(9), 2)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_state_dict_is_all_there_is():
    task = trained(steps=2)
    again = DenseCL(CONFIG)
    again.load_state_dict(task.state_dict())
    for step in (2, 3):
        assert torch.equal(task(random_views(step), step)[0], again(random_views(step), step)[0])


def test_first_weights_come_from_the_seed():
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    tasks = [DenseCL(CONFIG), DenseCL(CONFIG)]
    assert torch.equal(torch.rand(()), expected), "the global generator is left alone"
    other = DenseCL(DenseCLConfig(depth=18, width=4, embedding=8, queue=12, seed=1, dense_level="C4"))
    same = [torch.equal(a, b) for a, b in zip(tasks[0].parameters(), tasks[1].parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(tasks[0].backbone.conv1.weight, other.backbone.conv1.weight)


def test_dense_loss_waits_for_its_warmup():
    config = DenseCLConfig(depth=18, width=4, embedding=8, queue=12, dense_warmup=2)
    task = DenseCL(config)
    shares = [task(random_views(step), step)[1]["dense"].item() > 0 for step in range(4)]
    assert shares == [False, False, True, True]


def test_a_few_steps_tell_pictures_apart():
    """On twelve scenes the right view is found more often after training, and vectors do not become equal."""
    task = DenseCL(DenseCLConfig(width=8, embedding=16, queue=12, dense_level="C4"))
    views = TwoViews(size=64)
    optimiser = torch.optim.AdamW((p for p in task.parameters() if p.requires_grad), lr=2e-3)
    losses = []
    for step in range(20):
        batch = collate_views([views(sample(i), torch.Generator().manual_seed(100 * step + i)) for i in range(12)])
        loss, logs = task(batch, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), losses
    assert logs["monitor/alikeness"] < 0.95
    assert logs["monitor/dense_accuracy"] > 0.3


def test_views_are_of_their_size_and_generator():
    views = TwoViews(size=48)
    made = [views(sample(0), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert made[0].first.shape == made[0].second.shape == (3, 48, 48)
    assert made[0].first.dtype == torch.float32 and made[0].name == "0"
    assert torch.equal(made[0].first, made[1].first) and torch.equal(made[0].second, made[1].second)
    assert not torch.equal(made[0].first, made[2].first) and not torch.equal(made[0].first, made[0].second)
    low, high = ((torch.tensor([0.0, 255.0])[:, None] - torch.tensor(MEAN)) / torch.tensor(STD))[..., None, None]
    assert (made[0].first >= low - 1e-4).all() and (made[0].first <= high + 1e-4).all()
    batch = collate_views(made).to("cpu")
    assert len(batch) == 3 and batch.names == ["0"] * 3 and batch.second.shape == (3, 3, 48, 48)


def test_views_of_the_whole_picture_unchanged():
    """Without recolouring, a view of the whole picture at its own size is the picture or its mirror image."""
    views = TwoViews(size=64, crop=(1.0, 1.0), jitter=0, grey=0, blur=0)
    picture = sample(0, (64, 64))
    want = (picture.image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    found = set()
    for seed in range(8):
        view = views(picture, torch.Generator().manual_seed(seed))
        for one in (view.first, view.second):
            mirrored = not torch.allclose(one, want, atol=1e-4)
            torch.testing.assert_close(one, want.flip(2) if mirrored else want, atol=1e-4, rtol=0)
            found.add(mirrored)
    assert found == {False, True}


def test_grey_and_recoloured_views():
    grey = TwoViews(size=32, jitter=0, grey=1, blur=0)(sample(0), torch.Generator().manual_seed(0)).first
    colour = grey * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(colour[0], colour[1], atol=1e-3, rtol=0)
    torch.testing.assert_close(colour[0], colour[2], atol=1e-3, rtol=0)
    flat = Sample(
        torch.full((3, 40, 40), 99, dtype=torch.uint8), sample(0).masks, sample(0).labels, 0, "flat", (40, 40)
    )
    blurred = TwoViews(size=32, jitter=0, grey=0, blur=1)(flat, torch.Generator().manual_seed(0)).first
    torch.testing.assert_close(
        blurred * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1), torch.full_like(blurred, 99)
    )


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: DenseCLConfig(momentum=1.5), "momentum: must lie between 0 and 1"),
        (
            lambda: DenseCLConfig(backbone="vit"),
            "DenseCLConfig: backbone must be one of 'resnet', 'efficientnet-lite0'",
        ),
        (lambda: DenseCLConfig(queue=0), "queue: must be at least 1"),
        (lambda: DenseCLConfig(temperature=0), "temperature: must be above 0"),
        (lambda: TwoViews(size=8), "size: a view must have at least 32 pixels"),
        (lambda: TwoViews(crop=(0.5, 0.2)), "crop: must be two shares"),
        (lambda: TwoViews(grey=2), "grey: must lie between 0 and 1"),
        (lambda: DenseCL(CONFIG)(random_views(0, 16), 0), "queue: must hold at least a batch, got 12 places for 16"),
    ],
)
def test_bad_settings(made, message):
    with pytest.raises(ValueError, match=message):
        made()
