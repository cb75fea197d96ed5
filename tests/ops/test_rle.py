"""Run lengths: strings written by hand, equality with pycocotools to the byte, every kind of malformed string, and random
strings."""

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

import sprompt
from sprompt import BitMasks, backends, cuda, native
from sprompt.ops import pack_masks, rle_decode, rle_encode
from sprompt.ops.declare import OPS
from sprompt.ops.rle import _in_one_copy
from sprompt.ops.rle.faults import MOST_CHARACTERS, MOST_PIXELS
from sprompt.testing.spec import ErrorCase, blobs, random
from sprompt.testing.specs.rle import MALFORMED, coco_encode

BACKENDS = [name for name in ("native", "reference") if not backends.available("rle_encode", "cpu")[name]]
needs_native = pytest.mark.skipif(native._C is None, reason="the kernels are not built")
few = settings(deadline=None, max_examples=60)

# (rows of the mask, its string). The comments give the runs, counted by hand.
TABLE = (
    (["0"], "1"),  # 1
    (["1"], "01"),  # 0 1
    (["00", "00"], "4"),  # 4
    (["11", "11"], "04"),  # 0 4
    (["01", "11"], "13"),  # 1 3
    (["10", "01"], "0120"),  # 0 1 2 1: the last number is 1 - 1
    (["10", "01"][::-1], "121"),  # 1 2 1
    (["010", "010", "010"], "333"),  # 3 3 3
    (["101", "101", "101"], "0330"),  # 0 3 3 3: the last number is 3 - 3
    (["1010"], "01100"),  # 0 1 1 1 1: the last two numbers are 1 - 1
    (["0" * 15 + "1"], "?1"),  # 15 1: 15 fits one group
    (["0" * 16 + "1"], "`01"),  # 16 1: 16 does not fit, its 5 bits read as -16; then group 0
    (["0" * 31 + "1"], "o01"),  # 31 1
    (["0" * 32 + "1"], "P11"),  # 32 1: group 0, then group 1
    (["0" * 511 + "1"], "o?1"),  # 511 1: groups 31, 15
    (["0" * 512 + "1"], "P`01"),  # 512 1: groups 0, 16, 0
)  # fmt: skip


#: Whether this build emulates the CUDA kernels.
EMULATED = not cuda.why_not(torch.empty(0))


@pytest.fixture(params=[*BACKENDS, *["cuda"] * EMULATED])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    ops = ("rle_encode",) if request.param == "cuda" else None  # no CUDA kernel decodes
    with sprompt.use_backend(request.param, ops):
        yield request.param


def check_on_gpu(masks: torch.Tensor) -> None:
    if torch.cuda.is_available():
        assert rle_encode(masks.cuda()) == coco_encode(masks)


def mask_of(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[int(c) for c in row] for row in rows], dtype=torch.bool)


@pytest.mark.parametrize(("rows", "text"), TABLE)
def test_table(backend: str, rows: list[str], text: str) -> None:
    mask = mask_of(rows)
    size = list(mask.shape)
    assert rle_encode(mask) == [{"size": size, "counts": text.encode()}]
    check_on_gpu(mask[None])
    assert torch.equal(rle_decode([{"size": size, "counts": text}]).to_dense(), mask[None])


def test_negative_differences(backend: str) -> None:
    # The runs 0 1 40 5 3 are written as 0, 1, 40, 4, -37. 40 = 8 + 32 * 1; -37 = 27 + 32 * (-2), which gives the groups 27 and
    # 30.
    mask = mask_of(["1" + "0" * 40 + "1" * 5 + "0" * 3])
    text = bytes([48, 49, 48 + 32 + 8, 48 + 1, 48 + 4, 48 + 32 + 27, 48 + 30])
    assert rle_encode(mask) == [{"size": [1, 49], "counts": text}]
    assert torch.equal(rle_decode([{"size": [1, 49], "counts": text}]).to_dense(), mask[None])


