"""Attention of queries to the pixels of their masks."""

import sys

from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import checks
from sprompt.ops.mask_attention import op
from sprompt.ops.masks import as_bits


def mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: BitMasks | Tensor | None,
    *,
    scale: float | None = None,
    empty: str = "all",
) -> Tensor:
    """Masked attention: every query attends to the pixels of its own mask.

    out[b, h, n] = Σ_{s in masks[b, n]} p_s · value[b, h, s],  p = softmax of scale · ⟨query[b, h, n], key[b, h, s]⟩ over these s

    Args:
        query: (B, H, N, D) float, any strides: (B, N, H, D) with transposed heads is not copied.
        key, value: (B, H, S, D) float, any strides.
        masks: BitMasks (B, N) of S pixels, or (1, N) for all images, or such masks as a dense tensor (..., h, w), packed by
            `pack_masks`. A mask serves all heads. None: every query attends everywhere.
        scale: the factor of the products; None means D^-½.
        empty: the result for a query without a set bit. "all": it attends everywhere, as in Mask2Former and FastInst. "zero":
            it gives 0.

    Returns: (B, H, N, D), of the widest dtype of query, key and value. Products and sums are in float32; the result is rounded
    once. B, H, N or D of 0 are allowed. S = 0 gives zeros. No (B, H, N, S) tensor is made, forward or backward: of every row only
    the logarithm of the softmax's sum is kept. Where few bits are set, the cost on a CPU follows their number.
    Scores, keys and values should be finite. A NaN, or a score of +infinity, makes the rows that attend it NaN. NaN and infinity
    may also reach other rows of the same head, and their gradients.
    Gradient to query, key and value, none to masks. Keys that no query attends get 0. Deterministic: the same bits on every run
    and for every number of threads. Autocast casts query, key and value to its dtype, as for torch.matmul.

    >>> query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    >>> value = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 1, 3, 1).expand(1, 1, 3, 4)
    >>> masks = torch.tensor([[[[1, 1, 0]], [[0, 0, 0]]]])
    >>> mask_attention(query, key, value, masks)[0, 0, :, 0]
    tensor([1.5000, 3.0000])
    >>> mask_attention(query, key, value, masks, empty="zero")[0, 0, :, 0]
    tensor([1.5000, 0.0000])
    """
    name = "mask_attention"
    for arg, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, arg, tensor, checks.FLOATS)
    checks.shape(
        name, "query", query, "(B, H, N, D)", (None,) * 4, "split the channels into heads; one head is [:, None]"
    )
    batch, heads, queries, depth = query.shape
    checks.shape(name, "key", key, "(B, H, S, D) with B, H, D of the query", (batch, heads, None, depth))
    pixels = key.shape[2]
    checks.shape(name, "value", value, "(B, H, S, D)", (batch, heads, pixels, depth), "give one value per key")
    words = None
    if masks is not None:
        bits = as_bits(name, "masks", masks)
        if len(bits.shape) != 2 or bits.shape[0] not in (batch, 1) or bits.shape[1] != queries:
            rule = f"have batch dimensions (B, N) = ({batch}, {queries}) or (1, N)"
            checks.bad_value(name, "masks", rule, tuple(bits.shape), "give one mask per query; a mask serves all heads")
        if bits.pixels != pixels:
            found = f"{bits.size[0]}x{bits.size[1]}"
            checks.bad_value(name, "masks", f"have S = {pixels} pixels", found, "resize them to the map of the keys")
        words = bits.words
    checks.same_device(name, query=query, key=key, value=value, masks=words)
    checks.choice(name, "empty", empty, ("all", "zero"))
    if scale is None:
        scale = depth**-0.5 if depth > 0 else 1.0
    else:
        checks.number(name, "scale", scale, "be a finite number or None", -sys.float_info.max, sys.float_info.max)
    query, key, value = checks.as_matmul(query, key, value)
    return op.mask_attention(query, key, value, words, float(scale), empty == "all")[0]
