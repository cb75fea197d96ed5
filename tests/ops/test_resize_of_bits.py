"""BitMasks.resize: tables, agreement with torch's interpolation, shapes, errors, compilation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import sprompt
from sprompt import BitMasks
from sprompt.ops import pack_masks, resize_masks
from sprompt.testing.spec import blobs


def bits(masks: BitMasks) -> list:
    return masks.to_dense().int().tolist()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 90), st.integers(1, 90), st.integers(1, 130), st.integers(0, 99), st.floats(0, 1)
)
def test_resize_of_bits(h: int, w: int, H: int, W: int, seed: int, density: float) -> None:
    dense = (torch.rand(2, h, w, generator=torch.Generator().manual_seed(seed)) < density).float()
    masks = pack_masks(dense)
    resized = masks.resize((H, W))
    assert resized.size == (H, W)
    assert torch.equal(resized.words, resize_masks(dense, (H, W), threshold=0.5).words)
    with sprompt.use_backend("reference"):
        assert torch.equal(resized.words, masks.resize((H, W)).words)
    pixels = F.interpolate(dense[None], (H, W), mode="bilinear", align_corners=False)[0]
    off = resized.to_dense() != (pixels > 0.5)
    assert not off.any() or (pixels[off] - 0.5).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("h", "w", "H", "W"),
    [
        (20, 33, 80, 133), (3, 2, 5, 7), (1, 1, 3, 100), (6, 40, 12, 320), (64, 600, 20, 100), (9, 1333, 5, 33),
        (8, 2100, 3, 64), (40, 30, 20, 15), (7, 64, 7, 65), (33, 31, 33, 31), (2, 500, 200, 3),
    ],
)  # fmt: skip
def test_resize_of_bits_of_few_kinds(h: int, w: int, H: int, W: int) -> None:
    """Nearly all pixels of a mask are equal, so most words need no interpolation and some need it for one cell. In these sizes
    rows share a word or end within a word, and a word covers fewer, or far more, cells than pixels."""
    g = torch.Generator().manual_seed(h * w)
    dense = torch.cat([blobs(3, h, w, 1) > 0.5, torch.zeros(1, h, w).bool(), torch.ones(1, h, w).bool()])
    for place in torch.randint(h * w, (6,), generator=g).tolist():
        one = torch.zeros(1, h, w, dtype=torch.bool)
        one.view(-1)[place] = True
        dense = torch.cat([dense, one, ~one])
    dense = torch.cat([dense, torch.rand(2, h, w, generator=g) < 0.5])
    resized = pack_masks(dense).resize((H, W))
    with sprompt.use_backend("reference"):
        assert torch.equal(resized.words, pack_masks(dense).resize((H, W)).words)
    if torch.cuda.is_available():
        assert torch.equal(resized.words, pack_masks(dense.cuda()).resize((H, W)).words.cpu())
    pixels = F.interpolate(dense[None].double(), (H, W), mode="bilinear", align_corners=False)[0]
    off = resized.to_dense() != (pixels > 0.5)
    assert not off.any() or (pixels[off] - 0.5).abs().max() < 1e-6
    if H in (h, 2 * h, 4 * h, h // 2) and W in (
        w,
        2 * w,
        4 * w,
        8 * w,
        w // 2,
    ):  # such weights need no rounding, and some pixels tie
        assert not off.any()


def test_resize_of_bits_many_masks_in_a_word_each() -> None:
    """Each mask is one word, so a warp has the words of 32 masks and a block those of 256."""
    dense = torch.rand(700, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    got = pack_masks(dense).resize((5, 6))
    assert got.words.shape == (700, 1)
    with sprompt.use_backend("reference"):
        assert torch.equal(got.words, pack_masks(dense).resize((5, 6)).words)


def test_modes_of_bits_tables() -> None:
    masks = pack_masks(torch.tensor([[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]]))
    # Nearest: pixel x of 4 takes cell floor(1.5 x): 0, 1, 3, 4. Any: it covers floor(1.5 x) to ceil(1.5 (x + 1)): 0-1, 1-2, 3-4,
    # 4-5.
    assert bits(masks.resize((2, 4), "nearest")) == [[1, 0, 0, 0], [0, 0, 1, 1]]
    assert bits(masks.resize((2, 4), "any")) == [[1, 0, 0, 0], [0, 0, 1, 1]]
    assert bits(masks.resize((1, 4), "nearest")) == [[1, 0, 0, 0]]
    assert bits(masks.resize((1, 4), "any")) == [[1, 0, 1, 1]]
    assert bits(masks.resize((3, 2), "any")) == [[1, 0], [1, 1], [0, 1]]
    assert bits(masks.resize((1, 9), "any")) == [[1, 1, 0, 0, 1, 1, 1, 1, 1]]
    # Halves in the middle: the interpolated values of 1, 0 at four pixels are 1, 3/4, 1/4, 0.
    one = pack_masks(torch.tensor([[1, 0]]))
    rows = {0.0: [1, 1, 1, 0], 0.25: [1, 1, 0, 0], 0.5: [1, 1, 0, 0], 0.75: [1, 0, 0, 0], 0.99: [1, 0, 0, 0]}
    for threshold, row in rows.items():
        assert bits(one.resize((1, 4), threshold=threshold)) == [row]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 90),
    st.integers(1, 300),
    st.integers(0, 99),
    st.floats(0, 1),
)
def test_modes_of_bits_agree_with_torch(h: int, w: int, H: int, W: int, seed: int, density: float) -> None:
    dense = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)) < density**3
    masks = pack_masks(dense)
    nearest, some = masks.resize((H, W), "nearest"), masks.resize((H, W), "any")
    assert torch.equal(nearest.to_dense(), F.interpolate(dense[None].float(), (H, W), mode="nearest")[0] > 0)
    assert torch.equal(some.to_dense(), F.adaptive_avg_pool2d(dense[None].double(), (H, W))[0] > 0)
    with sprompt.use_backend("reference"):
        assert torch.equal(nearest.words, masks.resize((H, W), "nearest").words)
        assert torch.equal(some.words, masks.resize((H, W), "any").words)


def test_resize_of_bits_shapes() -> None:
    masks = pack_masks(torch.rand(2, 3, 9, 14) > 0.5)
    assert masks.resize((9, 14)).words.equal(masks.words)
    assert masks.resize((18, 28)).shape == (2, 3) and masks[0, 1].resize((18, 28)).shape == ()
    assert masks[:, :0].resize((4, 4)).words.shape == (2, 0, 1)
    assert masks.resize((0, 4)).words.shape == (2, 3, 0)
    assert torch.equal(masks[1].resize((18, 28)).words, masks.resize((18, 28)).words[1])
    strided = BitMasks(torch.stack((masks.words, masks.words), -1)[..., 0], masks.size)
    assert torch.equal(strided.resize((5, 40)).words, masks.resize((5, 40)).words)


def test_resize_of_bits_refuses() -> None:
    masks = pack_masks(torch.zeros(2, 0, 6))
    with pytest.raises(ValueError, match=r"BitMasks.resize: size must be empty for an empty map of 0x6, got \(4, 4\)"):
        masks.resize((4, 4))
    with pytest.raises(TypeError, match=r"BitMasks.resize: size must be \(H, W\), got 4"):
        masks.resize(4)
    with pytest.raises(ValueError, match=r"BitMasks.resize: size must have at most 2147483647 pixels"):
        pack_masks(torch.zeros(2, 3, 6)).resize((1 << 16, 1 << 15))


def test_resize_of_bits_compiles() -> None:
    masks = pack_masks(torch.rand(3, 9, 14, generator=torch.Generator().manual_seed(0)) > 0.5)
    compiled = torch.compile(lambda m: m.resize((20, 31)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(masks).words, masks.resize((20, 31)).words)
    torch.library.opcheck(torch.ops.sprompt.resize_bits.default, (masks.words, 9, 14, 20, 31, 0.5))
