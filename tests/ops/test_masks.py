"""masks: hand-written tables, the word layout, geometry of BitMasks, agreement with pycocotools."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from sprompt import BitMasks, native
from sprompt.masks import words_for
from sprompt.ops import mask_area, mask_boxes, mask_iou, pack_masks
from sprompt.testing.spec import blobs, random

images = hnp.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 80)))


def test_word_layout() -> None:
    """Pixel p is bit p % 32 of word p // 32; bit 31 is the sign."""
    dense = torch.zeros(1, 3, 20, dtype=torch.bool)
    for p in (0, 31, 32, 59):
        dense.view(-1)[p] = True
    assert pack_masks(dense).words.tolist() == [[1 - 2**31, 1 | 1 << 27]]


@settings(deadline=None, max_examples=50)
@given(images)
def test_words_read_by_numpy(dense: np.ndarray) -> None:
    bits = pack_masks(torch.from_numpy(dense))
    unpacked = np.unpackbits(bits.words.numpy().view(np.uint8), axis=-1, bitorder="little")
    pixels = dense.shape[1] * dense.shape[2]
    assert (unpacked[:, :pixels] == dense.reshape(len(dense), -1)).all()
    assert not unpacked[:, pixels:].any(), "padding bits are 0"
    assert torch.equal(bits.to_dense(), torch.from_numpy(dense))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_float_threshold_is_strict(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.25, 0.5, 0.75, float("nan"), float("inf"), -float("inf"), -1.0, 0.0]] * 9, dtype=dtype)
    assert pack_masks(values).to_dense()[4].int().tolist() == [0, 0, 1, 0, 1, 0, 0, 0]
    assert pack_masks(values, 0.25).to_dense()[4].int().tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert pack_masks(values, -1.0).to_dense()[4].int().tolist() == [1, 1, 1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), ids=str)
def test_integers_are_set_where_not_zero(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 2, 127, 0]] * 8, dtype=dtype)
    assert pack_masks(values, 100.0).to_dense()[7].int().tolist() == [0, 1, 1, 1, 0], "the threshold is for floats"


@pytest.mark.skipif(bool(native.why_not()), reason="a test of the compiled kernel")
@pytest.mark.parametrize("threads", (1, 2, 3, 7))
@pytest.mark.parametrize(
    ("count", "pixels"),
    (
        *((3, p) for p in (0, 1, 7, 31, 32, 33, 63, 64, 65, 96, 100)),
        (300, 1057),
        (5, 1048573),  # the kernel requests huge pages for these sizes
        (2, 2 * 2097152 + 37),  # and splits a row into several jobs
        (1, 5000011),
    ),
)
def test_unpacking_reads_the_bits(count: int, pixels: int, threads: int) -> None:
    """The words have gaps between rows, or one row is expanded to all; bits behind the last pixel are random. The output is
    a part of a larger memory, and the rest of that memory does not change."""
    n = words_for(pixels)
    wide = torch.randint(-(2**31), 2**31, (count, n + 3), dtype=torch.int32, generator=random(pixels))
    for words in (wide[:, :n], wide[:1, :n].expand(count, n)):
        memory = torch.full((count * pixels + 80,), 7, dtype=torch.uint8)
        native._C.unpack_masks(words, memory[5 : 5 + count * pixels].view(torch.bool).view(count, pixels), threads)
        bits = np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")[:, :pixels]
        assert np.array_equal(memory[5 : 5 + count * pixels].numpy().reshape(count, pixels), bits)
        assert (memory[:5] == 7).all() and (memory[5 + count * pixels :] == 7).all()


@settings(deadline=None, max_examples=50)
@given(images)
def test_area_and_boxes(dense: np.ndarray) -> None:
    masks = torch.from_numpy(dense)
    expected = []
    for image in dense:
        y, x = np.nonzero(image)
        expected.append([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])
    assert mask_boxes(masks).tolist() == expected
    assert mask_area(masks).tolist() == dense.sum((1, 2)).tolist()


