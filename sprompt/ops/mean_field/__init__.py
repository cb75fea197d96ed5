"""Mean-field refinement of soft masks inside their boxes, by the colours of the picture (Mask Auto-Labeler's CRF)."""

from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.mean_field import op

#: Pixels of a map, with its border, are counted in 32 bits.
LIMIT = 2**28
#: Bounds of `low` and 1 − `high`, and of `scale`, within which float32 holds every number.
LEAST = 1e-6


def mean_field(
    images: Tensor,
    start: Tensor,
    boxes: Tensor,
    *,
    iterations: int = 100,
    scale: float = 0.1,
    low: float = 0.1,
    high: float = 0.9,
) -> BitMasks:
    """The foreground of each crop after mean-field iterations between neighbouring pixels.

    With the weights wᵢⱼ = exp(−‖Iᵢ − Iⱼ‖² / (2 scale²)) of the 8 neighbours j of pixel i, wᵢᵢ = 1, q = start and t = boxes:
    at first xᵢ = clamp(qᵢ tᵢ, low, high), then for all pixels together, `iterations` times,
    Fᵢ = tᵢ Πⱼ xⱼ^wᵢⱼ,   Gᵢ = Πⱼ (1 − xⱼ)^wᵢⱼ,   xᵢ ← clamp(Fᵢ / (Fᵢ + Gᵢ + 1e-6), low, high).
    Pixel i is foreground if xᵢ > ½ at the end. Neighbours outside the map contribute nothing.

    Args:
        images: (B, 3, h, w) float32, bfloat16 or float16 (float64: on the reference), any strides: colours.
        start: (B, h, w) float: probabilities of the foreground.
        boxes: (B, h, w) float in [0, 1]: the masks of the boxes. Where t is not above 0 (and where it is NaN or subnormal), the
            pixel is background.
        iterations: whole number, at least 0.
        scale: of the colours, between 1e-6 and 1e6.
        low: between 1e-6 and ½. high: between ½ and 1 − 1e-6.

    Returns: BitMasks (B,) of h × w pixels. B, h or w of 0 are allowed.
    The state is the log-odds z = log(x / (1 − x)) in float32, in which an iteration is
    z ← clamp(log t + A z − log(1 + 1e-6 e^{A p})) with p = −log(1 − x) = log(1 + e^z) and A the sum with the weights.
    Every backend, instruction set and number of threads computes the same bits, and flipped or transposed inputs give the
    flipped or transposed bits. Against the products in float64, labels differ where the state is within rounding of ½:
    in pictures of noise, at most 1 of 16384.
    Iterations end early only if one changed nothing at all. A part of a row is computed only if a pixel in it or next to it
    changed in the last iteration, so settled regions cost nothing. One crop runs on one thread, or on one block of a GPU.
    A pixel with a NaN or an infinite colour has weights of 0 with its neighbours. A start that is NaN counts as `low`.
    No gradient: the result is detached. Deterministic. Autocast changes nothing.

    >>> column = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(1, 3, 3, 4)  # the last column has another colour
    >>> start = torch.tensor([0.9, 0.9, 0.3, 0.3]).expand(1, 3, 4)
    >>> mean_field(column, start, torch.ones(1, 3, 4)).to_dense().int()[0].tolist()
    [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    """
    name = "mean_field"
    checks.tensor(name, "images", images, checks.FLOATS)
    checks.shape(name, "images", images, "(B, 3, h, w)", (None, 3, None, None), "one crop: index it with [None]")
    B, _, h, w = images.shape
    for argument, value in (("start", start), ("boxes", boxes)):
        checks.tensor(name, argument, value, checks.FLOATS)
        checks.shape(name, argument, value, "(B, h, w)", (B, h, w), "resize it to the images")
    if h * w >= LIMIT:
        checks.bad_value(name, "images", f"have fewer than {LIMIT} pixels", h * w, "resize the crops")
    checks.whole(name, "iterations", iterations, "be a whole number of at least 0")
    checks.number(name, "scale", scale, f"be a number between {LEAST} and {1 / LEAST:.0f}", LEAST, 1 / LEAST)
    checks.number(name, "low", low, f"be a number between {LEAST} and 0.5", LEAST, 0.5)
    checks.number(name, "high", high, f"be a number between 0.5 and {1 - LEAST}", 0.5, 1 - LEAST)
    checks.same_device(name, images=images, start=start, boxes=boxes)
    return BitMasks(op.mean_field(images, start, boxes, iterations, float(scale), float(low), float(high)), (h, w))
