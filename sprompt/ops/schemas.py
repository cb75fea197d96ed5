"""Every op's schema, on one page. The public functions of sprompt.ops check their arguments and call these.

Masks are words, int32 (..., n) with n = ceil(H * W / 32), followed by the sizes where an op needs them. B images, N masks
or kernels, L prompts, G targets, C channels, P = H * W. counts (B,) int64 says how many entries of a padded row are real.
Schemas have no defaults: the public function fills every argument in.
"""

SCHEMAS = {
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