@pytest.mark.parametrize("width", (1, 31, 32, 33, 63, 64, 65, 127, 129, 200))
def test_boxes_of_one_pixel(width: int) -> None:
    """One pixel at every column of the middle row, at every alignment of a row to a word."""
    dense = torch.zeros(width, 3, width, dtype=torch.bool)
    dense[torch.arange(width), 1, torch.arange(width)] = True
    assert mask_boxes(dense).tolist() == [[x, 1, x + 1, 2] for x in range(width)]


@pytest.mark.parametrize(("height", "width"), ((7, 9), (60, 80), (1, 700), (700, 1), (97, 131)))
@pytest.mark.parametrize("kind", ("noise", "blobs", "sparse"))
def test_iou_equals_pycocotools(height: int, width: int, kind: str) -> None:
    if kind == "blobs":
        a, b = blobs(23, height, width, 1) > 0.5, blobs(17, height, width, 2) > 0.5
    else:
        g = torch.Generator().manual_seed(0)
        density = 0.5 if kind == "noise" else 0.003
        a, b = (torch.rand(k, height, width, generator=g) < density for k in (23, 17))
    encoded = [coco.encode(np.asfortranarray(m.permute(1, 2, 0).numpy().astype(np.uint8))) for m in (a, b)]
    expected = torch.from_numpy(coco.iou(encoded[0], encoded[1], [0] * 17)).nan_to_num(0.0)
    both = torch.from_numpy(coco.iou(encoded[0], encoded[0], [0] * 23)).nan_to_num(0.0)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(mask_iou(a, b, dtype=dtype), expected.to(dtype))
        assert torch.equal(mask_iou(pack_masks(b), pack_masks(a), dtype=dtype), expected.to(dtype).T)
        assert torch.equal(mask_iou(a, dtype=dtype), both.to(dtype))


@pytest.mark.parametrize(("count", "height", "width"), [(3, 130, 129), (35, 33, 65), (40, 150, 131)])
def test_long_masks_and_many(count: int, height: int, width: int) -> None:
    """More words than a warp reads at once, and more masks than a tile holds. All masks differ, so that a mix-up of two masks
    is seen. numpy gives the expected values."""
    dense = np.random.default_rng(count).random((count, height, width)) < np.linspace(0.02, 0.9, count)[:, None, None]
    dense[0] = False
    dense[1], dense[1, height - 1, width - 1] = False, True  # only in the last word
    dense[2], dense[2, 0, 0] = False, True
    masks = BitMasks.from_dense(torch.from_numpy(dense))
    assert np.array_equal(masks.area().numpy(), dense.sum((1, 2)))
    boxes = [[0, 0, 0, 0], [width - 1, height - 1, width, height], [0, 0, 1, 1]]
    for mask in dense[3:]:
        y, x = np.nonzero(mask)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    assert masks.boxes().tolist() == boxes
    flat = dense.reshape(count, -1).astype(np.float64)
    common = flat @ flat.T
    either = np.maximum(flat.sum(1)[:, None] + flat.sum(1) - common, 1)
    for iou in (masks.iou(masks[:]), mask_iou(masks)):
        assert np.array_equal(iou.numpy(), (common / either).astype(np.float32))
    assert np.array_equal(masks.to_dense().numpy(), dense)


