"""transformers' Mask2Former on the kernels of this library."""

from __future__ import annotations

import importlib

from sprompt.patch import instances, masked_decoder, point_losses
from sprompt.patch.deformable_attention import FUNCTION, multi_scale_deformable_attention
from sprompt.patch.replaced import replace, transformers, version

#: {module of transformers.models: prefix of its classes}: models with Mask2Former's matcher and loss.
LOSSES = {
    "mask2former": "Mask2Former", "eomt": "Eomt", "eomt_dinov3": "EomtDinov3", "videomt": "Videomt", "oneformer": "OneFormer"
}  # fmt: skip


def mask2former(*, same_draws: bool = False) -> None:
    """Puts kernels of this library into transformers' Mask2Former (5.18 to 5.24), for models that exist and models to come.

    >>> import sprompt
    >>> sprompt.patch.mask2former()
    >>> sprompt.patch.undo()

    What is replaced, and by what:
        Deformable attention of the pixel decoder: `deform_attn`.
        The decoder: `mask_bits` of mask features that are resized once for each level, and `mask_attention`. Mask logits of all
            heads are still made (`mask_conv`), because they are outputs.
        Matcher and mask losses: the target masks are packed once; `point_cost`, `linear_assignment`, `point_loss`. The copies in
            EoMT, EoMT-DINOv3, VidEoMT and OneFormer are replaced too.
        `post_process_instance_segmentation` of Mask2Former's image processors: `resize_masks` and `BitMasks.resize`.
    RF-DETR's loss and matcher, OneFormer's decoder, and the post-processing of all other models stay as they are.

    Parameters, names and outputs are those of transformers. Layers, the mask embedder, the criterion and its matcher are called as
    modules, so their hooks fire: the matcher's for the last head and then for the others. A layer gets its attention mask as a
    BitMasks. `torch.compile(model, fullgraph=True)` works as before; the criterion is never part of a graph.

    Args:
        same_draws: True draws the random points with torch.rand, in transformers' order: with the same seed, outputs, losses and
            gradients are those of the model without the patch, up to rounding. False draws them with Philox, inside the kernels,
            from a seed that torch's generator gives: the same distribution, faster, and with less memory.

    Where transformers' own code runs as before:
        The decoder: if attentions are asked for; if dropout > 0 in training; if a mask predictor, layer or cross-attention is of
            another class, or a predictor or cross-attention has hooks.
        Matcher and mask losses: for target masks with values beside 0 and 1 (such as an ignore index), and for a subclass of a loss
            that samples points in its own way.

    What may differ:
        Rounding. A pixel is attended where its logit is ≥ 0. transformers compares σ ≥ ½ after rounding σ, so it also attends
            logits between −2e-7 and 0 (float32), or −0.004 and 0 (bfloat16).
        Costs and mask losses are computed in float32 or wider, under autocast and in half-precision models too.
        Where the best matching is not unique, another of the best.
        Double backward raises an error.

    Raises ImportError without transformers of a known version; then nothing is replaced.
    """
    installed = version(transformers("sprompt.patch.mask2former"))
    modules = {name: importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in LOSSES}
    modeling = modules["mask2former"]
    changes = [
        (modeling, FUNCTION, multi_scale_deformable_attention),
        # Up to 5.22 the decoder draws a number for every layer, with and without dropout.
        *masked_decoder.changes(modeling, idle_draws=same_draws and installed < (5, 23)),
        *instances.changes(),
    ]
    for name, prefix in LOSSES.items():
        matcher, loss = (getattr(modules[name], f"{prefix}{part}") for part in ("HungarianMatcher", "Loss"))
        changes += point_losses.changes(matcher, loss, same_draws)
    replace(changes)
