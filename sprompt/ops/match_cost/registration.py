"""Fake kernel and backends of match_cost."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.ops import checks
from sprompt.ops.library import register_op
from sprompt.ops.match_cost import reference
from sprompt.ops.targets import loss_dtype, unit_stride

_BLOCK = 4  # masks of a register tile (csrc/match_cost/match_cost_cpu.cpp)
#: Floats of the probabilities and of the targets that a tile of rows may take: half of a first and of a second cache.
_TILE_P, _TILE_T = 1400, 65536
#: Chunks of rows, each one piece of parallel work with its own sums: at most this many, of at least 8 rows.
_CHUNKS = 32


def _labels_within(labels: Tensor | None, class_logits: Tensor | None, counts: Tensor | None) -> None:
    """Labels of real targets lie in [0, K). Reads the values: on a CPU only."""
    if labels is None or class_logits is None or labels.device.type != "cpu" or labels.numel() == 0:
        return
    classes = class_logits.shape[2]
    low, high = labels.aminmax()
    if int(low) >= 0 and int(high) < classes:
        return
    outside = (labels < 0) | (labels >= classes)
    if counts is not None:
        outside &= torch.arange(labels.shape[1]) < counts[:, None]
    if bool(outside.any()):
        checks.bad_value(
            "match_cost",
            "labels",
            f"lie between 0 and {classes - 1}",
            int(labels[outside][0]),
            "class_logits has one column a class",
        )


def _values(targets: Tensor, class_logits: Tensor | None, labels: Tensor | None, counts: Tensor | None) -> None:
    checks.counts_within("match_cost", counts, targets.shape[1])
    _labels_within(labels, class_logits, counts)


def _match_cost(
    mask_logits: Tensor,
    targets: Tensor,
    ratio: int,
    class_logits: Tensor | None,
    labels: Tensor | None,
    counts: Tensor | None,
    class_weight: float,
    bce_weight: float,
    dice_weight: float,
    upsample: int,
) -> Tensor:
    _values(targets, class_logits, labels, counts)
    B, N, h, w = mask_logits.shape
    G, height, width = targets.shape[1], h * upsample, w * upsample
    line = -(-width // 64) * 64
    chunk_rows = max(8, -(-height // _CHUNKS))
    tile_rows = max(1, min(chunk_rows, _TILE_P // max(line, 1), _TILE_T // max(G * line, 1)))
    room = (_BLOCK + G) * tile_rows * line + 2 * (line + 2 * upsample + 64) + G * (1 + 2 * tile_rows)
    cost, scratch, partial = (
        mask_logits.new_empty(shape, dtype=torch.float32)
        for shape in ((B, N, G), (native.threads(), room), (B, -(-height // chunk_rows), N * G + 2 * N + 2 * G))
    )
    if cost.numel() == 0:
        return cost
    native._C.match_cost(
        unit_stride(mask_logits), unit_stride(targets), ratio, class_logits, labels, counts, class_weight, bce_weight,
        dice_weight, upsample, chunk_rows, tile_rows, scratch, partial, cost, native.threads(),
    )  # fmt: skip
    return cost


def _match_cost_reference(
    mask_logits: Tensor,
    targets: Tensor,
    ratio: int,
    class_logits: Tensor | None,
    labels: Tensor | None,
    counts: Tensor | None,
    class_weight: float,
    bce_weight: float,
    dice_weight: float,
    upsample: int,
) -> Tensor:
    _values(targets, class_logits, labels, counts)
    return reference.match_cost(
        mask_logits, targets, ratio, class_logits, labels, counts, class_weight, bce_weight, dice_weight, upsample
    )


def _match_cost_fake(
    mask_logits: Tensor,
    targets: Tensor,
    ratio: int,
    class_logits: Tensor | None,
    labels: Tensor | None,
    counts: Tensor | None,
    class_weight: float,
    bce_weight: float,
    dice_weight: float,
    upsample: int,
) -> Tensor:
    B, N = mask_logits.shape[:2]
    return mask_logits.new_empty((B, N, targets.shape[1]), dtype=loss_dtype(mask_logits, class_logits))


register_op(
    "match_cost", fake=_match_cost_fake, reference=_match_cost_reference, native_kernel=_match_cost, gpu="triton"
)