def test_every_mask_of_twelve_pixels(backend: str) -> None:
    every = torch.arange(1 << 12)[:, None] >> torch.arange(12) & 1
    if backend != "native":
        every = every[::401]
    for height, width in ((1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)):
        masks = every.reshape(-1, height, width).bool()
        rles = rle_encode(masks)
        assert rles == coco_encode(masks)
        assert torch.equal(rle_decode(rles).to_dense(), masks)


def special(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(13, height, width): four densities, empty, full, blobs, a checkerboard, two kinds of stripes, single pixels in three
    corners."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    masks = [torch.rand(height, width, generator=random(seed + i)) < d for i, d in enumerate((0.5, 0.1, 0.001, 0.999))]
    masks += [
        torch.zeros(height, width).bool(),
        torch.ones(height, width).bool(),
        blobs(1, height, width, seed)[0] > 0.5,
    ]
    masks += [(y + x) % 2 == 0, (y + 0 * x) % 2 == 1, (0 * y + x) % 2 == 1]
    for py, px in ((0, 0), (height - 1, 0), (height - 1, width - 1)):
        masks.append((y == py) & (x == px))
    return torch.stack(masks)


def check_bytes_of_pycocotools(masks: torch.Tensor) -> None:
    rles = rle_encode(masks)
    assert rles == coco_encode(masks)
    check_on_gpu(masks)
    assert all(type(r["counts"]) is bytes and type(r["size"]) is list for r in rles)
    assert torch.equal(rle_decode(rles).to_dense(), masks)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 5000), (5000, 1), (2, 1025), (63, 64), (64, 63), (65, 129), (31, 32), (97, 33)], ids=str
)
def test_bytes_of_pycocotools(size: tuple[int, int]) -> None:
    check_bytes_of_pycocotools(special(*size))


@needs_native
@pytest.mark.parametrize("size", [(128, 1024), (301, 2047), (2000, 3000)], ids=str)
def test_bytes_of_pycocotools_large(size: tuple[int, int]) -> None:
    with sprompt.use_backend("native"):
        check_bytes_of_pycocotools(special(*size)[:: 1 if size[0] < 2000 else 3])


@pytest.mark.parametrize("width", range(1, 140))
def test_every_alignment(width: int) -> None:
    masks = torch.rand(2, 70, width, generator=random(width)) < torch.tensor([0.5, 0.03])[:, None, None]
    rles = rle_encode(masks)
    assert rles == coco_encode(masks)
    assert torch.equal(rle_decode(rles).to_dense(), masks)


def test_sizes_of_zero(backend: str) -> None:
    for size in ((0, 0), (0, 7), (7, 0)):
        empty = torch.zeros(2, *size)
        assert rle_encode(empty) == [{"size": list(size), "counts": b"0"}] * 2 == coco_encode(empty)
        for text in (b"0", b"", b"00"):
            assert rle_decode([{"size": size, "counts": text}]).to_dense().shape == (1, *size)
        with pytest.raises(
            ValueError, match=rf"must have runs that sum to {size[0]}x{size[1]} = 0 pixels, got more in run 0"
        ):
            rle_decode([{"size": size, "counts": b"1"}])


def test_leading_dimensions_are_flattened(backend: str) -> None:
    bits = pack_masks(torch.rand(2, 3, 5, 7, generator=random(0)) < 0.5)
    assert rle_encode(bits) == [rle for i in range(2) for rle in rle_encode(bits[i])]
    assert rle_encode(bits[1, 2]) == rle_encode(bits)[-1:]
    assert rle_encode(bits[:0]) == []
    assert BitMasks.from_rle(bits.rle()).shape == (6,)


def test_padding_bits_are_not_pixels(backend: str) -> None:
    """Words filled by hand, with padding bits that are set."""
    bits = BitMasks(torch.full((1, 1), -1, dtype=torch.int32), (3, 5))
    assert rle_encode(bits) == [{"size": [3, 5], "counts": b"0?"}]


