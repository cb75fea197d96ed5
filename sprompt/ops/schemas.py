"""Every op's schema, on one page. The public functions of sprompt.ops check their arguments and call these.

Masks are words, int32 (..., n) with n = ceil(H * W / 32), followed by the sizes where an op needs them. B images, N masks
or kernels, L prompts, G targets, C channels, P = H * W. counts (B,) int64 says how many entries of a padded row are real.
Schemas have no defaults: the public function fills every argument in.
"""

SCHEMAS = {
    # masks: masks (..., H, W) -> words (..., n); words (..., n) -> bool (..., P); int64 (...); int64 (..., 4)
    "pack_masks": "(Tensor masks, float threshold) -> Tensor",
    "unpack_masks": "(Tensor words, SymInt pixels) -> Tensor",
    "mask_area": "(Tensor words) -> Tensor",
    "mask_boxes": "(Tensor words, SymInt height, SymInt width) -> Tensor",
    # a (..., N, n), b (..., M, n) or None (b is a), rows of `width` pixels -> float32 (..., N, M)
    "mask_iou": "(Tensor a, Tensor? b, SymInt width) -> Tensor",
    # words (..., n) of height x width -> words of the window [top, left] + out sizes, zeros outside, columns mirrored if flip
    "window_masks": "(Tensor words, SymInt height, SymInt width, SymInt top, SymInt left, SymInt out_height, SymInt out_width,"
    " bool flip) -> Tensor",
    #
    # mask_nms
    # words (N, n), scores (N,) -> kept indices int64 (K,)
    "mask_nms": "(Tensor words, Tensor scores, float iou_threshold) -> Tensor",
    # words (B, N, n), scores (B, N), counts (B,) -> keep int64 (B, max_output), counts int64 (B,)
    "batched_mask_nms": "(Tensor words, Tensor scores, float iou_threshold, Tensor? counts, SymInt max_output)"
    " -> (Tensor keep, Tensor counts)",
    # words (N, n) or (B, N, n), scores and labels (N,) or (B, N), counts (B,) -> decayed scores, of the shape of scores
    "matrix_nms": "(Tensor words, Tensor scores, str kernel, float sigma, Tensor? labels, Tensor? counts) -> Tensor",
    #
    # saliency_masks: features (B, D, H, W), valid bool (B, H, W) -> words (B, M, n), areas int64 (B, M), scores float32 (B, M)
    # of all M seeds; those of the pyramid if grid_height is 0. addresses (B, K, 3) -> maps (B, K, H, W). seeds (B, M, D).
    "saliency_bits": "(Tensor features, Tensor? valid, SymInt grid_height, SymInt grid_width, bool cosine, float threshold,"
    " SymInt min_area) -> (Tensor, Tensor, Tensor)",
    "saliency_soft": "(Tensor features, Tensor? valid, SymInt grid_height, SymInt grid_width, bool cosine, Tensor addresses)"
    " -> Tensor",
    "saliency_maps": "(Tensor features, Tensor seeds, Tensor? valid, bool cosine) -> Tensor",
    #
    # mask_conv: features (B, C, H, W), kernels (B, N, C) -> logits (B, N, H, W)
    "mask_conv": "(Tensor features, Tensor kernels) -> Tensor",
    # -> gradients of features and kernels, empty where not asked for
    "mask_conv_backward": "(Tensor features, Tensor kernels, Tensor grad, bool to_features, bool to_kernels) -> (Tensor, Tensor)",
    # features (B, C, H, W), words (B, N, n) -> (B, N, C); grad (B, N, C), words -> (B, C, H, W)
    "mask_pool": "(Tensor features, Tensor words) -> Tensor",
    "mask_pool_backward": "(Tensor grad, Tensor words, SymInt height, SymInt width) -> Tensor",
    # -> logits (B, N, H, W), pooled (B, N, C), words (B, N, n) of logits > 0
    "mask_update": "(Tensor features, Tensor kernels) -> (Tensor, Tensor, Tensor)",
    "mask_update_backward": "(Tensor features, Tensor kernels, Tensor words, Tensor? grad_logits, Tensor? grad_pooled,"
    " bool to_features, bool to_kernels) -> (Tensor, Tensor)",
    #
    # match_cost: mask_logits (B, N, h, w), targets (B, G, h*upsample, w*upsample) and ratio 0, or words (B, G, n) of masks
    # `ratio` times that size, class_logits (B, N, K), labels (B, G) -> float32 (B, N, G)
    "match_cost": "(Tensor mask_logits, Tensor targets, int ratio, Tensor? class_logits, Tensor? labels, Tensor? counts,"
    " float class_weight, float bce_weight, float dice_weight, SymInt upsample) -> Tensor",
    #
    # mask_loss: logits (M, h, w), targets (M, h*upsample, w*upsample) and ratio 0, or words (M, n) of masks `ratio` times that
    # size -> bce (M,), dice (M,), sums (M, 3) for the gradient, all float32
    "mask_loss": "(Tensor logits, Tensor targets, int ratio, SymInt upsample) -> (Tensor bce, Tensor dice, Tensor sums)",
    "mask_loss_backward": "(Tensor grad_bce, Tensor grad_dice, Tensor logits, Tensor targets, Tensor sums, int ratio,"
    " SymInt upsample) -> Tensor",
    #
}
