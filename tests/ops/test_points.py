"""sample_points, point_cost, point_loss: Philox, tables by hand, the selection of points, NaN, seeds."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sprompt import BitMasks, use_backend
from sprompt.ops import pack_masks, point_cost, point_loss, sample_points
from sprompt.ops.points.philox import draw, philox
from sprompt.testing.spec import blobs, random
from sprompt.testing.specs.points import drawn

NAN = float("nan")
SEED = torch.tensor(-0x123456789ABCDEF)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    (
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ),
)
def test_known_answers_of_random123(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    found = philox(*(tuple(torch.tensor(value) for value in values) for values in (counter, key)))
    assert tuple(map(int, found)) == words


@pytest.mark.parametrize("seed", (0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF))
def test_points_of_a_seed(seed: int) -> None:
    points = draw(torch.tensor(seed), 3, torch.arange(70))
    for mask in range(3):
        assert torch.equal(points[mask].double(), torch.from_numpy(drawn(seed, mask, 0, 70)))
    assert points.min() >= 0 and points.max() < 1


@pytest.mark.parametrize("number", (1, 2, 15, 16, 17, 33, 700))
def test_every_op_draws_the_points_of_its_seed(number: int) -> None:
    """A drawn call equals, to the bit, a call with the points of the reference: so every kernel draws these points."""
    logits, targets = torch.randn(4, 9, 21, generator=random(0)), blobs(4, 40, 50, 0)
    points = draw(SEED, 4, torch.arange(4 * number))
    batch = (logits[:, None], targets[:, None])
    assert torch.equal(point_cost(*batch, number=number, seed=SEED), point_cost(*batch, points=points[:, :number]))
    added = 3 * number + number - int(0.75 * number)
    by_seed = point_loss(logits, targets, number=number, seed=SEED)
    given = point_loss(logits, targets, number=number, candidates=points[:, :added])
    assert torch.equal(torch.stack(by_seed), torch.stack(given))


def test_seed_or_generator() -> None:
    logits, targets = torch.randn(3, 9, 21, generator=random(0)), blobs(3, 40, 50, 0)

    def loss(**options: object) -> Tensor:
        return torch.stack(point_loss(logits, targets, number=50, **options))

    assert torch.equal(loss(generator=random(3)), loss(generator=random(3)))
    assert not torch.equal(loss(generator=random(3)), loss(generator=random(4)))
    torch.manual_seed(5)
    first = loss()
    assert not torch.equal(first, loss())
    torch.manual_seed(5)
    assert torch.equal(first, loss())


# -- sample_points


def test_values_at_cells_edges_and_outside() -> None:
    maps = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    places = [
        (0.25, 0.25),
        (0.75, 0.75),
        (0.5, 0.5),
        (0, 0.25),
        (0, 0),
        (-0.25, 0.25),
        (1.25, 0.75),
        (1.24999, 0.75),
        (NAN, 0.5),
    ]
    expected = [1.0, 4.0, 2.5, 0.5, 0.25, 0.0, 0.0, 8e-5, 0.0]
    values = sample_points(maps, torch.tensor([places]))[0, 0]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-2, atol=1e-7)
    values = sample_points(pack_masks(maps > 2), torch.tensor([places]))[0, 0]
    expected = [0.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 2e-5, 0.0]
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("value", (3e38, 0.1, -7.3))
def test_a_constant_map_is_constant(value: float) -> None:
    points = 0.2 + 0.6 * torch.rand(1, 500, 2, generator=random(0))
    assert sample_points(torch.full((1, 1, 13, 37), value), points).eq(torch.tensor(value)).all()


def test_far_points_do_not_touch_a_broken_border() -> None:
    maps = torch.full((1, 1, 3, 4), NAN)
    points = torch.tensor([[[-0.2, 0.5], [1.2, 0.5], [0.5, -5], [0.5, math.inf], [NAN, NAN], [-1e38, 1e38]]])
    assert sample_points(maps, points).eq(0).all()
    assert sample_points(maps, torch.tensor([[[-0.1, 0.5], [0.5, 1.1]]])).isnan().all()


@pytest.mark.parametrize("size", ((1, 1), (1, 32), (32, 1), (3, 11), (4, 8), (8, 4), (31, 33), (5, 129)))
def test_every_bit_is_read(size: tuple[int, int]) -> None:
    """Every pixel alone, at the centre of every pixel: first and last bits of words, rows and masks."""
    H, W = size
    masks = torch.eye(H * W).reshape(1, H * W, H, W)
    y, x = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")
    points = torch.stack((x, y), -1).reshape(1, -1, 2)
    torch.testing.assert_close(sample_points(pack_masks(masks), points)[0], torch.eye(H * W), rtol=0, atol=1e-4)


def test_gradient_is_the_transpose() -> None:
    maps = torch.randn(2, 3, 6, 9, generator=random(0), requires_grad=True)
    points = torch.rand(2, 200, 2, generator=random(1)) * 1.2 - 0.1
    out = sample_points(maps, points)
    theirs = F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False)[:, :, 0]
    weights = torch.randn(out.shape, generator=random(2))
    a, b = (torch.autograd.grad((values * weights).sum(), maps)[0] for values in (out, theirs))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", (NAN, math.inf, -math.inf))
def test_a_gradient_that_is_not_finite_breaks_its_cells_only(value: float) -> None:
    """The point lies between the cells of rows 1, 2 and columns 3, 4 of one map. Other values are 1."""
    maps = torch.zeros(2, 3, 5, 8, requires_grad=True)
    grad = torch.ones(2, 3, 9)
    grad[1, 2, 4] = value
    points = torch.rand(2, 9, 2, generator=random(0))
    points[1, 4] = torch.tensor([4.25 / 8, 1.75 / 5])
    found = torch.autograd.grad(sample_points(maps, points), maps, grad)[0]
    expected = torch.zeros(2, 3, 5, 8, dtype=torch.bool)
    expected[1, 2, 1:3, 3:5] = True
    assert torch.equal(~found.isfinite(), expected)


# -- point_cost


def test_cost_by_hand() -> None:
    """Points on the centres of two pixels: z = (2, −1), t = (1, 0)."""
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    bce = -(math.log(p[0]) + math.log(1 - p[1])) / 2
    dice = 1 - (2 * p[0] + 1) / (p[0] + p[1] + 1 + 1)
    points = torch.tensor([[[0.25, 0.5], [0.75, 0.5]]])
    target = torch.tensor([[[[True, False]]]])
    logits = torch.tensor([[[[2.0, -1.0]]]])
    for weights in ((1, 0), (0, 1), (2, 5)):
        cost = point_cost(logits, target, points=points, weights=weights)
        assert cost.item() == pytest.approx(weights[0] * bce + weights[1] * dice, rel=1e-5)


@pytest.mark.parametrize("number", (1, 100, 3000))
def test_pair_equals_its_logits(number: int) -> None:
    """Sampling and multiplication commute."""
    features, kernels = torch.randn(2, 40, 25, 42, generator=random(0)), torch.randn(2, 23, 40, generator=random(1)) / 6
    logits = torch.einsum("bchw,bnc->bnhw", features, kernels)
    targets = pack_masks(blobs(14, 100, 168, 0)).reshape(2, 7)
    pair, plain = (point_cost(z, targets, number=number, seed=SEED) for z in ((features, kernels), logits))
    torch.testing.assert_close(pair, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ((200, 3), (3, 200), (64, 64)))
def test_cost_equals_the_reference_on_many_points(shape: tuple[int, int]) -> None:
    """More points than a block of any kernel, and maps with more and with fewer rows than a block."""
    logits, targets = 3 * torch.randn(1, 7, *shape, generator=random(0)), blobs(5, 90, 77, 0)[None]
    for number in (511, 4097, 20_000):
        ours = point_cost(logits, targets, number=number, seed=SEED)
        with use_backend("reference"):
            exact = point_cost(logits.double(), targets, number=number, seed=SEED)
        torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=2e-5)


def test_nan_stays_in_its_row() -> None:
    logits = torch.randn(2, 4, 8, 9, generator=random(0))
    logits[1, 2] = NAN
    cost = point_cost(logits, blobs(6, 16, 18, 0).reshape(2, 3, 16, 18), torch.tensor([3, 2]), number=300, seed=SEED)
    assert cost[1, 2, :2].isnan().all() and cost[1, 2, 2] == 0
    cost[1, 2] = 0
    assert cost.isfinite().all()


# -- point_loss


def test_loss_by_hand() -> None:
    """Candidates on three pixels of |z| = 2, 1, 3: the two least are kept, then one is added."""
    z, centres = [2.0, -1.0, 3.0], [(1 / 6, 0.5), (0.5, 0.5), (5 / 6, 0.5)]
    logits, target = torch.tensor([[z]]), torch.tensor([[[True, False, True]]])
    candidates = torch.tensor([[centres[2], centres[0], centres[1], centres[2]]])
    bce, dice = point_loss(logits, target, number=3, oversample=1, importance=0.7, candidates=candidates)
    p = [1 / (1 + math.exp(-v)) for v in z]
    t = [1, 0, 1]
    assert bce.item() == pytest.approx(
        -sum(math.log(q if u else 1 - q) for q, u in zip(p, t, strict=True)) / 3, rel=1e-5
    )
    assert dice.item() == pytest.approx(1 - (2 * (p[0] + p[2]) + 1) / (sum(p) + 2 + 1), rel=1e-5)


def _selected(logits: Tensor, candidates: Tensor, number: int) -> Tensor:
    """The candidates (M, 3 · number) that were kept: they have a gradient in their own pixel."""
    chosen = torch.ops.sprompt.point_loss(
        logits,
        torch.zeros(len(logits), 1, dtype=torch.int32),
        1,
        1,
        None,
        candidates,
        number,
        candidates.shape[1],
        number,
    )[2]
    return chosen


@pytest.mark.parametrize("number", (1, 5, 64, 1000, 5000))
def test_selection_equals_a_stable_sort(number: int) -> None:
    """Few different values, so that there are many ties, and a NaN. Indices are compared exactly."""
    values = (
        torch.randint(-4, 5, (3, 1, 40), generator=random(number)).float()
        * 2.0 ** torch.tensor([-60.0, 0, 100])[:, None, None]
    )
    values[1, 0, 7] = NAN
    place = torch.randint(0, 40, (3, 3 * number), generator=random(1))
    candidates = torch.stack(((place + 0.5) / 40, torch.full(place.shape, 0.5)), -1)
    z = sample_points(values[:, None], candidates)[:, 0].abs()
    expected = torch.where(z.isnan(), -1, z).sort(dim=1, stable=True).indices[:, :number].sort(1).values
    assert torch.equal(_selected(values, candidates, number).long(), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_selection_is_that_of_the_reference(dtype: torch.dtype) -> None:
    """To the index, on maps as of a network."""
    logits, words = 3 * torch.randn(3, 50, 84, generator=random(0)), torch.zeros(3, 1, dtype=torch.int32)
    arguments = logits.to(dtype), words, 1, 1, SEED, None, 3000, 9000, 2250
    chosen = torch.ops.sprompt.point_loss(*arguments)[2]
    with use_backend("reference"):
        assert torch.equal(chosen, torch.ops.sprompt.point_loss(*arguments)[2])


@pytest.mark.parametrize("options", ({}, {"importance": 1.0, "oversample": 1.0}, {"importance": 0.0}))
def test_gradient_equals_autograd(options: dict[str, float]) -> None:
    logits = (2 * torch.randn(3, 9, 21, generator=random(0))).requires_grad_()
    targets = pack_masks(blobs(3, 40, 50, 0))
    bce, dice = point_loss(logits, targets, number=400, seed=SEED, **options)
    weights = torch.randn(2, 3, generator=random(1))
    ours = torch.autograd.grad((bce * weights[0] + dice * weights[1]).sum(), logits)[0]
    many, kept = int(options.get("oversample", 3.0) * 400), int(options.get("importance", 0.75) * 400)
    every = draw(SEED, 3, torch.arange(many + 400 - kept))
    z = F.grid_sample(logits[:, None], 2 * every[:, None] - 1, align_corners=False)[:, 0, 0]
    order = z[:, :many].abs().sort(dim=1, stable=True).indices[:, :kept]
    index = torch.cat((order, torch.arange(many, every.shape[1]).expand(3, -1)), 1)
    z = z.gather(1, index)
    t = sample_points(targets[:, None], every.gather(1, index[..., None].expand(-1, -1, 2)))[:, 0]
    p = z.sigmoid()
    plain = F.binary_cross_entropy_with_logits(z, t, reduction="none").mean(1)
    plain_dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    torch.testing.assert_close(bce, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dice, plain_dice, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad((plain * weights[0] + plain_dice * weights[1]).sum(), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_broken_logit_breaks_its_mask_only() -> None:
    logits = torch.randn(3, 12, 20, generator=random(0))
    logits[1, 6, 10] = NAN
    logits.requires_grad_()
    bce, dice = point_loss(logits, blobs(3, 40, 50, 0), number=500, seed=SEED)
    for loss in (bce, dice):
        assert loss.isnan().tolist() == [False, True, False]
    grad = torch.autograd.grad(bce.sum() + dice.sum(), logits)[0]
    assert grad[0].isfinite().all() and grad[1].isnan().any() and grad[2].isfinite().all()


@pytest.mark.parametrize("value", (NAN, math.inf, -math.inf))
@pytest.mark.parametrize("which", (0, 1))
def test_gradient_that_is_not_finite_gives_nan(value: float, which: int) -> None:
    logits = torch.randn(3, 12, 20, generator=random(0), requires_grad=True)
    losses = point_loss(logits, blobs(3, 40, 50, 0), number=50, seed=SEED)
    grads = [torch.ones(3), torch.ones(3)]
    grads[which][2] = value
    grad = torch.autograd.grad(losses, logits, grads)[0]
    assert grad[2].isnan().all() and grad[:2].isfinite().all()


def test_no_masks_are_connected() -> None:
    logits = torch.zeros(0, 12, 20, requires_grad=True)
    bce, dice = point_loss(logits, BitMasks(torch.zeros(0, 2, dtype=torch.int32), (7, 9)))
    (bce.sum() + dice.sum()).backward()
    assert logits.grad is not None and logits.grad.shape == (0, 12, 20)
