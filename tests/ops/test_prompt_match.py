import math

import pytest
import torch
from torch import Tensor

from sprompt.ops import PromptMatch, prompt_match
from sprompt.testing.compare import assert_same_bits
from sprompt.testing.specs import prompt_match as spec

pytestmark = pytest.mark.usefixtures("backend")
NAN = math.nan


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_extremes(dtype: torch.dtype):
    for sample in spec.match_extremes(torch.device("cpu"), dtype, 3):
        exact = sample.map(lambda t: t.double())
        actual, expected = prompt_match(*sample.args), spec.match_oracle(*exact.args)
        assert torch.equal(actual.index, expected.index), sample.name
        spec.compare_match(actual, expected, sample)


def test_by_hand():
    kernels = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    prompts = torch.tensor([[[0.0, 9.0, 0.0], [2.0, 0.0, 0.0], [0.0, -3.0, 1.0]]])
    out = prompt_match(kernels, prompts)
    assert isinstance(out, PromptMatch)
    assert out.index.tolist() == [[1, 2, 0, 0]]  # kernel 2: prompts 0 and 1 tie; kernel 3: all similarities are 0
    assert out.kernels.tolist() == [[[3, 0, 0], [0, -4, 1], [1, 10, 0], [0, 9, 0]]]


@pytest.mark.parametrize("length", (1, 2, 3, 20, 41, 257, 600))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_equal_prompts_tie(length: int, dtype: torch.dtype, backend: str):
    """Equal prompts tie at any position. Scaling a prompt by a power of two does not change its cosine either."""
    slow = backend == "triton"  # Triton's interpreter
    if slow and dtype != (torch.bfloat16 if length == 20 else torch.float32):
        pytest.skip("the kernel computes in float32 for every dtype")
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
    """The tables of the paper: each prompt in turn takes 20 / L kernels; the first prompts take the remaining kernels."""
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


def test_any_number_of_threads_gives_the_same_bits(backend):
    if backend == "triton":
        pytest.skip("programs of the Triton kernels share nothing")
    kernels, prompts = torch.randn(3, 70, 129, requires_grad=True), torch.randn(3, 11, 129, requires_grad=True)

    def everything() -> list[Tensor]:
        out, index = prompt_match(kernels, prompts)
        return [out.detach(), index, *torch.autograd.grad(out.double().square().sum(), (kernels, prompts))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_same_bits(everything(), first)
    finally:
        torch.set_num_threads(before)
