"""The declarations of rle_encode and rle_decode."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.declare import Args, new, op
from sprompt.ops.masks.op import rows
from sprompt.ops.rle import faults


@op("cuda", dynamic=True)
def rle_encode(words: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    size = 0 if context is None else context.new_dynamic_size()  # None: no tracing
    return words.new_empty(size, dtype=torch.uint8), words.new_empty(words.shape[:-1].numel() + 1, dtype=torch.int64)


rle_encode.values(lambda a: faults.fits("rle_encode", a.words.shape[-1], a.height, a.width))


@rle_encode.native
def _(a: Args) -> tuple[Tensor, Tensor]:
    masks, size, threads = rows(a.words), (a.height, a.width), native.threads()
    # Every string is written to a part of the buffer that surely holds it. Then all strings are joined.
    starts, offsets = (torch.empty(masks.shape[0] + 1, dtype=torch.int64) for _ in range(2))
    buffer = torch.empty(native._C.rle_bounds(masks, *size, starts, threads), dtype=torch.uint8)
    length = native._C.rle_encode(masks, *size, starts, buffer, offsets, threads)
    if length < 0:
        raise RuntimeError("rle_encode: the masks changed while they were encoded; another thread writes to them")
    characters = torch.empty(length, dtype=torch.uint8)
    native._C.rle_join(buffer, starts, offsets, characters, threads)
    return characters, offsets


# No GPU kernel: the strings are Python objects, so their characters are on the CPU, and rle_decode makes the masks there.
@op()
def rle_decode(characters: Tensor, offsets: Tensor, height: int, width: int) -> Tensor:
    return new(characters, offsets.shape[0] - 1, words_for(height * width), dtype=torch.int32)


rle_decode.values(lambda a: faults.within_limits(a.height, a.width, a.offsets.shape[0] - 1))


@rle_decode.native
def _(a: Args, words: Tensor) -> None:
    characters, offsets, size = a.characters.contiguous(), a.offsets.contiguous(), (a.height, a.width)
    found = torch.empty(words.shape[0], 3, dtype=torch.int64)
    native._C.rle_decode(characters, offsets, *size, words, found, native.threads())
    faults.raise_first(found, *size)
