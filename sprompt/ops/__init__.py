"""The kernel library: one folder per op (sprompt/ops/<op>/). This module exports all of them."""

# activation_queries
from sprompt.ops.activation_queries import activation_queries

# box_masks
from sprompt.ops.box_masks import crop_masks, paste_masks

# deform_attn
from sprompt.ops.deform_attn import deform_attn

# linear_assignment
from sprompt.ops.linear_assignment import linear_assignment

# mask_attention
from sprompt.ops.mask_attention import mask_attention

# mask_conv
from sprompt.ops.mask_conv import mask_bits, mask_conv, mask_pool, mask_update

# mask_loss
from sprompt.ops.mask_loss import mask_loss

# masks
from sprompt.ops.masks import mask_area, mask_boxes, mask_iou, pack_masks

# mask_nms
from sprompt.ops.mask_nms import batched_mask_nms, mask_nms, matrix_nms

# match_cost
from sprompt.ops.match_cost import match_cost

# match_detections
from sprompt.ops.match_detections import match_detections

# mean_field
from sprompt.ops.mean_field import mean_field

# points
from sprompt.ops.points import point_cost, point_loss, sample_points

# projection_loss
from sprompt.ops.projection_loss import projection_loss

# prompt_match
from sprompt.ops.prompt_match import PromptMatch, prompt_match

# region_mean
from sprompt.ops.region_mean import mask_mean, region_mean

# resize_masks
from sprompt.ops.resize_masks import resize_masks

# rle
from sprompt.ops.rle import rle_decode, rle_encode

# roi_align
from sprompt.ops.roi_align import roi_align

# saliency_masks
from sprompt.ops.saliency_masks import SaliencyMasks, saliency_maps, saliency_masks

__all__ = [
    # activation_queries
    "activation_queries",
    #
    # box_masks
    "crop_masks",
    "paste_masks",
    #
    # deform_attn
    "deform_attn",
    #
    # linear_assignment
    "linear_assignment",
    #
    # mask_attention
    "mask_attention",
    #
    # mask_conv
    "mask_bits",
    "mask_conv",
    "mask_pool",
    "mask_update",
    #
    # mask_loss
    "mask_loss",
    #
    # masks
    "mask_area",
    "mask_boxes",
    "mask_iou",
    "pack_masks",
    #
    # mask_nms
    "batched_mask_nms",
    "mask_nms",
    "matrix_nms",
    #
    # match_cost
    "match_cost",
    #
    # match_detections
    "match_detections",
    #
    # mean_field
    "mean_field",
    #
    # points
    "point_cost",
    "point_loss",
    "sample_points",
    #
    # projection_loss
    "projection_loss",
    #
    # prompt_match
    "PromptMatch",
    "prompt_match",
    #
    # region_mean
    "mask_mean",
    "region_mean",
    #
    # resize_masks
    "resize_masks",
    #
    # rle
    "rle_decode",
    "rle_encode",
    #
    # roi_align
    "roi_align",
    #
    # saliency_masks
    "SaliencyMasks",
    "saliency_maps",
    "saliency_masks",
    #
]
