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
    # a (..., N, n), b (..., M, n) -> float32 (..., N, M)
    "mask_iou": "(Tensor a, Tensor b) -> Tensor",
    # words (..., n) of height x width -> words of the window [top, left] + out sizes, zeros outside, columns mirrored if flip
    "window_masks": "(Tensor words, SymInt height, SymInt width, SymInt top, SymInt left, SymInt out_height, SymInt out_width,"
    " bool flip) -> Tensor",
    #
    # mask_nms
    #
    # saliency_masks
    #
    # prompts
    #
    # mask_conv
    #
    # match_cost
    #
    # linear_assignment
    #
    # mask_loss
    #
    # resize_masks
    #
    # rle: words (..., n) of L masks -> characters uint8 (S,), offsets int64 (L + 1,); and back to words (L, n)
    "rle_encode": "(Tensor words, SymInt height, SymInt width) -> (Tensor characters, Tensor offsets)",
    "rle_decode": "(Tensor characters, Tensor offsets, SymInt height, SymInt width) -> Tensor",
    #
}
