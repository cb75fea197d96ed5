"""mean_field: tables by hand, the acceptance checks of Mask Auto-Labeler, symmetry, the same bits on every backend."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import sprompt
from sprompt import backends, cuda
from sprompt.ops import mean_field
from sprompt.testing.compare import assert_same_bits
from sprompt.testing.specs.mean_field import oracle, products, scene

pytestmark = pytest.mark.usefixtures("backend")
NAN, INF = math.nan, math.inf


def labels(images: Tensor, start: Tensor, boxes: Tensor, **options: float) -> Tensor:
    """One crop (3, h, w), (h, w), (h, w) -> bool (h, w)."""
    return mean_field(images[None], start[None], boxes[None], **options).to_dense()[0]


def box_of_60() -> Tensor:
    box = torch.zeros(128, 128)
    box[34:94, 34:94] = 1
    return box


@pytest.mark.parametrize(
    ("q", "t", "iterations", "label"),
    ((0.6, 1.0, 0, True), (0.6, 0.8, 0, False), (0.6, 1.0, 1, True), (0.9, 0.6, 0, True), (0.9, 0.6, 1, False),
     (0.9, 0.8, 3, True), (1.0, 0.8, 3, True), (0.9, 0.8, 4, True), (0.7, 0.8, 3, False), (1.0, 0.0, 0, False)),
)  # fmt: skip
def test_one_pixel_by_hand(q: float, t: float, iterations: int, label: bool):
    """A pixel without neighbours: odds of x start at qt / (1 − qt), at most 9, and every iteration multiplies them by t."""
    one = torch.ones(1, 1)
    assert labels(one.expand(3, 1, 1), q * one, t * one, iterations=iterations).item() is label


def test_two_pixels_by_hand():
    """Equal colours: the odds 4 and 2/3 multiply to 8/3 in both pixels, so both are foreground after one iteration. Colours
    whose weight is 0.1: 4^1 (2/3)^0.1 and (2/3)^1 4^0.1 = 0.77."""
    q, box = torch.tensor([[0.8, 0.4]]), torch.ones(1, 2)
    far = 0.1 * math.sqrt(2 * math.log(10))
    for distance, expected in ((0.0, [[True, True]]), (far, [[True, False]])):
        images = torch.zeros(3, 1, 2)
        images[1, 0, 1] = distance
        assert labels(images, q, box, iterations=1).tolist() == expected


def test_a_constant_image_rounds_the_corners():
    """The box loses 8 pixels at each corner: 4, 2, 1 and 1 in the four rows. The last 8 pixels flip at iteration 91 or 92."""
    box = box_of_60()
    found = {n: labels(torch.zeros(3, 128, 128), torch.ones(128, 128), box, iterations=n) for n in (90, 92, 100)}
    expected = box > 0
    for row, lost in enumerate((4, 2, 1, 1)):
        for y in (34 + row, 93 - row):
            expected[y, 34 : 34 + lost] = expected[y, 94 - lost : 94] = False
    assert torch.equal(found[100], expected) and torch.equal(found[92], expected)
    assert found[90].sum() == expected.sum() + 8


def test_labels_do_not_cross_a_colour_step():
    box = box_of_60()
    step, left = torch.zeros(3, 128, 128), torch.zeros(128, 128)
    step[:, :, 60:], left[:, :60] = 1.0, 1.0
    found = labels(step, left, box)
    assert not found[:, 60:].any() and found[40:88, 40:60].all()


@pytest.mark.parametrize("iterations", (1, 30))
def test_flips_and_transposition(iterations: int):
    """To the bit: the order of the sums has the symmetry of a square."""
    inputs = undecided(40, 33) if iterations == 1 else scene(1, 40, 33, 1, 0.1)
    plain = mean_field(*inputs, iterations=iterations).to_dense()
    assert 0.1 < plain.float().mean() < 0.8
    for rows, columns, transposed in itertools.product((False, True), repeat=3):

        def moved(x: Tensor, rows: bool = rows, columns: bool = columns, transposed: bool = transposed) -> Tensor:
            x = x.flip([-2] * rows + [-1] * columns)
            return x.mT if transposed else x

        assert torch.equal(mean_field(*map(moved, inputs), iterations=iterations).to_dense(), moved(plain))


def test_pixels_outside_the_map_contribute_nothing():
    """The crop in a larger one, whose border has colours so far away that all weights are 0."""
    images, start, boxes = scene(1, 21, 35, 2)
    boxes = torch.ones_like(boxes)
    larger = torch.full((1, 3, 30, 50), 100.0), torch.rand(1, 30, 50), torch.ones(1, 30, 50)
    for whole, part in zip(larger, (images, start, boxes), strict=True):
        whole[..., 4:25, 9:44] = part
    plain = mean_field(images, start, boxes, iterations=25).to_dense()
    assert torch.equal(mean_field(*larger, iterations=25).to_dense()[:, 4:25, 9:44], plain)
    assert 0.05 < plain.float().mean() < 0.95


def test_an_early_end_changes_nothing():
    """2^40 iterations end because one changed nothing. In a crop of noise, regions settle at different times."""
    halves = torch.zeros(3, 12, 40)
    halves[:, :, 17:] = 1.0
    settled = halves, 1 - halves[0], torch.ones(12, 40)
    assert torch.equal(labels(*settled, iterations=2**40), halves[0] == 0)
    noisy = scene(1, 50, 70, 3, 0.1)
    for n in (1, 2, 3, 10, 57, 100):
        assert torch.equal(mean_field(*noisy, iterations=n).to_dense(), products(*noisy, iterations=n) > 0.5)


@pytest.mark.parametrize(("h", "w", "t"), ((1, 210, 0.08), (210, 1, 0.08), (70, 150, 1e-3), (150, 70, 1e-3)))
def test_a_front_crosses_settled_regions(h: int, w: int, t: float):
    """Colours are equal, and t is so small that foreground needs more than half of its neighbours: a block of it loses a layer
    of pixels in every few iterations, while all other pixels keep their states."""
    start, box = torch.zeros(1, h, w), torch.full((1, h, w), t)
    start[:, h // 8 : h - h // 8, w // 8 : w - w // 8] = 1 / t
    areas = []
    for n in (5, 11, 20):
        found = mean_field(torch.zeros(1, 3, h, w), start, box, iterations=n)
        assert torch.equal(found.to_dense(), products(torch.zeros(1, 3, h, w), start, box, iterations=n) > 0.5)
        areas.append(found.area().item())
    assert areas[0] > areas[1] > areas[2] > 0


@pytest.mark.parametrize("noise", (0.03, 0.1))
def test_labels_of_float64(noise: float):
    inputs = scene(1, 128, 128, 4, noise)
    off = mean_field(*inputs).to_dense() != oracle(*inputs).to_dense()
    assert off.sum() <= 1


def test_what_is_not_a_number():
    """Equal colours, but pixel 2's is NaN: it neither gives nor takes. A NaN start is `low`, a NaN box is background."""
    images = torch.zeros(3, 1, 6)
    images[1, 0, 2] = NAN
    q, t = torch.tensor([[0.8, 0.8, 0.6, 0.2, NAN, 0.9]]), torch.ones(1, 6)
    assert labels(images, q, t, iterations=0).tolist() == [[True, True, True, False, False, True]]
    # Odds after one iteration: 16, 16, 1.5, 1/4 · 1/9, 1/4 · 1/9 · 9, 1/9 · 9 (1 is not above ½).
    assert labels(images, q, t, iterations=1).tolist() == [[True, True, True, False, False, False]]
    t[0, 1] = NAN
    assert labels(images, q, t, iterations=0).tolist() == [[True, False, True, False, False, True]]
    for colour in (INF, -INF):
        images[1, 0, 2] = colour
        assert labels(images, q, t, iterations=1)[0, 2]


