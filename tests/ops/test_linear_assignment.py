"""linear_assignment: hand-written tables, equality of totals with scipy, values that are not numbers."""

import os
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

import sprompt
from sprompt import cuda, native
from sprompt.ops import linear_assignment
from sprompt.testing.spec import Sample
from sprompt.testing.specs.linear_assignment import same_totals, scipy_rows

sides = st.integers(1, 9)
#: The op runs on the reference, which takes seconds where a kernel takes milliseconds.
SLOW = bool(native.why_not()) or os.environ.get("SPROMPT_BACKEND") == "reference"
#: The CUDA kernels are emulated and take CPU tensors (tests/emulation); they are slow too.
EMULATED = not SLOW and cuda.emulated()
#: The backends that run on CPU tensors here.
ON_CPU = ["reference", *(["native"] if not native.why_not() else []), *(["cuda"] if EMULATED else [])]
by_host = pytest.mark.parametrize("backend", [b for b in ON_CPU if b != "cuda"])


def devices() -> list[str]:
    """The devices on whose tensors the CUDA kernel can run."""
    return ["cpu"] * EMULATED + ["cuda"] * torch.cuda.is_available()


def check(cost: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """linear_assignment(cost, counts); the totals must equal scipy's."""
    args = (cost,) if counts is None else (cost, counts)
    rows = linear_assignment(*args)
    same_totals(rows, scipy_rows(*args), Sample("", args))
    return rows


@pytest.mark.parametrize("backend", ON_CPU)
def test_tables(backend: str) -> None:
    with sprompt.use_backend(backend):
        # The greedy choice (row 0 for column 0) costs 1 + 9.
        assert linear_assignment(torch.tensor([[1.0, 2.0], [3.0, 9.0]])).tolist() == [1, 0]
        # A chain: the second choice of row 0 is the first choice of row 1, and so on.
        chain = torch.tensor([[0.0, 1.0, 9.0], [9.0, 0.0, 1.0], [9.0, 9.0, 0.5], [9.0, 9.0, 9.0]])
        assert linear_assignment(chain).tolist() == [0, 1, 2]
        assert linear_assignment(chain.T).tolist() == [0, 1, 2, -1], "the expensive column stays without a row"
        assert linear_assignment(-chain.T).tolist() != [0, 1, 2, -1]
        assert linear_assignment(torch.tensor([[3.0, -2.0, 7.0]])).tolist() == [-1, 0, -1]
        assert linear_assignment(torch.tensor([[3.0], [-2.0], [7.0]])).tolist() == [1]
        assert linear_assignment(torch.tensor([[[5.0]], [[-5.0]]]), torch.tensor([1, 0])).tolist() == [[0], [-1]]


def test_equals_every_permutation() -> None:
    """The total is the smallest of all 720 permutations. Costs are small integers, which have many optima."""
    cost = torch.randint(-2, 3, (50, 6, 6), generator=torch.Generator().manual_seed(0))
    orders = torch.tensor(list(permutations(range(6))))
    totals = cost[:, orders, torch.arange(6)].sum(-1).amin(-1)
    rows = linear_assignment(cost.float())
    assert torch.equal(cost.gather(1, rows[:, None, :])[:, 0].sum(-1), totals)


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 3), sides, sides).flatmap(
        lambda shape: st.tuples(
            st.one_of(
                hnp.arrays(np.float64, shape, elements=st.floats(-1e3, 1e3)),
                hnp.arrays(np.float64, shape, elements=st.integers(-2, 2).map(float)),
                hnp.arrays(np.float64, shape, elements=st.sampled_from([1e-30, 1.0, 3.0, -1e30, 1e12, -1e-12, 0.0])),
            ),
            st.lists(st.integers(0, shape[2]), min_size=shape[0], max_size=shape[0]),
        )
    )
)
def test_total_equals_scipy(drawn: tuple[np.ndarray, list[int]]) -> None:
    cost, counts = drawn
    for dtype in (torch.float64, torch.float32):
        check(torch.from_numpy(cost).to(dtype), torch.tensor(counts))