def test_entries_of_many_kinds(backend: str) -> None:
    class Entry(dict):
        pass

    want = mask_of(["010", "010"])[None]
    for counts in (
        b"222",
        "222",
        [2, 2, 2],
        (2, 2, 2),
        [np.int64(2), np.uint8(2), 2],
        [0, 0, 2, 2, 2],
        [2, 1, 0, 1, 2],
    ):
        for size in ([2, 3], (2, 3), np.array([2, 3]), torch.tensor([2, 3])):
            assert torch.equal(rle_decode([Entry(size=size, counts=counts, id=7)]).to_dense(), want)
    assert rle_decode(({"size": [2, 3], "counts": "222"},), [2, 3]).size == (2, 3)


def test_numbers_need_not_be_short(backend: str) -> None:
    """The number 3 as the groups 3, 0, 0, ...: no encoder writes such a number, but pycocotools reads it."""
    for more in range(1, MOST_CHARACTERS):
        text = b"S" + b"P" * (more - 1) + b"03"
        rle = {"size": [2, 3], "counts": text}
        got = rle_decode([rle])
        assert rle_encode(got) == [{"size": [2, 3], "counts": b"33"}]
        assert torch.equal(got.to_dense(torch.uint8)[0], torch.from_numpy(coco.decode(rle)))
    with pytest.raises(ValueError, match="numbers of at most 12 characters, got a longer number from character 0 on"):
        rle_decode([{"size": [2, 3], "counts": b"S" + b"P" * 11 + b"03"}])


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.name)
def test_malformed(backend: str, case: ErrorCase) -> None:
    with pytest.raises(case.error, match="^" + case.message):
        case.call()


def test_every_prefix_and_every_changed_character(backend: str) -> None:
    """A changed string of a real mask gives an error, or a mask. Encoding and decoding that mask must give it back."""
    (rle,) = rle_encode(blobs(1, 17, 90, 3) > 0.5)
    text = rle["counts"]
    for cut in range(len(text)):
        with pytest.raises(ValueError, match=r"rle_decode: rles\[0\] must have"):
            rle_decode([{**rle, "counts": text[:cut]}])
    for place, character in itertools.product(range(0, len(text), 5), range(0, 256, 3)):
        changed = text[:place] + bytes([character]) + text[place + 1 :]
        try:
            bits = rle_decode([{**rle, "counts": changed}])
        except ValueError as error:
            assert str(error).startswith("rle_decode: rles[0] must have")
        else:
            assert torch.equal(rle_decode(rle_encode(bits)).words, bits.words)


def test_first_bad_entry_is_named(backend: str) -> None:
    good, bad = {"size": [3, 4], "counts": b"<"}, {"size": [3, 4], "counts": b";"}
    for place in (0, 3, 40):
        rles = [good] * 41
        rles[place] = bad
        rles[-1] = bad
        with pytest.raises(
            ValueError, match=rf"rle_decode: rles\[{place}\] must have runs that sum to 3x4 = 12 pixels, got 11"
        ):
            rle_decode(rles)


def test_the_op_itself_trusts_nothing(backend: str) -> None:
    """torch.ops.sprompt.rle_decode and rle_encode, called without the checks of the public functions."""
    characters = torch.tensor(list(b"<<"), dtype=torch.uint8)
    decode, encode = torch.ops.sprompt.rle_decode, torch.ops.sprompt.rle_encode
    assert decode(characters, torch.tensor([0, 1, 2]), 3, 4).shape == (2, 1)
    for offsets in ([0, 3], [-1, 1], [1, 0], [0, 2**62], [-(2**62), 2**62]):
        with pytest.raises(ValueError, match=r"rles\[0\] must lie inside the characters, got offsets outside of them"):
            decode(characters, torch.tensor(offsets), 3, 4)
    for height, width in ((-1, -1), (2**20, 2**20), (2**31, 1), (-(2**40), 2**40)):
        with pytest.raises(ValueError, match=r"rle_decode: size must have at most 2\^31 - 1 pixels"):
            decode(characters, torch.tensor([0, 1]), height, width)
        with pytest.raises(ValueError, match=r"rle_encode: size must have at most 2\^31 - 1 pixels"):
            encode(torch.zeros(1, 1, dtype=torch.int32), height, width)
    for height, width in ((0, 5), (5, 7), (100, 100)):
        with pytest.raises(
            ValueError, match=r"rle_encode: words must have shape \(..., \d+\) for \d+x\d+ pixels, got \(..., 1\)"
        ):
            encode(torch.zeros(1, 1, dtype=torch.int32), height, width)
    assert decode(characters.repeat_interleave(2)[::2], torch.tensor([0, 9, 1, 9, 2])[::2], 3, 4).tolist() == [[0], [0]]


