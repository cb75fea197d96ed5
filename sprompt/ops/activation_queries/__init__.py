"""Queries at the cells of a map that are most likely objects (FastInst's instance-activation-guided queries)."""

from torch import Tensor

from sprompt.ops import checks
from sprompt.ops.activation_queries import op

#: Cells are counted in 32 bits.
LIMIT = 2**30


def activation_queries(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` cells of each map that become queries, local maxima of their class first.

    For cell i of an image: kᵢ is the foreground class of the largest logit, and aᵢ = softmax(logits)[kᵢ, i] over all K + 1
    channels. Cell i is a local maximum if aᵢ ≥ 1e-6 and no neighbour j (of 8) with kⱼ = kᵢ has aⱼ > aᵢ. Local maxima come
    first, then all other cells, both by decreasing a. Equal a go to the lowest cell.

    Args:
        logits: (B, K + 1, h, w) float32, bfloat16 or float16 (float64: on the reference), any strides. The last channel is "no
            object"; K is at least 1.
        count: between 0 and h · w.

    Returns: (index, scores, labels), each (B, count). index int64: the cell y · w + x. scores: a, in the dtype of the logits.
    labels int64: k. B, h or w of 0 are allowed.
    The class is that of the largest logit as given; equal logits go to the lowest class. The scores are computed in float32:
    the largest logit is subtracted, classes that lie more than 80 below it count as 0, and sums are by increasing channel. Every
    backend computes the same bits, so all give the same order. Half-precision scores are rounded after the order is known.
    A cell whose softmax is NaN (a NaN or +inf logit, or only -inf) has the score NaN, is no maximum, outdoes no neighbour, and
    comes after all other cells. Its class is that of the largest logit that is not NaN, or 0.
    No gradient: the results are detached. Deterministic. Autocast changes nothing.

    >>> logits = torch.tensor([[[[4.0, 3.0, 0.0, 1.0]], [[0.0, 0.0, 2.0, 0.0]], [[0.0, 0.0, 0.0, 0.0]]]])
    >>> index, scores, labels = activation_queries(logits, 3)
    >>> index.tolist(), labels.tolist()  # cell 1 has a larger neighbour of its class
    ([[0, 2, 3]], [[0, 1, 0]])
    >>> scores.mul(100).round().tolist()
    [[96.0, 79.0, 58.0]]
    """
    name = "activation_queries"
    checks.tensor(name, "logits", logits, checks.FLOATS)
    checks.shape(name, "logits", logits, "(B, K + 1, h, w)", (None,) * 4, "one image: index it with [None]")
    channels, cells = logits.shape[1], logits.shape[2] * logits.shape[3]
    if channels < 2:
        checks.bad_value(name, "logits", "have at least 2 channels", channels, 'the last channel is "no object"')
    if cells >= LIMIT:
        checks.bad_value(name, "logits", f"have fewer than {LIMIT} cells a map", cells, "split the maps into parts")
    checks.whole(name, "count", count, "be a whole number of at least 0")
    if count > cells:
        checks.bad_value(name, "count", f"be at most h · w = {cells}", count, "ask for fewer queries")
    return op.activation_queries(logits, count)
