import math
import os

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import sprompt
from sprompt import backends
from sprompt.ops import PromptMatch, launch, mask_boxes, mask_mean, pack_masks, prompt_match, region_mean
from sprompt.testing.compare import assert_same_bits
from sprompt.testing.specs import prompt_match as match_spec
from sprompt.testing.specs import prompts as spec

ON_TRITON = not launch.why_not(torch.empty(0))  # TRITON_INTERPRET=1
BACKENDS = ["native", "reference", *["triton"] * ON_TRITON]
if os.environ.get("SPROMPT_BACKEND"):
    BACKENDS = [os.environ["SPROMPT_BACKEND"]]
NAN = math.nan


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with sprompt.use_backend(request.param, [op for op in backends.ops() if request.param in backends.registered(op)]):
        yield request.param


def cells(height: int, width: int, *boxes: list[float]) -> list[int]:
    """Which cells each box takes: a mean of powers of two tells its cells, one bit each."""
    features = (2.0 ** torch.arange(height * width)).reshape(1, 1, height, width)
    out = []
    for box in boxes:
        mean = region_mean(features, torch.tensor([[box]], dtype=torch.float64)).item()
        count = next(
            n for n in range(1, height * width + 1) if (mean * n).is_integer() and int(mean * n).bit_count() == n
        )
        out.append(int(mean * count))
    return out


# ---- region_mean


def test_cells_of_boxes():
    """One row of 4 cells: the cells of each box as bits."""
    rows = [
        ([0, 0, 4, 1], 0b1111), ([1, 0, 3, 1], 0b0110), ([1.5, 0, 2.5, 1], 0b0110), ([1.999, 0, 2.001, 1], 0b0110),
        ([2, 0, 2, 1], 0b0100), ([2.5, 0, 2.5, 1], 0b0100), ([3, 0, 1, 1], 0b1000), ([-2, 0, 1, 1], 0b0001),
        ([-0.5, 0, 0.5, 1], 0b0001), ([-9, 0, -5, 1], 0b0001), ([3.5, 0, 9, 1], 0b1000), ([4, 0, 9, 1], 0b1000),
        ([7, 0, 9, 1], 0b1000), ([-1e300, 0, 1e300, 1], 0b1111), ([1e300, 0, -1e300, 1], 0b1000), ([0, -5, 4, -4], 0b1111),
        ([0, 8, 2, 9], 0b0011), ([0.0, 0.2, 1.0, 0.3], 0b0001),
    ]  # fmt: skip
    assert cells(1, 4, *(box for box, _ in rows)) == [bits for _, bits in rows]


def test_cells_of_boxes_in_two_dimensions():
    assert cells(3, 3, [1, 0, 3, 2], [0, 2, 1, 3], [2.2, 1.2, 2.3, 2.3]) == [0b000110110, 0b001000000, 0b100100000]


def test_dtypes_of_boxes_agree():
    features = torch.randn(2, 9, 6, 11)
    boxes = torch.tensor([[0, 0, 3, 2], [4, 1, 11, 6], [-2, 3, 2, 4]]).expand(2, 3, 4)
    expected = region_mean(features, boxes)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(region_mean(features, boxes.to(dtype)), expected)
    assert torch.equal(region_mean(features, boxes.clamp(0).to(torch.uint8)), region_mean(features, boxes.clamp(0)))


def test_cells_outside_do_not_count():
    features = torch.full((1, 9, 6, 20), NAN)
    features[..., 2:4, 3:15] = 1.0
    features[..., 2, 3] = math.inf
    boxes = torch.tensor([[[4.0, 2.0, 15.0, 4.0], [3.0, 2.0, 5.0, 3.0], [0.0, 0.0, 20.0, 6.0]]])
    out = region_mean(features, boxes)
    assert out[0, 0].tolist() == [1.0] * 9
    assert out[0, 1].tolist() == [math.inf] * 9
    assert out[0, 2].isnan().all()