def test_iou_table() -> None:
    rows = ("11110000", "00111100", "11111111", "00000000")
    masks = torch.tensor([[[int(c) for c in row]] for row in rows])
    third = torch.tensor(1 / 3, dtype=torch.float64).float().item()
    assert mask_iou(masks).tolist() == [
        [1.0, third, 0.5, 0.0],
        [third, 1.0, 0.5, 0.0],
        [0.5, 0.5, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]


# -- BitMasks


def test_geometry_equals_dense() -> None:
    dense = torch.rand(3, 5, 45, 77, generator=torch.Generator().manual_seed(1)) < 0.4
    bits = pack_masks(dense)
    assert torch.equal(bits.flip().to_dense(), dense.flip(-1))
    assert torch.equal(bits.crop(3, 5, 40, 71).to_dense(), dense[..., 3:43, 5:76])
    assert torch.equal(bits.crop(0, 76, 45, 1).to_dense(), dense[..., 76:])
    assert bits.crop(9, 9, 0, 4).to_dense().shape == (3, 5, 0, 4)
    assert torch.equal(bits.pad(3, 40, 1, 2).to_dense(), torch.nn.functional.pad(dense, (3, 40, 1, 2)))
    assert torch.equal(bits.pad(0, 0, 0, 0).words, bits.words)


@settings(deadline=None, max_examples=60)
@given(images, st.integers(0, 45), st.integers(0, 45), st.integers(0, 45), st.integers(0, 45), st.booleans())
def test_window_is_pad_then_crop(dense: np.ndarray, left: int, right: int, top: int, bottom: int, flip: bool) -> None:
    masks = torch.from_numpy(dense)
    expected = torch.nn.functional.pad(masks, (left, right, top, bottom))
    padded = pack_masks(masks).pad(left, right, top, bottom)
    assert torch.equal(padded.to_dense(), expected)
    assert torch.equal((padded.flip() if flip else padded).to_dense(), expected.flip(-1) if flip else expected)
    back = padded.crop(top, left, dense.shape[1], dense.shape[2])
    assert torch.equal(back.words, pack_masks(masks).words), "padding bits of a crop are 0"


def test_indexing_cat_stack() -> None:
    dense = torch.rand(4, 6, 9, 11, generator=torch.Generator().manual_seed(2)) < 0.5
    bits = pack_masks(dense)
    for index in (
        1,
        -1,
        slice(1, 3),
        (2, 3),
        (slice(None), slice(None, None, 2)),
        torch.tensor([3, 0]),
        (Ellipsis, 2),
        None,
    ):
        assert torch.equal(bits[index].to_dense(), dense[index] if index != (Ellipsis, 2) else dense[:, 2])
    chosen = torch.rand(4, 6) < 0.5
    assert torch.equal(bits[chosen].to_dense(), dense[chosen])
    assert torch.equal(BitMasks.cat([bits, bits[:1]]).to_dense(), torch.cat((dense, dense[:1])))
    assert torch.equal(BitMasks.cat([bits, bits], -1).to_dense(), torch.cat((dense, dense), 1))
    assert torch.equal(BitMasks.stack([bits, bits], -1).to_dense(), torch.stack((dense, dense), 2))
    assert bits.shape == (4, 6) and len(bits) == 4 and bits.size == (9, 11)
    assert [len(one) for one in bits] == [6] * 4, "iteration goes over the first batch dimension"


def test_copies_pickles_and_is_frozen() -> None:
    bits = pack_masks(torch.ones(2, 5, 7))
    for other in (pickle.loads(pickle.dumps(bits)), copy.deepcopy(bits), copy.copy(bits)):
        assert torch.equal(other.words, bits.words) and other.size == bits.size
    with pytest.raises(AttributeError):
        bits.size = (1, 1)


def test_is_a_pytree() -> None:
    bits = pack_masks(torch.ones(2, 5, 7))
    leaves, structure = torch.utils._pytree.tree_flatten({"a": bits})
    assert len(leaves) == 1 and leaves[0] is bits.words
    assert torch.utils._pytree.tree_unflatten(leaves, structure)["a"].size == (5, 7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda: BitMasks(torch.zeros(1), (1, 1)), TypeError, "words must have dtype int32"),
        (lambda: BitMasks(torch.zeros(3, dtype=torch.int32), (4, 8)), ValueError, r"words must have shape \(..., 1\) for 4x8"),
        (lambda: BitMasks(torch.zeros(1, dtype=torch.int32), (4, -8)), ValueError, "size must be at least 0"),
        (lambda: BitMasks(torch.zeros(1, dtype=torch.int32), 5), TypeError, r"size must be \(H, W\)"),
        (lambda: BitMasks(torch.zeros(1, dtype=torch.int32), (2.0, 2)), TypeError, "size must be two whole numbers"),
        (lambda: pack_masks(torch.ones(2, 4, 4)).crop(0, 0, 5, 4), ValueError, "window must lie inside 4x4"),
        (lambda: pack_masks(torch.ones(2, 4, 4)).pad(0, -1, 0, 0), ValueError, "every side must be at least 0"),
        (lambda: BitMasks.cat([]), ValueError, "at least one"),
        (lambda: BitMasks.cat([pack_masks(torch.ones(2, 4, 4)), pack_masks(torch.ones(2, 4, 5))]), ValueError, "the same size"),
        (lambda: BitMasks.cat([pack_masks(torch.ones(2, 4, 4))], 1), ValueError, "dim must be a batch dimension"),
        (lambda: len(pack_masks(torch.ones(4, 4))), TypeError, "no batch dimension"),
        (lambda: mask_iou(pack_masks(torch.ones(4, 4))[None], torch.ones(1, 4, 4, device="meta")), ValueError, "device of a"),
    ),
)  # fmt: skip
def test_bad_input(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("n", "m", "words"),
    (
        *((n, m, words) for n, m in ((3, 5), (65, 127), (130, 64), (257, 129)) for words in (1, 2, 7, 25, 27, 64)),
        *((72, 128, words) for words in (8, 23, 24, 26, 28, 33, 49, 512, 2039, 2040, 2041, 4800)),
    ),
)
def test_iou_of_overlapping_masks(n: int, m: int, words: int) -> None:
    """Against numpy's unpackbits, at sizes near those of tiles, of stretches of words, and of counts that fit 16 bits."""
    bits, unpacked = [], []
    for count, seed in ((n, words), (m, words + 1)):
        g = torch.Generator().manual_seed(seed)
        noise = torch.nn.functional.interpolate(torch.randn(count, 1, 9, generator=g), 32 * words, mode="linear")
        masks = noise > (-0.5 if words in (1, 2041) else 0.4)
        masks[::11] = True
        masks[1] = False
        bits.append(pack_masks(masks))
        unpacked.append(
            np.unpackbits(bits[-1].words.numpy().view(np.uint8), axis=1, bitorder="little").astype(np.float32)
        )
    for a, b in ((0, 1), (1, 1)):
        common = unpacked[a] @ unpacked[b].T
        either = unpacked[a].sum(1)[:, None] + unpacked[b].sum(1) - common
        expected = np.where(either > 0, common.astype(float) / np.maximum(either, 1), 0).astype(np.float32)
        actual = mask_iou(bits[a]) if a == b else mask_iou(bits[a], bits[b])
        assert np.array_equal(actual.numpy(), expected)


@pytest.mark.parametrize("size", ((0, 5), (5, 0), (0, 0)))
def test_no_pixels(size: tuple[int, int]) -> None:
    bits = pack_masks(torch.zeros(3, *size))
    assert bits.words.shape == (3, 0) and words_for(0) == 0
    assert bits.area().tolist() == [0, 0, 0] and bits.boxes().tolist() == [[0] * 4] * 3
    assert bits.iou().tolist() == [[0.0] * 3] * 3
    assert bits.to_dense().shape == (3, *size) and bits.flip().to_dense().shape == (3, *size)
    assert not bits.pad(1, 1, 1, 1).to_dense().any()


def test_more_than_two_to_the_31_pixels_by_shape() -> None:
    """The words are one expanded row, so that they take no memory."""
    assert BitMasks(torch.zeros(1, 1, dtype=torch.int32).expand(2**27, 1), (4, 8)).shape == (2**27,)
    size = (2**16, 2**16 + 1)
    one = BitMasks(torch.zeros(1, dtype=torch.int32).expand(words_for(size[0] * size[1])), size)
    assert one.pixels == 2**32 + 2**16
    with pytest.raises(ValueError, match="words must have shape"):
        BitMasks(one.words[:-1], size)
