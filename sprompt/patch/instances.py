"""`post_process_instance_segmentation` of transformers' Mask2Former, from masks of bits."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from sprompt.ops import resize_masks
from sprompt.patch.replaced import original

#: The size at which transformers thresholds every mask and measures its quality.
SIZE = (384, 384)
_NAME = "post_process_instance_segmentation"


def changes() -> list[tuple[Any, str, Any]]:
    """The replaced method of each image processor: (class, name, method)."""
    found: list[tuple[Any, str, Any]] = []
    for backend, ending in (("", ""), ("_pil", "Pil")):
        try:
            module = importlib.import_module(f"transformers.models.mask2former.image_processing{backend}_mask2former")
        except ImportError:  # the first one needs torchvision
            continue
        processor = getattr(module, f"Mask2FormerImageProcessor{ending}")
        encode = module.convert_segmentation_to_rle
        found.append((processor, _NAME, _instances(original(processor, _NAME), encode)))
    return found


def _instances(unpatched: Callable[..., Any], encode: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(unpatched)
    def post_process_instance_segmentation(
        self: Any,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Any = None,
        return_coco_annotation: bool | None = False,
        return_binary_maps: bool | None = False,
    ) -> list[dict[str, Any]]:
        if return_coco_annotation and return_binary_maps:  # an error there
            return unpatched(self, outputs, return_coco_annotation=True, return_binary_maps=True)
        probabilities = outputs.class_queries_logits.detach().softmax(-1)[..., :-1]
        bits, sums, areas = resize_masks(outputs.masks_queries_logits.detach(), SIZE, sums=True)
        quality = sums / (areas + 1e-6)
        results = []
        for image, classes in enumerate(probabilities):
            # This order decides which of two instances covers the other, so it has to be that of the same call.
            best, place = classes.flatten().topk(len(classes), sorted=False)
            queries, labels = place // classes.shape[1], (place % classes.shape[1]).tolist()
            scores = (best * quality[image, queries]).tolist()
            chosen = [k for k, score in enumerate(scores) if score >= threshold]
            masks = bits[image, queries[chosen]]
            if target_sizes is not None:
                height, width = target_sizes[image]
                masks = masks.resize((int(height), int(width)), mode="nearest")
            visible = (masks.area() > 0).nonzero()[:, 0]
            masks, chosen = masks[visible], [chosen[k] for k in visible.tolist()]
            segments = [
                {"id": number, "label_id": labels[k], "was_fused": False, "score": round(scores[k], 6)}
                for number, k in enumerate(chosen)
            ]
            segmentation: Any
            if return_binary_maps and chosen:
                segmentation = masks.to_dense(torch.float32)
            else:
                segmentation, masks = torch.full(masks.size, -1.0), masks.to("cpu")
                for number in range(len(chosen)):
                    segmentation.masked_fill_(masks[number].to_dense(), number)
            if return_coco_annotation:
                segmentation = encode(segmentation)
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results

    return post_process_instance_segmentation