@pytest.mark.parametrize(
    ("B", "N", "G"),
    ((3, 300, 300), (2, 257, 300), (2, 300, 61), (16, 100, 20), (40, 20, 100), (1, 1000, 3), (1, 3, 1000)),
)
def test_larger(B: int, N: int, G: int) -> None:
    if SLOW:
        B, N, G = 1, -(-N // 10), -(-G // 10)
    if EMULATED:
        B, N, G = min(B, 2), -(-N // 4), -(-G // 4)
    g = torch.Generator().manual_seed(N + G)
    check(torch.randn(B, N, G, generator=g))
    check(torch.randint(0, 10, (B, N, G), generator=g).float())
    points = torch.rand(B, N, 2, generator=g), torch.rand(B, G, 2, generator=g)
    check(torch.cdist(*points), torch.randint(0, G + 1, (B,), generator=g))


def test_long_chains() -> None:
    """Costs are products, so every row prefers the same columns: the first step assigns few rows and most rows must search."""
    g = torch.Generator().manual_seed(3)
    size = 12 if SLOW else 40 if EMULATED else 90
    check(torch.rand(2, size, 1, generator=g) * torch.rand(2, 1, size - 10, generator=g))
    n = torch.arange(1.0, size)
    check((n[:, None] * n)[None])
    check(-(n[:, None] * n)[None])


@pytest.mark.parametrize("largest", (1.5e308, 3e38, 65504.0))
def test_the_end_of_the_range(largest: float) -> None:
    """Differences of such costs overflow the dtype of the costs."""
    g = torch.Generator().manual_seed(4)
    signs = torch.randint(0, 2, (4, 9, 7), generator=g).double() * 2 - 1
    scale = torch.rand(4, 9, 7, generator=g, dtype=torch.float64)
    dtype = torch.float64 if largest > 1e300 else torch.float32 if largest > 1e5 else torch.float16
    cost = (signs * scale * largest).to(dtype)
    small = (cost.double() / largest).numpy()
    for backend in ON_CPU:
        with sprompt.use_backend(backend):
            rows = linear_assignment(cost)
        for image, matched in zip(small, rows.numpy(), strict=True):
            row, column = linear_sum_assignment(image)
            assert image[matched, range(7)].sum() == pytest.approx(image[row, column].sum(), abs=1e-12)


def test_sums_beyond_the_range() -> None:
    """Entries of both signs at the limits of float64: their differences overflow unless the costs are scaled."""
    end = 1.7e308
    cost = torch.tensor([[end, -end, end], [-end, -end, end], [-end, end, -end], [end, end, end]], dtype=torch.float64)
    for image in (cost, cost.T, -cost):
        small = image / end
        for backend in ON_CPU:
            with sprompt.use_backend(backend):
                rows = linear_assignment(image)
            columns = (rows >= 0).nonzero()[:, 0]
            row, column = linear_sum_assignment(small.numpy())
            assert float(small[rows[columns], columns].sum()) == small.numpy()[row, column].sum()


def test_padding_is_not_read() -> None:
    cost = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(5))
    counts = torch.tensor([2, 0, 5])
    rows = linear_assignment(cost, counts)
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):
        filled = cost.clone()
        filled[torch.arange(6).expand(3, 8, 6) >= counts[:, None, None]] = value
        assert torch.equal(linear_assignment(filled, counts), rows)
    assert rows[1].tolist() == [-1] * 6 and rows[0, 2:].tolist() == [-1] * 4 and rows[2, 5] == -1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@by_host
