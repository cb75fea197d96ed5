"""mask_nms, batched_mask_nms, matrix_nms: tables by hand, properties, and the special cases of these ops."""

import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sprompt
import sprompt.cuda
from sprompt import BitMasks, native
from sprompt.ops import batched_mask_nms, mask_nms, matrix_nms, pack_masks
from sprompt.testing.spec import blobs
from sprompt.testing.specs.mask_nms import _greedy, _matrix_oracle, _pixels, saliency


def native_runs() -> bool:
    with sprompt.trace_backends() as ran:
        mask_nms(torch.ones(1, 1, 1), torch.ones(1))
    return ran[-1] == ("mask_nms", "native")


def emulated() -> bool:
    return native._C is not None and sprompt.cuda.emulated()


def runs(width: int, *spans: tuple[int, int]) -> Tensor:
    """Masks of one row with the pixels [first, end) set. They correspond to torchvision's boxes of height 1."""
    x = torch.arange(width)
    return torch.stack([(x >= first) & (x < end) for first, end in spans])[:, None]


@pytest.mark.parametrize(
    ("spans", "scores", "threshold", "kept"),
    [
        # torchvision.ops.nms of the boxes (first, 0, end, 1) gives the same indices.
        (((0, 10), (1, 10), (20, 30)), (0.9, 0.8, 0.7), 0.5, [0, 2]),
        (((0, 10), (1, 10), (20, 30)), (0.8, 0.9, 1.0), 0.5, [2, 1]),
        (((0, 10), (5, 15), (10, 20)), (0.9, 0.8, 0.7), 0.5, [0, 1, 2]),  # IoU 1/3
        (((0, 10), (5, 15), (10, 20)), (0.9, 0.8, 0.7), 0.3, [0, 2]),  # the removed second does not remove the third
        (((0, 2), (0, 1)), (0.9, 0.8), 0.5, [0, 1]),  # a mask whose IoU equals the threshold stays
        (((0, 2), (0, 1)), (0.9, 0.8), 0.4999, [0]),
        (((0, 10), (0, 7)), (0.9, 0.8), 0.7, [0, 1]),  # 7/10 is the float 0.7
        (((0, 49), (0, 1)), (0.9, 0.8), 1 / 49, [0, 1]),  # 1/49 * 49 is not 1 in float64, the quotient is 1/49
        (((0, 3), (0, 3), (0, 3)), (0.5, 0.5, 0.5), 0.5, [0]),  # ties: the lower index comes first
        (((0, 3), (0, 3)), (0.5, 0.9), 1.0, [1, 0]),  # nothing exceeds 1
        (((0, 3), (2, 5), (5, 6)), (0.9, 0.8, 0.7), 0.0, [0, 2]),  # any overlap exceeds 0; touching is no overlap
        (((0, 0), (0, 5), (3, 3)), (0.9, 0.8, 0.7), 0.5, [1]),  # empty masks are never kept
        (((0, 5), (0, 5), (6, 9)), (math.nan, 0.1, -math.inf), 0.5, [1, 2]),  # a score of NaN counts as -inf
        (((0, 5), (0, 5)), (math.nan, -math.inf), 0.5, [0]),
    ],
)
def test_greedy_tables(
    spans: tuple[tuple[int, int], ...], scores: tuple[float, ...], threshold: float, kept: list[int]
) -> None:
    masks = runs(60, *spans)
    assert mask_nms(masks, torch.tensor(scores), threshold).tolist() == kept
    keep, counts = batched_mask_nms(masks[None], torch.tensor([scores]), threshold)
    assert keep.tolist() == [kept + [-1] * (len(spans) - len(kept))] and counts.tolist() == [len(kept)]


def test_padding_and_limits() -> None:
    masks = runs(40, (0, 10), (20, 30), (10, 20), (0, 9)).expand(2, 4, 1, 40)
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [-math.inf, math.nan, 5.0, 6.0]])
    counts = torch.tensor([4, 2])
    keep, kept = batched_mask_nms(masks, scores, 0.5, counts, 5)
    assert keep.tolist() == [[3, 2, 1, -1, -1], [0, 1, -1, -1, -1]] and kept.tolist() == [3, 2]
    keep, kept = batched_mask_nms(masks, scores, 0.5, counts, 1)
    assert keep.tolist() == [[3], [0]] and kept.tolist() == [1, 1]
    keep, kept = batched_mask_nms(masks, scores, 0.5, counts, 0)
    assert keep.shape == (2, 0) and kept.tolist() == [0, 0]
    decayed = matrix_nms(masks, scores, counts=counts)
    assert decayed[1, 2:].tolist() == [0, 0] and decayed[1, 0] == -math.inf and decayed[1, 1].isnan()


