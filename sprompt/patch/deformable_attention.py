"""Multi-scale deformable attention of transformers' models on `sprompt.ops.deform_attn`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from sprompt.patch import replaced
from sprompt.patch.kernel.layers import MultiScaleDeformableAttention, attend

#: Modules of transformers.models that are not in the oldest supported version, and the first version that has them.
SINCE = {"pp_doclayout_v4": (5, 20)}

#: They have a layer `MultiScaleDeformableAttention`.
WITH_LAYER = (
    "deformable_detr", "grounding_dino", "lw_detr", "mm_grounding_dino", "omdet_turbo", "pp_doclayout_v2", "pp_doclayout_v3",
    "pp_doclayout_v4", "rf_detr", "rt_detr",
)  # fmt: skip

#: They have a function `multi_scale_deformable_attention`.
WITH_FUNCTION = ("mask2former", "oneformer")

#: They have a function `multi_scale_deformable_attention_v2`: levels may have different numbers of points.
WITH_FUNCTION_V2 = ("rt_detr_v2",)

#: Their attention keeps that function in an attribute of each instance: module and class.
WITH_ATTRIBUTE_V2 = {"d_fine": "DFineMultiscaleDeformableAttention", "deimv2": "Deimv2MultiscaleDeformableAttention"}

FUNCTION, FUNCTION_V2 = "multi_scale_deformable_attention", "multi_scale_deformable_attention_v2"
ATTRIBUTE_V2 = "ms_deformable_attn_core"


def deformable_attention() -> None:
    """Every model of transformers with a multi-scale deformable attention runs it by `sprompt.ops.deform_attn` from now on.

    That holds for models that are built already too, in inference and in training. The modules of all these models are
    imported. `sprompt.patch.undo()` puts the original code back. docs/patch.md lists models, versions and exceptions.

    Raises ImportError, and replaces nothing, if transformers is missing or of an unknown version.

    >>> sprompt.patch.deformable_attention()  # doctest: +SKIP
    """
    version = replaced.version(replaced.transformers("sprompt.patch.deformable_attention"))

    def modules(names: Iterable[str]) -> list[ModuleType]:
        there = [name for name in names if SINCE.get(name, version) <= version]
        return [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in there]

    changes: list[tuple[Any, str, Any]] = []
    for module in modules(WITH_LAYER):
        changes.append((module.MultiScaleDeformableAttention, "forward", MultiScaleDeformableAttention.forward))
    for module in modules(WITH_FUNCTION):
        changes.append((module, FUNCTION, multi_scale_deformable_attention))
    for module in modules(WITH_FUNCTION_V2):
        changes.append((module, FUNCTION_V2, _v2(replaced.original(module, FUNCTION_V2))))
    for module, name in zip(modules(WITH_ATTRIBUTE_V2), WITH_ATTRIBUTE_V2.values(), strict=True):
        changes.append((getattr(module, name), ATTRIBUTE_V2, _attribute_v2(getattr(module, FUNCTION_V2))))
    replaced.replace(changes)


def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    return attend(value, value_spatial_shapes, sampling_locations, attention_weights)


@functools.cache  # one function for one original, so that a second replacement changes nothing
def _v2(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function for levels with different numbers of points. The discrete method stays with the original."""

    def multi_scale_deformable_attention_v2(
        value: Tensor,
        value_spatial_shapes: Sequence[tuple[int, int]] | Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        num_points_list: Sequence[int],
        method: str = "default",
    ) -> Tensor:
        if method != "default":
            return original(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method)
        return attend(value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list)

    return multi_scale_deformable_attention_v2


@functools.cache
def _attribute_v2(original: Callable[..., Tensor]) -> property:
    """An attribute that stands before the one of every instance and serves it where that is the original function.

    Instances go on keeping the original: they need no change when they were built before, or when this is undone.
    """
    served = _v2(original)

    def get(attention: Any) -> Callable[..., Tensor]:
        core = attention.__dict__[ATTRIBUTE_V2]
        return served if core is original else core

    def keep(attention: Any, core: Callable[..., Tensor]) -> None:
        attention.__dict__[ATTRIBUTE_V2] = core

    return property(get, keep)