@needs_native
def test_largest_masks() -> None:
    """A mask of the largest size takes 268 MB for its bits and no more memory; a mask with one pixel more is refused."""
    with sprompt.use_backend("native"):  # the reference would need more than a byte per pixel
        check_largest_masks()


def check_largest_masks() -> None:
    height, width = 32768, 65535
    bits = rle_decode([{"size": [height, width], "counts": [height * width - 1, 1]}])
    assert bits.words[0, -1] == -(1 << 31) and bits.area().tolist() == [1]
    # 2^31 - 2^15 - 1 in groups of 5 bits is 31, 31, 31, 30, 31, 31, 1.
    assert rle_encode(bits) == [{"size": [height, width], "counts": b"ooonoo11"}]
    column = rle_decode([{"size": [MOST_PIXELS, 1], "counts": [5, MOST_PIXELS - 5]}])
    assert column.area().tolist() == [MOST_PIXELS - 5]
    for size in ((MOST_PIXELS + 1, 1), (1, MOST_PIXELS + 1), (2**16, 2**15)):
        with pytest.raises(ValueError, match=r"must have at most 2\^31 - 1 pixels"):
            rle_decode([{"size": size, "counts": [size[0] * size[1]]}])


def test_any_number_of_threads() -> None:
    masks = special(90, 1100)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            rles = rle_encode(masks)
            results.append((rles, rle_decode(rles).words))
    finally:
        torch.set_num_threads(before)
    assert all(rles == results[0][0] and torch.equal(words, results[0][1]) for rles, words in results)


def from_changes(places: list[int], height: int, width: int) -> torch.Tensor:
    """The mask whose pixels, column by column, change at `places`."""
    flips = torch.zeros(height * width, dtype=torch.int64)
    flips[torch.tensor(places, dtype=torch.int64)] = 1
    return (flips.cumsum(0) % 2 == 1).reshape(width, height).T