def test_three_duplicates() -> None:
    """The released formula gives NaN for the third of three identical masks with the linear kernel."""
    masks = runs(40, (0, 10), (0, 10), (0, 10), (20, 25))
    scores = torch.tensor([1.0, 0.9, 0.8, 0.7])
    assert matrix_nms(masks, scores, kernel="linear").tolist() == torch.tensor([1.0, 0.0, 0.0, 0.7]).tolist()
    expected = torch.tensor([1.0, 0.9 * math.exp(-2), 0.8 * math.exp(-2), 0.7])
    torch.testing.assert_close(matrix_nms(masks, scores), expected, rtol=3e-7, atol=0)


def test_matrix_by_hand() -> None:
    """a = [0, 4), b = [0, 3), c = [1, 3): iou ab 3/4, ac 1/2, bc 2/3; c_b = 3/4."""
    masks, scores = runs(40, (1, 3), (0, 4), (0, 3)), torch.tensor([0.25, 1.0, 0.5])
    linear = [0.25 * min(1 / 2, (1 / 3) / (1 / 4)), 1.0, 0.5 * (1 / 4)]
    torch.testing.assert_close(matrix_nms(masks, scores, kernel="linear"), torch.tensor(linear))
    gaussian = [0.25 * math.exp(-3 * max(1 / 4, 4 / 9 - 9 / 16)), 1.0, 0.5 * math.exp(-3 * 9 / 16)]
    torch.testing.assert_close(matrix_nms(masks, scores, sigma=3.0), torch.tensor(gaussian))
    apart = matrix_nms(masks, scores, labels=torch.tensor([-5, 2**40, 2**40]))
    torch.testing.assert_close(apart, torch.tensor([0.25, 1.0, 0.5 * math.exp(-2 * 9 / 16)]))


@pytest.mark.parametrize("kernel", ("gaussian", "linear"))
def test_decay_lies_between_0_and_1(kernel: str) -> None:
    masks = saliency(200, 20, 24, 3)
    decay = matrix_nms(masks, torch.ones(200), kernel=kernel)
    assert decay.max() == 1 and decay[0] == 1
    assert (decay > 0).all() if kernel == "gaussian" else (decay >= 0).all()