def test_padding_is_not_looked_at():
    features = torch.randn(3, 5, 6, 9, requires_grad=True)
    boxes = spec.random_boxes(3, 4, 6, 9, 0)
    counts = torch.tensor([2, 0, 4])
    expected = [region_mean(features[b : b + 1], boxes[b : b + 1, :n]) for b, n in enumerate(counts.tolist())]
    for b, n in enumerate(counts.tolist()):
        boxes[b, n:] = NAN
    out = region_mean(features, boxes, counts)
    for b, n in enumerate(counts.tolist()):
        assert torch.equal(out[b, :n], expected[b][0])
        assert out[b, n:].abs().sum() == 0
    grad = torch.randn(out.shape)
    (clean,) = torch.autograd.grad(out, features, grad, retain_graph=True)
    for b, n in enumerate(counts.tolist()):
        grad[b, n:] = NAN
    (padded,) = torch.autograd.grad(out, features, grad)
    assert torch.equal(clean, padded) and padded[1].abs().sum() == 0


def test_gradient_of_region_mean_by_hand():
    features = torch.zeros(1, 1, 2, 4, requires_grad=True)
    boxes = torch.tensor([[[0, 0, 2, 2], [1, 0, 4, 1], [3, 1, 4, 2]]])
    region_mean(features, boxes).backward(torch.tensor([[[4.0], [3.0], [8.0]]]))
    assert features.grad.tolist() == [[[[1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 0.0, 8.0]]]]


def test_bad_boxes(backend):
    if backend == "triton":
        pytest.skip("a GPU op cannot look at values before it is launched")
    features, boxes = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 4)
    for value in (NAN, math.inf, -math.inf):
        boxes[0, 2, 3] = value
        with pytest.raises(ValueError, match=r"region_mean: boxes must be finite, got \[.*\] at \[0, 2\]; leave"):
            region_mean(features, boxes)
        region_mean(features, boxes, torch.tensor([2]))


# ---- mask_mean


def test_masks_of_boxes_give_the_means_of_boxes():
    for height, width in ((25, 42), (7, 70), (9, 21)):
        features = torch.randn(2, 11, height, width)
        masks = torch.zeros(2, 4, height, width, dtype=torch.bool)
        for b in range(2):
            for l in range(4):
                masks[b, l, l : l + 3, b : b + 5 * l + 1] = True
        boxes = mask_boxes(masks)
        assert torch.equal(mask_mean(features, masks), region_mean(features, boxes))


def test_short_stretches_anywhere_in_a_row(backend):
    """Masks are read 64 cells at a time: no cell is lost, or counted twice, where one reading ends."""
    step = 5 if backend == "triton" else 1
    features = torch.randn(1, 8, 2, 150, requires_grad=True)
    boxes = torch.tensor([[[start, 0, start + length, 2] for start in range(0, 130, step) for length in (1, 9, 18)]])
    cell = torch.arange(150)
    masks = (cell >= boxes[..., :1]) & (cell < boxes[..., 2:3])
    masks = masks[:, :, None].expand(-1, -1, 2, -1)
    by_mask, by_box = mask_mean(features, masks), region_mean(features, boxes)
    assert torch.equal(by_mask, by_box)
    weights = torch.randn(by_mask.shape)
    grads = [torch.autograd.grad(out, features, weights)[0] for out in (by_mask, by_box)]
    assert torch.equal(*grads)


def test_empty_masks_give_zero():
    features = torch.full((1, 9, 3, 5), NAN, requires_grad=True)
    out = mask_mean(features, torch.zeros(1, 2, 3, 5, dtype=torch.bool))
    assert out.tolist() == [[[0.0] * 9] * 2]
    out.sum().backward()
    assert features.grad.abs().sum() == 0