def test_few_changes_far_apart() -> None:
    """The characters of a run depend on the three changes before it. These changes may lie in the same 32 columns or many
    hundreds of columns before, in the same column or a thousand rows above."""
    g = random(5)
    for height, width in ((3, 2090), (1090, 70), (2080, 5), (40, 1100)):
        masks = [
            from_changes(torch.randint(height * width, (k,), generator=g).sort()[0].tolist(), height, width)
            for k in (0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 9)
        ]
        columns = torch.arange(0, width, 33)[:12].tolist()  # one change per column, in different groups of 32
        masks += [from_changes([x * height + height // 2 for x in columns[:k]], height, width) for k in range(1, 8)]
        check_bytes_of_pycocotools(torch.stack(masks))


@pytest.mark.parametrize("height", (31, 32, 33, 1023, 1024, 1025, 1056, 1057))
def test_rows_around_tiles(height: int) -> None:
    """Changes in the first and last rows of tiles of 32 and 1024 rows, and between the last row of a column and the first row
    of the next column."""
    masks = torch.zeros(8, height, 35, dtype=torch.bool)
    masks[0, -1] = True
    masks[1, 0] = True
    masks[2, -1, ::2] = True
    masks[3, :1024:31, 3] = True
    masks[4, 31::32] = True
    masks[5, 1023:, 31:33] = True
    masks[6] = torch.rand(height, 35, generator=random(height)) < 0.01
    masks[7, :, 34] = True
    check_bytes_of_pycocotools(masks)


def test_numbers_of_every_length() -> None:
    """Numbers just below, at and just above 2^4, 2^9, 2^14 and 2^19, and their negatives."""
    height, width = 1 << 10, 1 << 11
    masks = []
    for power in (4, 9, 14, 19):
        for off in (-1, 0, 1):
            v = (1 << power) + off
            masks.append(from_changes([v], height, width))  # v
            masks.append(from_changes([1, 2, 5, 6 + v], height, width))  # v, as the difference to 1
            masks.append(from_changes([1, 2 + v, 5 + v, 6 + v], height, width))  # -v, as a difference to 1 + v
    masks = torch.stack(masks)
    check_on_gpu(masks)
    if EMULATED:  # the emulation is slow
        masks = masks[::4]
    assert rle_encode(masks) == coco_encode(masks)


def test_in_one_copy() -> None:
    offsets = torch.tensor([0, 3, 3, 1 << 40])
    for text in (b"", b"abcde"):
        characters = torch.tensor(list(text), dtype=torch.uint8)
        got = _in_one_copy(characters, offsets)
        assert torch.equal(got[0], characters) and torch.equal(got[1], offsets)
        assert got[1].data_ptr() % 8 == 0


def test_fake_outside_of_tracing() -> None:
    characters, offsets = OPS["rle_encode"].outputs(torch.zeros(3, 1, dtype=torch.int32), 4, 5)
    assert characters.shape == (0,) and offsets.shape == (4,)


@pytest.mark.skipif(not EMULATED, reason="needs a build that emulates the CUDA kernels")
def test_words_that_change_between_measuring_and_writing() -> None:
    """The kernel writes nothing in front of the characters and nothing behind them."""
    masks = special(70, 100)
    height, width = 70, 100
    before, after = pack_masks(masks).words, pack_masks(masks.flip(0)).words
    used = torch.zeros(len(masks), 4, 1, dtype=torch.int32)
    contexts = torch.empty(len(masks), 5, 4, dtype=torch.int32)
    starts = torch.empty(len(masks), 4, dtype=torch.int64)
    offsets = torch.zeros(len(masks) + 1, dtype=torch.int64)
    kernels, at = native._C.cuda, (0, 0)
    kernels.rle_measure(at, before, height, width, used, contexts, starts, offsets[1:])
    offsets.cumsum_(0)
    size, margin = int(offsets[-1]), 1 << 18  # more than the largest number of characters of all masks together
    for words in (before, after, torch.full_like(before, 0x55555555)):
        memory = torch.zeros(size + 2 * margin, dtype=torch.uint8)
        kernels.rle_write(at, words, height, width, used, contexts, starts, offsets, memory[margin : margin + size])
        assert not memory[:margin].any() and not memory[margin + size :].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_waits_for_the_device_twice() -> None:
    bits = pack_masks(special(70, 100).cuda())
    expected = rle_encode(bits)  # this call also loads the kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = rle_encode(bits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got == expected == rle_encode(bits.to("cpu"))
    assert sum("synchronizing" in str(w.message) for w in caught) <= 2


@st.composite
def drawings(draw: st.DrawFn) -> torch.Tensor:
    """Rectangles on top of each other; each sets, clears or flips its pixels."""
    height, width = draw(st.integers(0, 140)), draw(st.integers(0, 140) | st.integers(1000, 1100))
    mask = torch.zeros(height, width, dtype=torch.bool)
    for _ in range(draw(st.integers(0, 8))):
        y, x = draw(st.integers(0, height)), draw(st.integers(0, width))
        window = mask[y : y + draw(st.integers(0, height)), x : x + draw(st.integers(0, width))]
        kind = draw(st.integers(0, 2))
        window.copy_((torch.ones_like(window), torch.zeros_like(window), ~window)[kind])
    return mask


@few
@given(drawings())
def test_drawings(mask: torch.Tensor) -> None:
    rles = rle_encode(mask)
    assert rles == coco_encode(mask)
    assert torch.equal(rle_decode(rles).to_dense(), mask[None])


def outcome(text: bytes, size: tuple[int, int]) -> object:
    try:
        return rle_decode([{"size": size, "counts": text}]).words.tolist()
    except ValueError as error:
        return str(error)


def check_any(text: bytes, size: tuple[int, int]) -> None:
    """All backends give the same mask or the same message. A mask must equal that of pycocotools, and decoding its encoding
    must give it back."""
    outcomes = []
    for name in BACKENDS:
        with sprompt.use_backend(name):
            outcomes.append(outcome(text, size))
    assert all(o == outcomes[0] for o in outcomes)
    if isinstance(outcomes[0], str):
        assert outcomes[0].startswith("rle_decode: rles[0] must have ")
        return
    bits = rle_decode([{"size": size, "counts": text}])
    # Our own checks accepted the string, so it is safe to give it to pycocotools.
    theirs = torch.from_numpy(coco.decode({"size": list(size), "counts": text}))
    assert torch.equal(bits.to_dense(torch.uint8)[0], theirs)
    assert torch.equal(rle_decode(rle_encode(bits)).words, bits.words)


sizes = st.tuples(st.integers(0, 40), st.integers(0, 80))


@few
@given(st.binary(max_size=40), sizes)
def test_any_bytes(text: bytes, size: tuple[int, int]) -> None:
    check_any(text, size)


@few
@given(st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=40).map(str.encode), sizes)
def test_any_rle_characters(text: bytes, size: tuple[int, int]) -> None:
    check_any(text, size)


@few
@given(drawings(), st.data())
def test_damaged_strings(mask: torch.Tensor, data: st.DataObject) -> None:
    text = bytearray(rle_encode(mask)[0]["counts"])
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(text)))
        text[place : place + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b"0", b"P", b"o"])
        )
    check_any(bytes(text), (mask.shape[0], mask.shape[1]))