def test_toy_map() -> None:
    """Two halves with orthogonal features: 960 seeds give two different maps, and greedy NMS keeps one mask of each."""
    left = torch.zeros(24, 40)
    left[:, :20] = 1
    seeds = torch.arange(960) % 40 < 20
    masks = torch.where(seeds[:, None, None], left, 1 - left)
    assert mask_nms(masks, torch.ones(960)).tolist() == [0, 20]
    decayed = matrix_nms(masks, torch.ones(960))
    assert (decayed == 1).sum() == 2 and (decayed >= 0.7).nonzero().flatten().tolist() == [0, 20]


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 80), st.integers(1, 40), st.integers(1, 80), st.sampled_from((0.02, 0.3, 0.5, 0.9)),
    st.sampled_from((0.0, 0.2, 1 / 3, 0.5, 0.7, 0.9, 1.0)), st.integers(0, 10**6),
)  # fmt: skip
def test_equals_pair_by_pair(n: int, height: int, width: int, density: float, threshold: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    base = torch.rand(1 + n // 3, height, width, generator=g) < density  # noisy copies of fewer masks
    masks = base[torch.randint(len(base), (n,), generator=g)] ^ (torch.rand(n, height, width, generator=g) < 0.03)
    scores = torch.randint(7, (n,), generator=g).float()
    assert mask_nms(masks, scores, threshold).tolist() == _greedy(_pixels(masks), scores.numpy(), threshold)
    labels = torch.randint(2, (n,), generator=g)
    for kernel in ("gaussian", "linear"):
        actual = matrix_nms(masks, scores, kernel=kernel, labels=labels)
        expected = _matrix_oracle(masks, scores, kernel=kernel, labels=labels)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def truth(
    masks: BitMasks, scores: Tensor, threshold: float, kernel: str, sigma: float = 2.0
) -> tuple[list[int], Tensor]:
    """Results of greedy and matrix NMS from the whole pair matrix in float64."""
    order = scores.argsort(descending=True)
    pixels = masks.to_dense(torch.float64).flatten(1)[order]
    common, area = pixels @ pixels.T, pixels.sum(1)
    iou = common / (area[:, None] + area - common)
    keep = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        keep[i + 1 :] &= ~(keep[i] & (iou[i, i + 1 :] > threshold))
    iou = iou.triu(1)
    c = iou.amax(0)[:, None]
    ratio = torch.exp(-sigma * (iou**2 - c**2)) if kernel == "gaussian" else (1 - iou) / (1 - c).clamp(min=1e-6)
    decay = torch.where(torch.ones_like(iou).triu(1) > 0, ratio, 1).amin(0)
    decayed = torch.empty_like(decay).scatter_(0, order, scores[order].double() * decay)
    return order[keep].tolist(), decayed.float()


@pytest.mark.parametrize("shape", ((33, 210, 300), (300, 25, 34), (6, 400, 500)), ids=str)
@pytest.mark.parametrize("source", ("blobs", "saliency", "noise"))
def test_large_masks(shape: tuple[int, int, int], source: str) -> None:
    """Wide bins (pixels are counted until the decision is certain), units of more than one pixel, several blocks, and
    thresholds that equal the IoU of a pair."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    masks = {"blobs": blobs(*shape, seed=1), "saliency": saliency(*shape, seed=2), "noise": noise}[source]
    if emulated():
        masks = masks[:70, :130]
    masks[:, 0, 0] = 1  # no mask is empty
    bits = pack_masks(masks)
    scores = torch.rand(len(masks), generator=torch.Generator().manual_seed(4))
    pixels = bits.to_dense(torch.float64).flatten(1)[:7]
    common = pixels @ pixels.T
    ratios = (common / (pixels.sum(1)[:, None] + pixels.sum(1) - common))[0, 1:].tolist()
    with sprompt.use_backend("native") if native._C and not emulated() else contextlib.nullcontext():
        for number, threshold in enumerate((0.0, 0.05, 0.5, 0.9, *ratios)):
            kernel = ("gaussian", "linear")[number % 2]
            kept, decayed = truth(bits, scores, threshold, kernel)
            assert mask_nms(bits, scores, threshold).tolist() == kept
            if number < 4:
                torch.testing.assert_close(matrix_nms(bits, scores, kernel=kernel), decayed, rtol=1e-6, atol=1e-7)


def overlapping(n: int, words: int, seed: int) -> tuple[BitMasks, np.ndarray]:
    """(masks, their pixels as a numpy array). Each mask is one row of pixels in `words` words; the last word is not full. The
    masks are upsampled noise; some are near copies of others, one is empty and one is full."""
    pixels = 32 * words - 5
    g = torch.Generator().manual_seed(seed)
    noise = torch.nn.functional.interpolate(torch.randn(n, 1, 3 + words % 11, generator=g), pixels, mode="linear")[:, 0]
    masks = noise > 0.3
    copies = torch.arange(n // 5) * 5
    masks[copies] = masks[torch.randint(n, copies.shape, generator=g)] ^ (
        torch.rand(len(copies), pixels, generator=g) < 0.04
    )
    masks[n // 3] = False
    masks[n // 2] = True
    bits = pack_masks(masks[:, None])
    unpacked = np.unpackbits(bits.words.numpy().view(np.uint8), axis=1, bitorder="little")[:, :pixels].astype(
        np.float32
    )
    return bits, unpacked


def numpy_nms(unpacked: np.ndarray, scores: Tensor, threshold: float) -> tuple[list[int], dict[str, np.ndarray]]:
    """Results of greedy and matrix NMS from all pairs, in float64."""
    order = scores.argsort(descending=True, stable=True).numpy()
    ordered = unpacked[order]
    common, area = (ordered @ ordered.T).astype(np.float64), ordered.sum(1, dtype=np.float64)
    iou = common / np.maximum(area[:, None] + area - common, 1)
    keep = area > 0
    for i in range(len(order)):
        keep[i + 1 :] &= ~(keep[i] & (iou[i, i + 1 :] > threshold))
    upper = np.triu(iou, 1)
    c = upper.max(0)[:, None]
    ratios = {
        "gaussian": np.exp(-2 * (upper**2 - c**2)),
        "linear": (1 - upper) / np.maximum(1 - c, 1e-6),
    }
    decayed = {}
    for kernel, ratio in ratios.items():
        decay = np.where(np.triu(np.ones_like(iou), 1) > 0, ratio, 1).min(0)
        decayed[kernel] = np.empty(len(order))
        decayed[kernel][order] = scores.double().numpy()[order] * np.minimum(decay, 1)
    return order[keep].tolist(), decayed


@pytest.mark.parametrize(
    ("n", "words"),
    (
        *((n, words) for n in (3, 5, 129, 390) for words in (1, 2, 7, 25, 27, 64)),
        *((150, words) for words in (3, 8, 9, 23, 24, 26, 28, 33, 48, 49, 511, 512, 513, 641, 2047, 2048, 4800)),
    ),
)
def test_overlapping_masks_against_numpy(n: int, words: int) -> None:
    """Row lengths near the sizes of segments, stretches, bins, sketches and 16-bit counts; numbers of rows and columns near
    tiles of 128."""
    if not native_runs():
        n = min(n, 60)
    if emulated() and words > 64:
        pytest.skip("slow on an emulated GPU")
    bits, unpacked = overlapping(n, words, 31 * n + words)
    scores = torch.rand(n, generator=torch.Generator().manual_seed(words))
    for threshold in (0.5, 0.3):
        kept, decayed = numpy_nms(unpacked, scores, threshold)
        assert mask_nms(bits, scores, threshold).tolist() == kept
    for kernel, expected in decayed.items():
        torch.testing.assert_close(
            matrix_nms(bits, scores, kernel=kernel).double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7
        )


def test_overlapping_masks_with_labels_counts_and_limits() -> None:
    bits, unpacked = overlapping(400, 27, 7)
    n = 400 if native_runs() else 150
    bits, unpacked = bits[:n], unpacked[:n]
    scores = torch.randint(50, (n,), generator=torch.Generator().manual_seed(1)) / 50
    labels = torch.randint(3, (n,), generator=torch.Generator().manual_seed(2))
    for kernel in ("gaussian", "linear"):
        actual = matrix_nms(bits, scores, kernel=kernel, labels=labels)
        for label in range(3):
            chosen = labels == label
            _, expected = numpy_nms(unpacked[chosen.numpy()], scores[chosen], 0.5)
            torch.testing.assert_close(
                actual[chosen].double(), torch.from_numpy(expected[kernel]), rtol=1e-6, atol=1e-7
            )
    real = n - 37
    kept, _ = numpy_nms(unpacked[:real], scores[:real], 0.45)
    for most in (1, 130, n):
        keep, found = batched_mask_nms(bits.reshape(1, n), scores[None], 0.45, torch.tensor([real]), most)
        assert keep[0, : int(found)].tolist() == kept[:most] and (keep[0, int(found) :] == -1).all()


def test_the_same_on_any_number_of_threads() -> None:
    n = 600 if native_runs() else 60  # enough pairs that the kernel uses several threads
    masks = torch.rand(n, 30, 40, generator=torch.Generator().manual_seed(0))
    scores = torch.rand(n, generator=torch.Generator().manual_seed(1))
    holes = overlapping(900 if native_runs() else 90, 27, 4)[0]
    hole_scores = torch.rand(len(holes), generator=torch.Generator().manual_seed(2))
    batch, batch_scores = pack_masks(saliency(n, 30, 40, 5)).reshape(6, n // 6), scores.reshape(6, n // 6)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(
                (
                    mask_nms(masks, scores, 0.33),
                    matrix_nms(masks, scores),
                    matrix_nms(masks, scores, kernel="linear"),
                    *batched_mask_nms(batch, batch_scores),
                    matrix_nms(batch, batch_scores),
                    mask_nms(holes, hole_scores, 0.4),
                    matrix_nms(holes, hole_scores, kernel="linear"),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory_that_is_not_ours_is_not_read() -> None:
    """Fresh scratch memory holds arbitrary values. Results must not depend on them, not even in lanes that no mask uses yet."""
    masks, scores = pack_masks(saliency(120, 20, 24, 0)), torch.rand(120, generator=torch.Generator().manual_seed(0))
    expected = mask_nms(masks, scores, 0.8), matrix_nms(masks, scores)
    for fill in (-1, 127, -128, 3):
        for size in (120 + 32, 200):
            junk = torch.full((size * 192,), fill, dtype=torch.int8)
            del junk  # the allocator returns the same bytes to the next caller
            assert torch.equal(mask_nms(masks, scores, 0.8), expected[0])
            assert torch.equal(matrix_nms(masks, scores), expected[1])


def test_order_of_the_caller() -> None:
    masks, scores = saliency(90, 14, 15, 8), torch.rand(90, generator=torch.Generator().manual_seed(2))
    shuffle = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    assert torch.equal(shuffle[mask_nms(masks[shuffle], scores[shuffle])], mask_nms(masks, scores))
    assert torch.equal(matrix_nms(masks[shuffle], scores[shuffle]), matrix_nms(masks, scores)[shuffle])


def test_no_gradient() -> None:
    masks, scores = saliency(9, 5, 6, 0).requires_grad_(), torch.rand(9).requires_grad_()
    assert not matrix_nms(masks, scores).requires_grad
    assert not mask_nms(masks, scores).requires_grad


def test_float64_scores_run_the_reference() -> None:
    """A difference of scores that float32 cannot represent still orders the masks."""
    masks, scores = runs(9, (0, 5), (0, 5)), torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert mask_nms(masks, scores).tolist() == [1]
    assert matrix_nms(masks, scores).dtype == torch.float64


def test_no_pair_matrix_and_no_dense_mask() -> None:
    """For four thousand masks the pair matrix would take 64 MB; the scratch memory takes less than 1 MB."""
    if not native_runs():
        pytest.skip("only the native kernel promises this")
    bits = BitMasks(pack_masks(blobs(500, 16, 16, 0)).words.repeat(8, 1), (16, 16))
    scores = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        matrix_nms(bits, scores)
        mask_nms(bits, scores)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 1_000_000, largest


@pytest.mark.parametrize("name", ("batched_mask_nms", "matrix_nms"))
def test_counts_out_of_range(name: str) -> None:
    masks, scores = torch.ones(2, 3, 2, 2), torch.rand(2, 3)
    function = {"batched_mask_nms": batched_mask_nms, "matrix_nms": matrix_nms}[name]
    for bad in ([4, 0], [0, -1]):
        with pytest.raises(ValueError, match=rf"{name}: counts must lie between 0 and 3, got {bad[0] or bad[1]}"):
            function(masks, scores, counts=torch.tensor(bad))


def small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the CUDA kernels use panels of 128 masks, so that a few masks fill several panels."""
    from sprompt.ops.mask_nms import cuda

    monkeypatch.setattr(cuda, "MOST", 1)


def one_word(n: int, seed: int, bits: int = 12) -> BitMasks:
    """n masks of up to `bits` pixels; some are duplicates, some are empty, and some pairs are disjoint."""
    return pack_masks(torch.rand(n, 1, bits, generator=torch.Generator().manual_seed(seed)) < 0.35)


def quick_greedy(masks: BitMasks, scores: Tensor, threshold: float) -> list[int]:
    """Greedy NMS from the whole pair matrix in float64, in the order of a stable sort."""
    order = scores.argsort(descending=True, stable=True)
    pixels = masks.to_dense(torch.float64).flatten(1)[order]
    common, area = pixels @ pixels.T, pixels.sum(1)
    over = common / (area[:, None] + area - common).clamp(min=1) > threshold
    keep = area > 0
    for i in range(len(order)):
        keep[i + 1 :] &= ~(keep[i] & over[i, i + 1 :])
    return order[keep].tolist()


@pytest.mark.parametrize("n", (31, 32, 33, 127, 128, 129, 383, 385))
@pytest.mark.parametrize("threshold", (0.0, 0.3, 0.5, 1.0))
def test_greedy_over_groups_and_panels(n: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of masks near 32 (the kernel decides 32 masks at once) and near whole panels; few or most of the masks stay."""
    small_scratch(monkeypatch)
    masks, scores = one_word(n, n), torch.randint(9, (n,), generator=torch.Generator().manual_seed(n)).float()
    assert mask_nms(masks, scores, threshold).tolist() == quick_greedy(masks, scores, threshold)
    single = BitMasks(
        (1 << torch.arange(n, dtype=torch.int32) % 31)[:, None], (1, 31)
    )  # 31 masks stay, their copies are removed
    assert mask_nms(single, scores, threshold).tolist() == quick_greedy(single, scores, threshold)


def test_greedy_chains() -> None:
    """Each mask overlaps only the next mask. Every second mask stays, and each decision needs the decision before it."""
    n = 300
    masks = runs(2 * n + 2, *((2 * i, 2 * i + 4) for i in range(n)))  # IoU 1/3 with the next mask
    scores = torch.arange(n, 0, -1).float()
    assert mask_nms(masks, scores, 0.3).tolist() == list(range(0, n, 2))
    assert mask_nms(masks, -scores, 0.3).tolist() == list(range(n - 1, -1, -2))
    assert mask_nms(masks, scores, 0.34).tolist() == list(range(n))


def test_greedy_whole_panels_apart() -> None:
    """Copies of a mask that stays come more than two thousand places after it, and more than a thousand within the largest
    panel."""
    n = 3300 if emulated() or native_runs() else 300
    words = torch.zeros(n, 2, dtype=torch.int32)
    words[:, 0] = 1 << torch.arange(n, dtype=torch.int32) % 29
    words[n - 40 :, 0], words[n - 40 :, 1] = 0, 1 + torch.arange(40, dtype=torch.int32) % 3
    words[0] = torch.tensor([0, 1])
    words[[n * 7 // 12, n * 10 // 11, n * 30 // 31]] = torch.tensor([0, 8], dtype=torch.int32)
    masks, scores = BitMasks(words, (1, 64)), -torch.arange(n).float()
    kept = mask_nms(masks, scores, 0.4)
    assert kept.tolist() == quick_greedy(masks, scores, 0.4)
    keep, counts = batched_mask_nms(masks[None], scores[None], 0.4, None, 7)
    assert keep[0].tolist() == kept[:7].tolist() and counts.tolist() == [7]


@pytest.mark.parametrize("limit", (1, 31, 32, 33, 129, 200))
def test_greedy_limits_end_inside_a_group(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_scratch(monkeypatch)
    words = torch.zeros(2, 170, 6, dtype=torch.int32)
    words[:, torch.arange(170), torch.arange(170) // 31] = (
        1 << torch.arange(170, dtype=torch.int32) % 31
    )  # all masks are disjoint
    words[1, 3::2] = words[1, 1]  # copies
    scores = torch.rand(2, 170, generator=torch.Generator().manual_seed(0))
    masks = BitMasks(words, (12, 16))
    keep, counts = batched_mask_nms(masks, scores, 0.5, torch.tensor([170, 150]), limit)
    for image, real in enumerate((170, 150)):
        kept = quick_greedy(masks[image][:real], scores[image, :real], 0.5)[:limit]
        assert keep[image].tolist() == kept + [-1] * (limit - len(kept)) and counts[image] == len(kept)


@pytest.mark.parametrize("kernel", ("gaussian", "linear"))
@pytest.mark.parametrize("n", (33, 128, 129, 290))
def test_matrix_over_panels(n: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_scratch(monkeypatch)
    g = torch.Generator().manual_seed(n)
    masks, scores = torch.rand(2, n, 5, 9, generator=g) < 0.4, torch.rand(2, n, generator=g)
    masks[:, ::9] = masks[:, 4:5]  # copies, so that c is 1
    labels, counts = torch.randint(3, (2, n), generator=g), torch.tensor([n, n - 17])
    for options in ({}, {"labels": labels}, {"labels": labels, "counts": counts}):
        actual = matrix_nms(masks, scores, kernel=kernel, **options)
        for image in range(2):
            real = n if image == 0 or "counts" not in options else n - 17
            label = labels[image, :real] if labels is options.get("labels") else torch.zeros(real)
            order = scores[image, :real].argsort(descending=True)
            pixels = masks[image, :real].flatten(1).double()[order]
            common, area = pixels @ pixels.T, pixels.sum(1)
            pairs = (label[order][:, None] == label[order]).triu(1)
            iou = torch.where(pairs, common / (area[:, None] + area - common).clamp(min=1), 0)
            c = iou.amax(0)[:, None]
            ratio = torch.exp(-2 * (iou**2 - c**2)) if kernel == "gaussian" else (1 - iou) / (1 - c).clamp(min=1e-6)
            decay = torch.where(pairs, ratio, 1).amin(0).clamp(max=1)
            expected = torch.zeros(n, dtype=torch.float64)
            expected[order] = scores[image, :real][order].double() * decay
            torch.testing.assert_close(actual[image], expected.float(), rtol=1e-6, atol=1e-7)


def test_counts_of_more_than_16_bits() -> None:
    """Masks of more than 2^16 pixels: the area of a full mask does not fit 16 bits."""
    masks = torch.ones(5, 256, 257, dtype=torch.bool)
    masks[1, 100:], masks[2, :, 128:], masks[4] = False, False, False
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    assert mask_nms(masks, scores, 0.45).tolist() == [0, 1]
    for kernel in ("gaussian", "linear"):
        expected = _matrix_oracle(masks, scores, kernel=kernel)
        torch.testing.assert_close(matrix_nms(masks, scores, kernel=kernel), expected, rtol=1e-6, atol=1e-7)
