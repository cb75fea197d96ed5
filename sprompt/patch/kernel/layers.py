"""Layers without state, as transformers' kernel interface wants them: a constructor, attributes or other methods are refused."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sprompt.ops import deform_attn


def attend(
    values: Tensor,
    shapes: Sequence[tuple[int, int]] | Tensor,
    points: Tensor,
    weights: Tensor,
    per_level: Sequence[int] | None = None,
) -> Tensor:
    """`deform_attn` on the dtypes and shapes that transformers gives; the result has the dtype that transformers' has.

    That is the common dtype of the three tensors: under autocast, values may be of a half type, points and weights in float32.
    The values are not converted to it (unless it is float64), so the result is rounded as they are.
    """
    dtype = torch.promote_types(torch.promote_types(values.dtype, points.dtype), weights.dtype)
    if dtype is torch.float64:
        values = values.double()
    if isinstance(shapes, Tensor):
        shapes = shapes.tolist()
    out = deform_attn(values, shapes, _beside(points, values), _beside(weights, values), per_level=per_level)
    return out.to(dtype)


def _beside(x: Tensor, values: Tensor) -> Tensor:
    """Points or weights in a dtype that `deform_attn` takes beside these values."""
    return x if x.dtype in (values.dtype, torch.float32) else x.float()


class MultiScaleDeformableAttention(nn.Module):
    """`deform_attn` in the place of the layer of this name of transformers.

    The sizes of the maps are read from `value_spatial_shapes_list`; the arguments that only another kernel needs are ignored.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return attend(value, value_spatial_shapes_list, sampling_locations, attention_weights)