def test_subnormal_boxes_are_background():
    tiny = torch.finfo(torch.float32).tiny
    t = torch.tensor([[1.0, tiny / 2, 0.0, -0.0, -1.0, tiny, 1.0]])
    found = labels(torch.zeros(3, 1, 7), torch.full((1, 7), 2e38), t, iterations=0)
    assert found.tolist() == [[True, False, False, False, False, True, True]]


def test_a_crop_does_not_depend_on_its_batch():
    inputs = scene(5, 20, 31, 5)
    together = mean_field(*inputs, iterations=9)
    for b in range(5):
        assert_same_bits(mean_field(*(x[b : b + 1] for x in inputs), iterations=9), together[b : b + 1])


def undecided(h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """Crops in which one iteration moves every pixel to x = ½, up to rounding. So a label is a sign of rounding errors, and
    shows each of them. t is chosen by float64, and q so that q t is as drawn. Some t are above 1."""
    g = torch.Generator().manual_seed(h)
    images = 0.08 * torch.randn(4, 3, h, w, generator=g)
    x = 0.1 + 0.8 * torch.rand(4, h, w, generator=g)
    wide, z = (
        torch.nn.functional.pad(images.double(), (1, 1, 1, 1), value=math.inf),
        (x.double() / (1 - x.double())).log(),
    )
    sums = []
    for u in (z, -(1 - x.double()).log()):
        around, total = torch.nn.functional.pad(u, (1, 1, 1, 1)), u.clone()
        for dy, dx in itertools.product(range(3), repeat=2):
            if (dy, dx) != (1, 1):
                d = (wide[..., dy : dy + h, dx : dx + w] - images.double()).square().sum(1)
                total += (-50 * d).exp() * around[:, dy : dy + h, dx : dx + w]
        sums.append(total)
    t = ((1 + 1e-6 * sums[1].exp()).log() - sums[0]).exp().float()
    return images, x / t, t


def same_bits(backend: str, h: int, w: int):
    inputs, found = undecided(h, w), []
    for name in (backend, "reference"):
        with sprompt.use_backend(name, ["mean_field"]):
            found.append(mean_field(*inputs, iterations=1))
    assert_same_bits(*found)
    assert 0.2 < found[0].area().sum() / (4 * h * w) < 0.8


once = pytest.mark.parametrize("backend", ["reference"], indirect=True)  # tests that choose their backends
by_size = pytest.mark.parametrize(("h", "w"), ((45, 70), (3, 129), (64, 2)))


@by_size
def test_same_bits_on_every_backend(h: int, w: int, backend: str):
    if backend not in backends.registered("mean_field"):
        pytest.skip(f"mean_field has no {backend} kernel")
    same_bits(backend, h, w)


@pytest.mark.skipif(bool(cuda.why_not(torch.empty(0))), reason="this build does not emulate the CUDA kernels")
@once
@by_size
def test_same_bits_on_cuda(h: int, w: int, backend: str):
    same_bits("cuda", h, w)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@once
def test_same_bits_on_a_gpu(backend: str):
    for noise in (0.03, 0.1):
        inputs = scene(4, 128, 128, 7, noise)
        expected = mean_field(*inputs)
        with sprompt.use_backend("cuda", ["mean_field"]):
            assert_same_bits(mean_field(*(x.cuda() for x in inputs)).to("cpu"), expected)


def test_dtypes_may_differ():
    images, start, boxes = scene(1, 10, 11, 6)
    mixed = images.bfloat16(), start, boxes.half()
    assert_same_bits(mean_field(*mixed, iterations=3), mean_field(*(x.float() for x in mixed), iterations=3))