@few
@given(st.lists(st.integers(0, 30) | st.integers(0, 400), max_size=20), st.integers(1, 30))
def test_any_list_of_runs(runs: list[int], height: int) -> None:
    width = -(-sum(runs) // height)
    full = [*runs, height * width - sum(runs)]
    theirs = coco.decode(coco.frPyObjects({"size": [height, width], "counts": full}, height, width))
    got = rle_decode([{"size": [height, width], "counts": full}])
    assert torch.equal(got.to_dense(torch.uint8)[0], torch.from_numpy(theirs))


def test_the_list_is_not_changed() -> None:
    rles = [{"size": [2, 3], "counts": [2, 2, 2]}, {"size": (2, 3), "counts": "222"}]
    copy = [dict(r) for r in rles]
    rle_decode(rles)
    assert rles == copy


def test_decoded_masks_are_evaluated_alike() -> None:
    """area, toBbox and iou: pycocotools on our strings gives the same values as our bits."""
    masks = torch.cat([blobs(6, 60, 83, 1) > 0.5, torch.zeros(1, 60, 83).bool()])
    rles, bits = rle_encode(masks), pack_masks(masks)
    assert coco.area(rles).tolist() == bits.area().tolist()
    x1, y1, x2, y2 = bits.boxes().T
    assert coco.toBbox(rles).tolist() == torch.stack((x1, y1, x2 - x1, y2 - y1), 1).tolist()
    assert np.abs(coco.iou(rles[:6], rles[:6], [0] * 6) - bits[:6].iou().numpy()).max() < 1e-6


def test_import_needs_no_pycocotools(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['pycocotools'] = None\n"
        "import torch; from sprompt.ops import rle_encode, rle_decode\n"
        "print(rle_decode(rle_encode(torch.ones(1, 2, 3))).area().tolist())"
    )
    # The working directory is another folder, so that the new process imports the same package as this process.
    home = str(Path(sprompt.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": home},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[6]\n"
