"""saliency_masks and saliency_maps: the acceptance checks of the method, exact agreement of the backends, invariances."""

import doctest
import importlib
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sprompt
from sprompt import native
from sprompt.ops import SaliencyMasks, saliency_maps, saliency_masks, triton_launch
from sprompt.ops.saliency_masks import op, reference
from sprompt.testing.compare import assert_same_bits
from sprompt.testing.specs.saliency_masks import scene, true_maps, true_seeds, whole_numbers

CPU = torch.device("cpu")
by_similarity = pytest.mark.parametrize("similarity", ("cosine", "dot"))
needs_triton = pytest.mark.skipif(
    bool(triton_launch.why_not(torch.empty(0))), reason=triton_launch.why_not(torch.empty(0))
)
needs_native = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())


def ints(*shape: int, seed: int = 0) -> Tensor:
    return whole_numbers(shape, seed, CPU, torch.float32)


def halves(height: int, width: int) -> Tensor:
    """The left half and the right half hold orthogonal features."""
    features = torch.zeros(1, 6, height, width)
    features[:, :3, :, : width // 2] = torch.tensor([1.0, 2.0, 2.0]).reshape(1, 3, 1, 1)
    features[:, 3:, :, width // 2 :] = torch.tensor([2.0, 4.0, 4.0]).reshape(1, 3, 1, 1)
    return features


def as_lists(found: SaliencyMasks) -> tuple[Any, ...]:
    return found.seeds.tolist(), found.scores.tolist(), found.masks.words.tolist(), found.counts.tolist()


def bits(features: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """saliency_bits with the defaults of saliency_masks: (words, areas, scores) of all seeds."""
    grid = options.get("seeds", (0, 0))
    return torch.ops.sprompt.saliency_bits(
        features, options.get("valid"), *grid, options.get("similarity", "cosine") == "cosine", 0.5, 2
    )


# ---- acceptance


@by_similarity
@pytest.mark.parametrize("nms", ("matrix", "matrix_linear", "greedy"))
def test_two_halves_give_two_proposals_of_score_one(similarity: str, nms: str) -> None:
    features = halves(24, 40)
    if similarity == "dot":
        features[:, 3:] /= 2  # the dot product of a seed must be largest with its own half
    found = saliency_masks(features, similarity=similarity, nms=nms)
    assert (found.scores == 1).sum() == 2
    assert found.scores[0, :2].tolist() == [1, 1]
    assert found.seeds[0, :2].tolist() == [[0, 0, 0], [0, 0, 20]]
    assert found.boxes[0, :2].tolist() == [[0, 0, 20, 24], [20, 0, 40, 24]]
    assert found.masks.area()[0, :2].tolist() == [480, 480]
    if nms == "greedy":
        assert found.counts.tolist() == [2]
        assert (
            found.seeds[0, 2:].eq(-1).all() and found.scores[0, 2:].eq(0).all() and found.masks.words[0, 2:].eq(0).all()
        )
        assert found.boxes[0, 2:].eq(0).all()
    else:  # the scores of duplicates are multiplied by e^-2, or by 0 with the linear kernel
        assert found.counts.tolist() == [20]
        rest = 0.1353353 if nms == "matrix" else 0.0
        assert torch.allclose(found.scores[0, 2:], torch.full((18,), rest))


@by_similarity
def test_duplicate_seeds_leave_one_above_the_score_cut(similarity: str) -> None:
    features = torch.zeros(1, 2, 4, 4)
    features[:, 0, :2] = 1
    features[:, 1, 2:] = 0.5
    found = saliency_masks(features, similarity=similarity)
    assert (found.scores[0] >= 0.7).sum() == 2  # one for each half


@by_similarity
@pytest.mark.parametrize("factor", (2.0**-7, 2.0**9))
def test_a_power_of_two_changes_nothing(similarity: str, factor: float) -> None:
    features = scene(1, 24, 9, 13, 3)
    assert as_lists(saliency_masks(features * factor, similarity=similarity)) == as_lists(
        saliency_masks(features, similarity=similarity)
    )


@by_similarity
def test_a_positive_constant_changes_nothing(similarity: str) -> None:
    features = scene(1, 24, 7, 9, 2).double()  # no value is near the threshold; all scores differ
    for factor in (0.3, 7.7):
        a, b = (saliency_masks(f, similarity=similarity) for f in (features, factor * features))
        assert a.seeds.tolist() == b.seeds.tolist() and a.masks.words.tolist() == b.masks.words.tolist()


def test_scaling_one_pixel_changes_only_the_plain_product() -> None:
    """Only with the seeds of scale 1. A grid of the size of the map gives exactly those seeds."""
    features = ints(1, 6, 7, 9, seed=4)
    scaled = features.clone()
    scaled[:, :, 3, 5] *= 8
    for similarity, same in (("cosine", True), ("dot", False)):
        a, b = (bits(f, seeds=(7, 9), similarity=similarity) for f in (features, scaled))
        assert torch.equal(a[0], b[0]) is same, similarity


@by_similarity
def test_a_zero_vector_makes_no_nan(similarity: str) -> None:
    features = scene(1, 16, 8, 8, 1)
    features[:, :, 2:4, 2:5] = 0
    found = saliency_masks(features, similarity=similarity, return_soft=True)
    assert (
        found.counts[0] > 1 and found.scores.isfinite().all() and found.soft is not None and found.soft.isfinite().all()
    )
    assert (found.scores > 0).sum() == found.counts[0]


# ---- tables


def test_one_row_by_hand() -> None:
    """D = 1 and one row of four cells, so there are no pooled seeds. The map of seed s is s·x; for s > 0, Norm gives x scaled
    to [0, 1]."""
    features = torch.tensor([4.0, 0.0, 2.0, 1.0]).reshape(1, 1, 1, 4)
    words, areas, scores = bits(features, similarity="dot")
    assert words.flatten().tolist() == [0b0101, 0, 0b0101, 0b0101]
    assert areas.flatten().tolist() == [2, 0, 2, 2]
    assert scores.flatten().tolist() == [0.75, 0, 0.75, 0.75]
    found = saliency_masks(features, similarity="dot", max_masks=5, return_soft=True)
    assert found.seeds[0].tolist() == [[0, 0, 0], [0, 0, 2], [0, 0, 3], [-1] * 3, [-1] * 3]
    assert found.boxes[0].tolist() == [[0, 0, 3, 1]] * 3 + [[0] * 4] * 2
    assert found.soft is not None and found.soft[0, 0, 0].tolist() == [1, 0, 0.5, 0.25]
    assert found.scores[0, 1].item() == pytest.approx(0.75 * np.exp(-2))


def test_the_threshold_belongs_to_the_mask_and_min_area_is_a_least() -> None:
    features = torch.tensor([4.0, 0.0, 3.0, 1.0]).reshape(1, 1, 1, 4)
    assert saliency_masks(features, similarity="dot", threshold=0.75).masks.words[0, 0].tolist() == [0b0101]
    assert saliency_masks(features, similarity="dot", threshold=0.76).counts.tolist() == [0]
    assert saliency_masks(features, similarity="dot", threshold=0.76, min_area=1).masks.words[0, 0].tolist() == [0b0001]


def test_seeds_of_the_pyramid() -> None:
    features = torch.randn(1, 3, 11, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seeds, usable = reference.pyramid_seeds(features, torch.ones(1, 11, 13, dtype=torch.bool))
    grids = [
        F.interpolate(features, scale_factor=s, mode="bilinear", align_corners=False, recompute_scale_factor=False)
        for s in (1, 0.5, 0.25)
    ]
    expected = torch.cat([g.flatten(2) for g in grids], 2).mT
    assert usable.all() and torch.allclose(seeds, expected, atol=1e-14)
    assert reference.grids(11, 13, 0, 0) == [(11, 13), (5, 6), (2, 3)]
    index = torch.arange(seeds.shape[1])
    for sizes in ([(11, 13), (5, 6), (2, 3)], [(3, 2), (1, 1), (0, 0)], [(4, 6)], [(1, 9), (0, 4), (0, 2)]):
        places = index[: sum(h * w for h, w in sizes)]
        assert torch.equal(reference.indices(reference.addresses_of(places, sizes), sizes), places)


def test_seeds_of_a_grid() -> None:
    features = torch.randn(2, 3, 11, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for grid in ((1, 1), (4, 5), (11, 13), (14, 3)):
        seeds, _ = reference.grid_seeds(features, torch.ones(2, 11, 13, dtype=torch.bool), grid)
        assert torch.allclose(seeds, F.adaptive_avg_pool2d(features, grid).flatten(2).mT, atol=1e-14)


# ---- exact agreement


@needs_native
@by_similarity
@pytest.mark.parametrize("seeds", ((0, 0), (3, 5)))
@pytest.mark.parametrize("size", ((6, 10), (9, 11), (4, 4), (13, 26), (1, 70)))
def test_native_equals_reference_to_the_bit_on_whole_numbers(
    similarity: str, seeds: tuple[int, int], size: tuple[int, int]
) -> None:
    """Products, areas, and means of 1, 2 or 4 cells are exact. Both backends round the root and the divisions once."""
    if seeds != (0, 0):
        size = (6, 10)
    features = ints(2, 300 if size[0] > 1 else 3, *size, seed=size[0])
    valid = torch.rand(2, *size, generator=torch.Generator().manual_seed(1)) < 0.9
    for mask in (None, valid):
        if mask is not None and seeds != (0, 0):
            continue  # means of three cells are not exact
        options = {"similarity": similarity, "seeds": seeds, "valid": mask}
        with sprompt.use_backend("native"):
            actual = bits(features, **options)
        with sprompt.use_backend("reference"):
            expected = bits(features, **options)
        assert_same_bits(actual, expected)
        assert (actual[1] > 0).any()


@pytest.mark.parametrize("size", ((9, 11), (25, 34)))
@by_similarity
def test_all_maps_against_float64(similarity: str, size: tuple[int, int]) -> None:
    features = scene(1, 96, *size, 5)
    words, areas, scores = bits(features, similarity=similarity)
    inside = np.ones(size, dtype=bool)
    vectors, _ = true_seeds(features[0].double(), inside, "pyramid")
    maps = true_maps(features[0].double(), inside, vectors, similarity)
    got = sprompt.BitMasks(words[0], size).to_dense().numpy()
    expected = maps >= 0.5
    close = np.abs(maps - 0.5) < 1e-4
    kept = expected.sum((1, 2)) > 1
    assert not ((got ^ expected) & ~close)[kept].any()
    assert close.mean() < 1e-3
    assert areas[0].tolist() == got.sum((1, 2)).tolist()
    same = (got == expected).all((1, 2)) & kept
    assert same.mean() > 0.7
    truth = (maps * expected).sum((1, 2))[same] / expected.sum((1, 2))[same]
    assert np.abs(scores[0].numpy()[same] - truth).max() < 1e-5


def everything(features: Tensor) -> list[Any]:
    valid = torch.ones(features.shape[0], *features.shape[2:], dtype=torch.bool)
    valid[:, -2:] = False
    seeds = features.flatten(2)[..., ::7].mT.contiguous()
    results: list[Any] = []
    for grid in ("pyramid", (4, 5)):
        for mask in (None, valid):
            results.append(saliency_masks(features, seeds=grid, valid=mask, return_soft=True))
    return [*results, saliency_maps(features, seeds)]


@needs_native
def test_threads_change_no_bit() -> None:
    features = scene(2, 300, 13, 27, 2)
    before = torch.get_num_threads()
    results = []
    with sprompt.use_backend("native"):
        try:
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(everything(features))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@needs_native
def test_stripes_equal_the_whole_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """With large maps, or with many seed vectors, the kernel never holds all products at once."""
    features = scene(1, 200, 22, 31, 2)
    with sprompt.use_backend("native"):
        whole = everything(features)
        for held in (1, 6 * 31 * 4 * 96):
            monkeypatch.setattr(op, "_HELD", held)
            assert_same_bits(everything(features), whole)


# ---- Triton


def on_triton() -> Any:
    return sprompt.use_backend("triton", ("saliency_bits", "saliency_soft", "saliency_maps"))


def bits_on_both(features: Tensor, **options: Any) -> tuple[Any, Any]:
    with on_triton():
        actual = bits(features, **options)
    with sprompt.use_backend("reference"):
        return actual, bits(features, **options)


@needs_triton
@by_similarity
@pytest.mark.parametrize(
    ("depth", "size"),
    ((15, (3, 21)), (16, (8, 8)), (17, (5, 13)), (33, (1, 127)), (1, (8, 16)), (47, (3, 43)), (5, (10, 20))),
)
def test_triton_equals_reference_to_the_bit_on_whole_numbers(
    similarity: str, depth: int, size: tuple[int, int]
) -> None:
    """Sizes near blocks of 16 channels, 64 columns of products and 128 columns of a map; 1 to 4 blocks of columns."""
    features = ints(2, depth, *size, seed=depth)
    valid = torch.rand(2, *size, generator=torch.Generator().manual_seed(1)) < 0.95
    actual, expected = bits_on_both(features, similarity=similarity, valid=valid if depth % 2 else None)
    assert_same_bits(actual, expected)
    assert (actual[1] > 0).any()


@needs_triton
def test_triton_blocks_of_half_types() -> None:
    """Three blocks of 128 columns. The kernel reads wide rows in place and copies other rows."""
    features = ints(1, 16, 17, 16, seed=3)
    actual, expected = bits_on_both(features.bfloat16(), similarity="dot")
    assert_same_bits(actual, expected)
    with on_triton():
        assert_same_bits(bits(features.bfloat16().to(memory_format=torch.channels_last), similarity="dot"), actual)
        assert_same_bits(bits(F.pad(features, (0, 1)).half()[..., :-1], similarity="dot"), actual)


@needs_triton
def test_triton_writes_nothing_of_maps_that_are_too_small() -> None:
    features, arguments = ints(2, 7, 9, 16), (None, 0, 0, False, 0.5, 60)
    with on_triton():
        actual = torch.ops.sprompt.saliency_bits(features, *arguments)
    with sprompt.use_backend("reference"):
        assert_same_bits(actual, torch.ops.sprompt.saliency_bits(features, *arguments))
    assert (actual[1] > 0).any() and (actual[1] == 0).any()


@needs_triton
@by_similarity
def test_triton_stripes_and_groups_equal_the_whole(similarity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of all seeds and images at once, or of as few as fit the scratch memory."""
    module = importlib.import_module("sprompt.ops.saliency_masks.triton")
    features = ints(2, 5, 11, 7, seed=1)
    valid = torch.ones(2, 11, 7, dtype=torch.bool)
    valid[1, 8:] = valid[1, :, 5:] = False
    vectors = features.flatten(2)[..., ::3].mT

    def everything_exact() -> list[Any]:
        cut = [bits(features, seeds=seeds, similarity=similarity, valid=valid) for seeds in ((0, 0), (11, 7))]
        address = torch.tensor([[[0, 2, 3], [1, 4, 1], [2, 1, 0], [2, 0, 0], [-1, -1, -1], [0, 0, 0]]]).expand(2, 6, 3)
        soft = torch.ops.sprompt.saliency_soft(features, valid, 0, 0, similarity == "cosine", address)
        return [*cut, soft, saliency_maps(features, vectors, similarity=similarity, valid=valid)]

    with on_triton():
        whole = everything_exact()
        for rows in (30, 100):  # rows of products that fit: first stripes, then whole images
            monkeypatch.setattr(module, "SCRATCH", rows * 80 * 4)
            assert_same_bits(everything_exact(), whole)
    with sprompt.use_backend("reference"):
        expected = everything_exact()
    assert_same_bits(whole[0], expected[0])
    assert torch.allclose(whole[2], expected[2], atol=1e-6) and torch.allclose(whole[3], expected[3], atol=1e-6)


@needs_triton
def test_triton_soft_maps_of_addresses_that_are_none() -> None:
    """For addresses outside the grids, and for blocks with a cell that is not valid, the map is 0 and the kernel reads
    nothing."""
    features = scene(1, 20, 9, 10, 4)
    valid = torch.ones(1, 9, 10, dtype=torch.bool)
    valid[0, 3, 4] = False
    real = [[0, 8, 9], [1, 3, 4], [2, 1, 0], [0, 3, 3]]
    none = [
        [1, 4, 0],
        [2, 0, 2],
        [0, 9, 0],
        [0, 0, 10],
        [3, 0, 0],
        [-1, 0, 0],
        [0, -1, 0],
        [1, 1, 2],
        [2, 0, 1],
        [0, 3, 4],
    ]
    with on_triton():
        soft = torch.ops.sprompt.saliency_soft(features, valid, 0, 0, True, torch.tensor([real + none]))
        grid = torch.ops.sprompt.saliency_soft(
            features, valid, 3, 4, True, torch.tensor([[[0, 2, 3], [0, 3, 0], [0, 0, 4]]])
        )
        outside = torch.ops.sprompt.saliency_soft(features, None, 0, 0, False, torch.tensor([none[:7]]))
    assert not outside.any()
    assert not soft[0, len(real) :].any() and not grid[0, 1:].any() and grid[0, 0].max() == 1
    vectors, addresses = true_seeds(features[0].double(), valid[0].numpy(), "pyramid")
    chosen = np.stack([vectors[addresses.index(tuple(a))] for a in real])
    truth = true_maps(features[0].double(), valid[0].numpy(), chosen, "cosine")
    assert np.abs(soft[0, : len(real)].numpy() - truth).max() < 1e-5


# ---- invariances


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 9), width=st.integers(1, 11), below=st.integers(0, 5), right=st.integers(0, 5), seed=st.integers(0, 99),
    similarity=st.sampled_from(("cosine", "dot")), nms=st.sampled_from(("matrix", "greedy")),
)  # fmt: skip
def test_padding_to_the_right_and_below_changes_nothing(
    height: int, width: int, below: int, right: int, seed: int, similarity: str, nms: str
) -> None:
    features = ints(1, 4, height, width, seed=seed)
    padded = F.pad(features, (0, right, 0, below), value=float("nan"))
    valid = F.pad(torch.ones(1, height, width, dtype=torch.bool), (0, right, 0, below))
    options: dict[str, Any] = {"similarity": similarity, "nms": nms, "max_masks": 12, "return_soft": True}
    plain, found = saliency_masks(features, **options), saliency_masks(padded, valid=valid, **options)
    assert plain.seeds.tolist() == found.seeds.tolist() and plain.counts.tolist() == found.counts.tolist()
    assert plain.scores.tolist() == found.scores.tolist() and plain.boxes.tolist() == found.boxes.tolist()
    assert torch.equal(plain.masks.to_dense(), found.masks.crop(0, 0, height, width).to_dense())
    assert plain.soft is not None and found.soft is not None
    assert torch.equal(F.pad(plain.soft, (0, right, 0, below)), found.soft)
    assert found.masks.area().sum() == plain.masks.area().sum()


@by_similarity
@pytest.mark.parametrize("seeds", ("pyramid", (3, 4)))
def test_soft_maps_are_what_was_cut(similarity: str, seeds: Any) -> None:
    features = scene(2, 70, 10, 14, 8)
    valid = torch.ones(2, 10, 14, dtype=torch.bool)
    valid[1, :, 10:] = False
    found = saliency_masks(features, similarity=similarity, seeds=seeds, valid=valid, return_soft=True, threshold=0.4)
    assert found.soft is not None and found.counts.min() > 2
    cut = (found.soft >= torch.tensor(0.4)) & valid[:, None]
    differs = cut ^ found.masks.to_dense()
    if sprompt.backends._forced != "reference" and not native.why_not():
        assert not differs.any()
    assert not (differs & ((found.soft - 0.4).abs() > 1e-4)).any()
    assert not found.soft[1, :, :, 10:].any()


def test_maps_of_the_seeds_of_a_proposal() -> None:
    features = scene(1, 40, 8, 12, 9)
    found = saliency_masks(features, return_soft=True, max_masks=30)
    assert found.soft is not None
    _, row, column = found.seeds[0].unbind(-1)
    first = found.seeds[0, :, 0] == 0
    vectors = features[0, :, row[first], column[first]].T[None]
    assert torch.allclose(saliency_maps(features, vectors)[0], found.soft[0, first], atol=1e-5)
    scale = saliency_maps(features, 3.5 * vectors)
    assert torch.allclose(scale[0], found.soft[0, first], atol=1e-5)


@by_similarity
def test_images_do_not_touch_each_other(similarity: str) -> None:
    features = ints(3, 5, 7, 9)
    together = saliency_masks(features, similarity=similarity)
    for b in range(3):
        alone = saliency_masks(features[b : b + 1], similarity=similarity)
        assert together.seeds[b].tolist() == alone.seeds[0].tolist()
        assert together.masks.words[b].tolist() == alone.masks.words[0].tolist()


# ---- bad values, dtypes, gradients


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@by_similarity
def test_nan_and_infinity_leave_no_proposals_of_that_image(bad: float, similarity: str) -> None:
    features = scene(2, 8, 6, 8, 0)
    features[0, 3, 2, 2] = bad
    found = saliency_masks(features, similarity=similarity, return_soft=True)
    assert found.counts[0] == 0 and found.counts[1] > 0 and found.soft is not None and found.soft.isfinite().all()
    assert not saliency_maps(features, torch.ones(2, 4, 8))[0].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_types_are_read_exactly(dtype: torch.dtype) -> None:
    features = scene(1, 50, 8, 11, 6).to(dtype)
    with sprompt.trace_backends() as ran:
        saliency_masks(features)
    if ("saliency_bits", "triton") in ran:
        pytest.skip("on tensor cores, sums of half types have another order than sums of float32")
    half, full = saliency_masks(features, return_soft=True), saliency_masks(features.float(), return_soft=True)
    assert as_lists(half) == as_lists(full) and half.scores.dtype == torch.float32
    assert half.soft is not None and full.soft is not None and torch.equal(half.soft, full.soft.to(dtype))
    seeds = features.flatten(2).mT[:, :5]
    assert torch.equal(saliency_maps(features, seeds), saliency_maps(features.float(), seeds.float()).to(dtype))
    assert saliency_maps(features, seeds.float()).dtype == torch.float32


def test_no_gradient() -> None:
    features = scene(1, 8, 6, 8, 0).requires_grad_()
    found = saliency_masks(features, return_soft=True)
    assert found.soft is not None and not found.soft.requires_grad and not found.scores.requires_grad
    assert not saliency_maps(features, features.flatten(2).mT).requires_grad


def test_channels_last_and_sliced_features() -> None:
    features = scene(2, 12, 7, 10, 1)
    expected = as_lists(saliency_masks(features))
    assert as_lists(saliency_masks(features.to(memory_format=torch.channels_last))) == expected
    wide = F.pad(features, (3, 2, 1, 1), value=9.0)
    assert as_lists(saliency_masks(wide[:, :, 1:-1, 3:-2])) == expected
    assert as_lists(saliency_masks(torch.cat((-features, features), 1)[:, 12:])) == expected
    narrow = scene(1, 12, 9, 1, 1)
    assert as_lists(saliency_masks(narrow.as_strided(narrow.shape, (108, 9, 1, 77)))) == as_lists(
        saliency_masks(narrow)
    )


def test_documentation_examples() -> None:
    module = importlib.import_module("sprompt.ops.saliency_masks")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
