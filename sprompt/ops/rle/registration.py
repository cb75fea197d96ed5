"""Fake kernels and backends of the run-length ops."""

import torch
from torch import Tensor

from sprompt import native
from sprompt.masks import words_for
from sprompt.ops.library import register_op
from sprompt.ops.masks.op import rows
from sprompt.ops.rle import faults, reference


def _rle_encode(words: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    faults.fits("rle_encode", words.shape[-1], height, width)
    masks = rows(words)
    count, threads = masks.shape[0], max(1, min(native.threads(), masks.shape[0]))
    # Every string is written where it surely has room, then all are moved together.
    starts, offsets = (torch.zeros(count + 1, dtype=torch.int64) for _ in range(2))
    native._C.rle_bounds(masks, height, width, starts[1:], threads)
    starts.cumsum_(0)
    buffer = torch.empty(int(starts[-1]), dtype=torch.uint8)
    scratch = torch.empty((threads, native._C.rle_scratch(height, width)), dtype=torch.int64)
    native._C.rle_encode(masks, height, width, starts, buffer, offsets[1:], scratch, threads)
    if count and int(offsets.min()) < 0:
        raise RuntimeError("rle_encode: the masks changed while they were encoded; another thread writes to them")
    offsets.cumsum_(0)
    characters = torch.empty(int(offsets[-1]), dtype=torch.uint8)
    native._C.rle_join(buffer, starts, offsets, characters, threads)
    return characters, offsets


def _rle_encode_fake(words: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    # Without a context nothing is traced: sprompt.testing.compiled runs fakes on tensors.
    size = 0 if context is None else context.new_dynamic_size()
    offsets = words.new_empty(words.shape[:-1].numel() + 1, dtype=torch.int64)
    return words.new_empty(size, dtype=torch.uint8), offsets


def _rle_decode(characters: Tensor, offsets: Tensor, height: int, width: int) -> Tensor:
    count = offsets.shape[0] - 1
    faults.within_limits(height, width, count)
    words = torch.empty((count, words_for(height * width)), dtype=torch.int32)
    found = torch.empty((count, 3), dtype=torch.int64)
    native._C.rle_decode(characters.contiguous(), offsets.contiguous(), height, width, words, found, native.threads())
    faults.raise_first(found, height, width)
    return words


def _rle_decode_fake(characters: Tensor, offsets: Tensor, height: int, width: int) -> Tensor:
    return characters.new_empty((offsets.shape[0] - 1, words_for(height * width)), dtype=torch.int32)


register_op("rle_encode", fake=_rle_encode_fake, reference=reference.rle_encode, native_kernel=_rle_encode, gpu="cuda")
# No GPU kernel: the strings are Python objects, so rle_decode has the characters, and makes the masks, on the CPU.
register_op("rle_decode", fake=_rle_decode_fake, reference=reference.rle_decode, native_kernel=_rle_decode)
