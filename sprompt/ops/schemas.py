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
    # linear_assignment: cost (B, N, G), counts (B,) -> int64 (B, G)
    "linear_assignment": "(Tensor cost, Tensor? counts) -> Tensor",
    #
    # resize_masks: soft (..., h, w) -> words (..., n) of height x width; the crop in cells, None: the whole map
    "resize_masks": "(Tensor soft, SymInt height, SymInt width, float threshold, float? crop_height, float? crop_width) -> Tensor",
    # words (..., n') of h x w -> words (..., n) of height x width
    "resize_bits": "(Tensor words, SymInt h, SymInt w, SymInt height, SymInt width) -> Tensor",
    #
    # rle: words (..., n) of L masks -> characters uint8 (S,), offsets int64 (L + 1,); and back to words (L, n)
    "rle_encode": "(Tensor words, SymInt height, SymInt width) -> (Tensor characters, Tensor offsets)",
    "rle_decode": "(Tensor characters, Tensor offsets, SymInt height, SymInt width) -> Tensor",
    #
}