def test_bad_values_name_the_image(backend: str, dtype: torch.dtype, value: float) -> None:
    with sprompt.use_backend(backend):
        for place in ((0, 0, 0), (2, 9, 6), (1, 0, 6), (1, 9, 0), (2, 4, 3)):
            for shape in ((3, 10, 7), (3, 10, 17)):
                cost = torch.zeros(shape, dtype=dtype)
                cost[place] = value
                with pytest.raises(
                    ValueError, match=rf"finite in image {place[0]}, got {value} at row {place[1]}, column {place[2]};"
                ):
                    linear_assignment(cost)
        with pytest.raises(ValueError, match="image 0, got nan at row 1, column 0"):
            linear_assignment(torch.tensor([[0.0, 1.0], [float("nan"), 2.0]]))


@pytest.mark.skipif(not devices(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_bad_values_mark_the_image_on_cuda(dtype: torch.dtype) -> None:
    """The bad value stands at every entry in turn, so that every thread meets it in every part of its loops."""
    for device in devices():
        for N, G in ((7, 45), (45, 7), (13, 13)):
            cost = torch.rand(N * G + 1, N, G, generator=torch.Generator().manual_seed(7)).to(device, dtype)
            for value in (float("nan"), float("inf"), -float("inf")):
                bad = cost.clone()
                bad[:-1].flatten(1).fill_diagonal_(value)
                with sprompt.use_backend("cuda"):
                    rows = linear_assignment(bad)
                assert (rows[:-1] == -2).all()
                same_totals(rows[-1:].cpu(), scipy_rows(cost[-1:].cpu()), Sample("", (cost[-1:].cpu(),)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bad_counts_mark_the_image_on_cuda() -> None:
    cost = torch.rand(4, 5, 3, device="cuda")
    rows = linear_assignment(cost, torch.tensor([-1, 4, 2, 2**40], device="cuda"))
    assert (rows[[0, 1, 3]] == -2).all() and (rows[2, :2] >= 0).all() and rows[2, 2] == -1


@pytest.mark.parametrize("N", (31, 32, 33, 64, 65))
def test_sizes_around_a_warp(N: int) -> None:
    """Random costs, many ties, and products (long chains), with fewer and with more rows than columns."""
    if SLOW:
        pytest.skip("a promise of the compiled kernels; the reference takes long")
    g = torch.Generator().manual_seed(N)
    for G in (N - 1, N, N + 1, 2 * N):
        check(torch.randn(1, N, G, generator=g))
        check(torch.randint(-1, 2, (1, N, G), generator=g).double())
    check(torch.rand(1, N, 1, generator=g) * torch.rand(1, 1, N, generator=g))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize(("N", "G"), ((215, 190), (150, 215), (2, 6001), (6001, 2), (700, 65)))
def test_more_than_shared_memory_holds(N: int, G: int, dtype: torch.dtype) -> None:
    """The shared memory of a block cannot hold the costs, or the costs together with the state."""
    if SLOW:
        pytest.skip("a promise of the compiled kernels; the reference takes long")
    g = torch.Generator().manual_seed(N)
    counts = torch.tensor([G, G - G // 4])
    check(torch.randn(2, N, G, generator=g, dtype=dtype), counts)
    check(torch.randn(2, G, N, generator=g, dtype=dtype).mT, counts)


def test_bad_counts_win_over_bad_values() -> None:
    cost = torch.full((2, 3, 3), float("nan"))
    with pytest.raises(ValueError, match="counts must lie between 0 and 3, got 7"):
        linear_assignment(cost, torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="counts must lie between 0 and 0, got 1"):
        linear_assignment(cost[:, :, :0], torch.tensor([0, 1]))


def test_ties_do_not_depend_on_threads_or_layout() -> None:
    cost = torch.randint(
        0,
        3,
        (2, 7, 6) if SLOW else (3, 37, 34) if EMULATED else (40, 70, 60),
        generator=torch.Generator().manual_seed(6),
    ).float()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results += [
                linear_assignment(cost),
                linear_assignment(cost.mT.contiguous().mT),
                linear_assignment(cost.double()),
            ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_gradients_are_cut() -> None:
    cost = torch.randn(2, 5, 4, requires_grad=True)
    assert not linear_assignment(cost).requires_grad