def test_gradient_of_mask_mean_by_hand():
    features = torch.zeros(1, 1, 2, 3, requires_grad=True)
    masks = torch.tensor([[[[1, 0, 1], [0, 0, 0]], [[1, 1, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]]])
    mask_mean(features, masks).backward(torch.tensor([[[2.0], [8.0], [5.0]]]))
    assert features.grad.tolist() == [[[[3.0, 2.0, 1.0], [2.0, 2.0, 0.0]]]]


@hypothesis.settings(
    deadline=None, max_examples=10 if ON_TRITON else 25, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(
    st.integers(1, 3), st.integers(1, 19), st.integers(1, 9), st.integers(1, 75), st.floats(0, 1), st.integers(0, 2**31)
)
def test_means_of_whole_numbers_are_exact(batch, channels, height, width, density, seed):
    """Sums of small whole numbers are exact in any order, so only the division rounds."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randint(-50, 50, (batch, channels, height, width), generator=g).float()
    masks = torch.rand(batch, 3, height, width, generator=g) < density
    area = masks.sum((-2, -1))[..., None]
    total = torch.einsum("blhw,bchw->blc", masks.double(), features.double())
    expected = torch.where(area > 0, total.float() / area, 0)
    for layout in (features, features.contiguous(memory_format=torch.channels_last), features.expand_as(features)):
        assert torch.equal(mask_mean(layout, masks), expected)
    boxes = spec.random_boxes(batch, 3, height, width, seed)
    out = region_mean(features, boxes)
    for b in range(batch):
        for l in range(3):
            c0, r0, c1, r1 = spec._cells(boxes[b, l].tolist(), height, width)
            part = features[b, :, r0:r1, c0:c1]
            assert torch.equal(out[b, l], part.sum((1, 2)) / (part.shape[1] * part.shape[2]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_layouts_give_the_same_bits(dtype: torch.dtype):
    for c, h, w in ((19, 7, 33), (8, 5, 4), (1, 3, 9)):
        features = torch.randn(2, c, h, w).to(dtype)
        masks, boxes = torch.rand(2, 3, h, w) < 0.4, spec.random_boxes(2, 3, h, w, 1)
        wide = torch.zeros(2, c, h + 2, w + 3, dtype=dtype)
        wide[:, :, 1:-1, 2:-1] = features
        for layout in (
            features.contiguous(memory_format=torch.channels_last),
            wide[:, :, 1:-1, 2:-1],
            features.mT.contiguous().mT,
        ):
            assert torch.equal(layout, features)
            assert torch.equal(mask_mean(layout, masks), mask_mean(features, masks))
            assert torch.equal(region_mean(layout, boxes), region_mean(features, boxes))


# ---- prompt_match


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_extremes(dtype: torch.dtype):
    for sample in match_spec.match_extremes(torch.device("cpu"), dtype, 3):
        exact = sample.map(lambda t: t.double())
        actual, expected = prompt_match(*sample.args), match_spec.match_oracle(*exact.args)
        assert torch.equal(actual.index, expected.index), sample.name
        match_spec.compare_match(actual, expected, sample)


def test_by_hand():
    kernels = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    prompts = torch.tensor([[[0.0, 9.0, 0.0], [2.0, 0.0, 0.0], [0.0, -3.0, 1.0]]])
    out = prompt_match(kernels, prompts)
    assert isinstance(out, PromptMatch)
    assert out.index.tolist() == [[1, 2, 0, 0]]  # third: a tie of 0 and 1; fourth: all similarities are 0
    assert out.kernels.tolist() == [[[3, 0, 0], [0, -4, 1], [1, 10, 0], [0, 9, 0]]]


@pytest.mark.parametrize("length", (1, 2, 3, 20, 41, 257, 600))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_equal_prompts_tie(length: int, dtype: torch.dtype, backend: str):
    """Wherever they stand; scaling by a power of two does not change the cosine either."""
    slow = backend == "triton"  # the interpreter
    if slow and dtype != (torch.bfloat16 if length == 20 else torch.float32):
        pytest.skip("the kernel computes in float32 whatever comes in")
    for channels in (77,) if slow else (5, 32, 77, 256):
        kernels = torch.randn(1, 9 if slow else 37, channels).to(dtype)
        prompt = torch.randn(1, 1, channels).to(dtype)
        scale = torch.tensor([1.0, 2.0, 4.0])[torch.arange(length) % 3, None].to(dtype)
        assert (prompt_match(kernels, prompt * scale).index == 0).all()
        worse = torch.cat((-prompt, -prompt, prompt * scale), 1)
        sign = (kernels.float() @ prompt[0].float().T)[..., 0]
        clear = sign.abs() > 1e-2
        assert torch.equal(prompt_match(kernels, worse).index[clear], torch.where(sign > 0, 2, 0)[clear])


def test_permuting_prompts_changes_no_kernel():
    kernels, prompts = torch.randn(2, 33, 40), torch.randn(2, 9, 40)
    order = torch.randperm(9)
    plain, permuted = prompt_match(kernels, prompts), prompt_match(kernels, prompts[:, order])
    assert torch.equal(plain.kernels, permuted.kernels)
    assert torch.equal(plain.index, order[permuted.index])


def test_without_prompts_kernels_are_unchanged():
    kernels, prompts = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    for out in (
        prompt_match(kernels, prompts, torch.tensor([0, 0])),
        prompt_match(kernels, prompts[:, :0]),
        prompt_match(kernels, prompts, dropout=1.0),
        prompt_match(kernels, prompts, torch.tensor([0, 0]), assign="sequential"),
        prompt_match(kernels, prompts[:, :0], assign="random"),
    ):
        assert torch.equal(out.kernels, kernels) and (out.index == -1).all()
        assert out.kernels.data_ptr() != kernels.data_ptr()


def test_counts_are_those_of_each_image():
    kernels, prompts = torch.randn(4, 30, 17), torch.randn(4, 7, 17)
    counts = torch.tensor([7, 1, 0, 4])
    for assign in ("cosine", "sequential"):
        out = prompt_match(kernels, prompts, counts, assign=assign)
        for b, n in enumerate(counts.tolist()):
            alone = prompt_match(kernels[b], prompts[b : b + 1, :n], assign=assign)
            assert_same_bits((out.kernels[b], out.index[b]), (alone.kernels[0], alone.index[0]))


def test_the_widest_dtype_wins():
    kernels, prompts = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    for a, b in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float16, torch.bfloat16)):
        mixed = prompt_match(kernels.to(a), prompts.to(b))
        assert_same_bits(mixed, prompt_match(kernels.to(a).float(), prompts.to(b).float()))


def slots(length: int) -> list[int]:
    """As the paper's tables have it: the prompts in turn, each for 20 / L kernels, the rest by the first ones."""
    table = {
        1: [0] * 20,
        3: [0] * 6 + [1] * 6 + [2] * 6 + [0, 1],
        7: [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 0, 1, 2, 3, 4, 5],
        20: list(range(20)),
        25: list(range(20)),
    }
    return table[length]


@pytest.mark.parametrize("length", (1, 3, 7, 20, 25))
def test_sequential_table(length: int):
    prompts = torch.randn(1, length, 6)
    assert prompt_match(torch.zeros(20, 6), prompts, assign="sequential").index[0].tolist() == slots(length)
    hundred = prompt_match(torch.zeros(100, 6), prompts, assign="sequential").index[0].tolist()
    assert hundred == [slots(length)[n // 5] for n in range(100)]
    seven = prompt_match(torch.zeros(7, 6), prompts, assign="sequential").index[0].tolist()
    assert seven == [slots(length)[t] for t in (0, 2, 5, 8, 11, 14, 17)]


def test_random_is_one_permutation_of_sequential():
    kernels, prompts = torch.randn(3, 40, 6), torch.randn(3, 7, 6)
    counts = torch.tensor([7, 3, 0])
    plain = prompt_match(kernels, prompts, counts, assign="sequential")
    drawn = prompt_match(kernels, prompts, counts, assign="random", generator=torch.Generator().manual_seed(4))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    assert torch.equal(drawn.index, plain.index[:, order])
    again = prompt_match(kernels, prompts, counts, assign="random", generator=torch.Generator().manual_seed(4))
    assert_same_bits(drawn, again)
    other = prompt_match(kernels, prompts, counts, assign="random", generator=torch.Generator().manual_seed(5))
    assert not torch.equal(drawn.index, other.index)


def test_dropout():
    kernels, prompts = torch.randn(4, 50, 6), torch.randn(4, 7, 6)
    plain = prompt_match(kernels, prompts)
    out = prompt_match(kernels, prompts, dropout=0.1, generator=torch.Generator().manual_seed(1))
    keep = torch.rand(4, 50, generator=torch.Generator().manual_seed(1)) >= 0.1
    assert 8 < (~keep).sum() < 40
    assert torch.equal(out.index, torch.where(keep, plain.index, -1))
    assert torch.equal(out.kernels, torch.where(keep[..., None], plain.kernels, kernels))
    torch.manual_seed(3)
    first = prompt_match(kernels, prompts, dropout=0.5)
    torch.manual_seed(3)
    assert_same_bits(prompt_match(kernels, prompts, dropout=0.5), first)


def test_drawn_parts_compile():
    kernels, prompts = torch.randn(2, 5, 6), torch.randn(2, 7, 6)

    def call(k: Tensor, p: Tensor) -> PromptMatch:
        return prompt_match(k, p, assign="random", dropout=0.3)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = call(kernels, prompts)
    torch.manual_seed(0)
    assert_same_bits(compiled(kernels, prompts), expected)


@pytest.mark.parametrize("shared", (False, True))
def test_gradient_of_prompt_match_by_hand(shared: bool):
    kernels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]])
    kernels = (kernels if shared else kernels.expand(2, 3, 2).clone()).requires_grad_()
    prompts = torch.tensor([[[5.0, 0.0], [0.0, 5.0]], [[0.0, 1.0], [NAN, 1.0]]], requires_grad=True)
    out = prompt_match(kernels, prompts, torch.tensor([2, 1]))
    assert out.index.tolist() == [[0, 1, 0], [0, 0, 0]]
    grad = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[10.0, 0.0], [20.0, 1.0], [30.0, 0.0]]])
    out.kernels.backward(grad)
    assert torch.equal(kernels.grad, grad.sum(0) if shared else grad)
    assert prompts.grad.tolist() == [[[6.0, 8.0], [3.0, 4.0]], [[60.0, 1.0], [0.0, 0.0]]]


def test_no_gradient_where_nothing_was_added():
    kernels, prompts = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    out = prompt_match(kernels, prompts, torch.tensor([0, 3]), dropout=1.0)
    assert not out.index.requires_grad
    out.kernels.sum().backward()
    assert (kernels.grad == 1).all() and (prompts.grad == 0).all()


# ---- all


def test_any_number_of_threads_gives_the_same_bits(backend):
    if backend == "triton":
        pytest.skip("its programs share nothing")
    features, boxes = torch.randn(3, 37, 25, 42, requires_grad=True), spec.random_boxes(3, 7, 25, 42, 0)
    masks = pack_masks(torch.rand(3, 7, 25, 42) < 0.2)
    kernels, prompts = torch.randn(3, 70, 129, requires_grad=True), torch.randn(3, 11, 129, requires_grad=True)

    def everything() -> list[Tensor]:
        out = [region_mean(features, boxes), mask_mean(features, masks), *prompt_match(kernels, prompts)]
        grads = torch.autograd.grad(
            [o.double().square().sum() for o in out if o.requires_grad], [features, kernels, prompts]
        )
        return [*(o.detach() for o in out), *grads]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_same_bits(everything(), first)
    finally:
        torch.set_num_threads(before)
