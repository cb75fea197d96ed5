"""The core of multi-scale deformable attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sprompt.ops import checks
from sprompt.ops.deform_attn import op


def deform_attn(
    values: Tensor,
    shapes: Sequence[tuple[int, int]],
    points: Tensor,
    weights: Tensor,
    *,
    per_level: Sequence[int] | None = None,
) -> Tensor:
    """Weighted sum of bilinear samples of a pyramid: the core of multi-scale deformable attention.

    out[b, q, h] = Σ_{v, t} weights[b, q, h, v, t] · map_v[b, h](x · w_v − ½, y · h_v − ½), where (x, y) = points[b, q, h, v, t].
    map_v is bilinear between the centres of its cells, and 0 outside: a corner outside of the map adds nothing. A point with
    a coordinate that does not lie between −1 and the size of the map, both excluded, samples nothing.

    Args:
        values: (B, S, H, D) float, any strides. S = Σ h·w. The levels stand one after the other, each row by row.
        shapes: (h, w) of every level.
        points: (B, Q, H, V, T, 2) in the dtype of values or in float32: x, y, from 0 to 1 over the map of the level. They
            may lie outside. NaN and infinity sample nothing.
        weights: (B, Q, H, V, T) in the dtype of values or in float32. They are used as given, without a softmax.
        per_level: The number of points of each level, (T₁, …), if the levels have different numbers. The shapes are then
            (B, Q, H, ΣT, 2) for points and (B, Q, H, ΣT) for weights, the levels one after the other.

    Returns: (B, Q, H·D) in the dtype of values. Sums are in float32. B, Q, H, D, V, T and sizes of maps may be 0; a sum over
    no points is 0.
    Gradients to values, points and weights, in their dtypes. At the centre of a cell, the gradient to a coordinate is the one
    towards larger coordinates. A point that samples nothing has gradients of 0, and so has its weight. Infinity in an incoming
    gradient counts as NaN, and every gradient that it reaches is NaN. Deterministic. Autocast changes
    nothing.

    >>> values = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]).reshape(1, 5, 1, 1)
    >>> points = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).reshape(1, 1, 1, 2, 1, 2)
    >>> deform_attn(values, [(2, 2), (1, 1)], points, torch.ones(1, 1, 1, 2, 1)).tolist()
    [[[12.5]]]
    """
    checks.tensor("deform_attn", "values", values, checks.FLOATS)
    checks.shape("deform_attn", "values", values, "(B, S, H, D)", (None,) * 4, "split the channels into heads")
    cells = _cells(shapes)
    if values.shape[1] != cells:
        rule = f"have as many cells as shapes, {cells}"
        checks.bad_value("deform_attn", "values", rule, values.shape[1], "join the levels along dimension 1")
    either = (values.dtype,) if values.dtype is torch.float32 else (values.dtype, torch.float32)
    checks.tensor("deform_attn", "points", points, either, "convert them")
    checks.tensor("deform_attn", "weights", weights, either, "convert them")
    B, _, H, _ = values.shape
    advice = "give one point per query, head, level and place"
    if per_level is None:
        V = len(shapes)
        checks.shape("deform_attn", "points", points, "(B, Q, H, V, T, 2)", (B, None, H, V, None, 2), advice)
        Q, T = points.shape[1], points.shape[4]
        checks.shape("deform_attn", "weights", weights, "(B, Q, H, V, T)", (B, Q, H, V, T), "give one weight per point")
        levels = [n for h, w in shapes for n in (h, w, T)]
    else:
        total = _total(per_level, len(shapes))
        checks.shape("deform_attn", "points", points, "(B, Q, H, ΣT, 2)", (B, None, H, total, 2), advice)
        Q = points.shape[1]
        checks.shape("deform_attn", "weights", weights, "(B, Q, H, ΣT)", (B, Q, H, total), "give one weight per point")
        levels = [n for (h, w), T in zip(shapes, per_level, strict=True) for n in (h, w, T)]
    checks.same_device("deform_attn", values=values, points=points, weights=weights)
    return op.deform_attn(values, points, weights, levels)


def _cells(shapes: Any) -> int:
    """Cells of all levels, after a check of the shapes."""
    if not isinstance(shapes, (list, tuple)):
        advice = "a tensor would have to be read: keep the sizes as whole numbers"
        checks.bad_type("deform_attn", "shapes", "be a list of (h, w)", type(shapes).__name__, advice)
    cells = 0
    for shape in shapes:
        if not isinstance(shape, (list, tuple)) or len(shape) != 2:
            checks.bad_value("deform_attn", "shapes", "be a list of (h, w)", shapes, "give one pair per level")
        h, w = shape
        checks.whole("deform_attn", "shapes", h, "hold whole numbers of at least 0")
        checks.whole("deform_attn", "shapes", w, "hold whole numbers of at least 0")
        cells += h * w
    return cells


def _total(per_level: Any, levels: int) -> int:
    """Points of all levels, after a check of their numbers."""
    if not isinstance(per_level, (list, tuple)):
        checks.bad_type("deform_attn", "per_level", "be a list of numbers of points", type(per_level).__name__)
    if len(per_level) != levels:
        checks.bad_value("deform_attn", "per_level", f"have one number per level, {levels}", len(per_level))
    for number in per_level:
        checks.whole("deform_attn", "per_level", number, "hold whole numbers of at least 0")
    return sum(per_level)
