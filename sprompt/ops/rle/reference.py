"""Run lengths in plain PyTorch, on words int32 (..., n) of height x width pixels."""

from itertools import pairwise

import torch
from torch import Tensor

from sprompt.masks import words_for
from sprompt.ops.declare import Args
from sprompt.ops.masks.reference import pack, unpack
from sprompt.ops.rle import faults
from sprompt.ops.rle.faults import Fault


def rle_encode(a: Args) -> tuple[Tensor, Tensor]:
    words, height, width = a
    words = words.reshape(words.shape[:-1].numel(), words.shape[-1])
    strings = [_characters(_runs(unpack(mask, height * width).unflatten(0, (height, width)))) for mask in words]
    lengths = torch.tensor([0, *map(len, strings)], dtype=torch.int64, device=words.device)
    return torch.cat([words.new_empty(0, dtype=torch.uint8), *strings]), lengths.cumsum(0)


def _runs(mask: Tensor) -> Tensor:
    """Lengths of the runs of 0, 1, 0, ... down the columns."""
    pixels = mask.T.flatten()
    before = torch.nn.functional.pad(pixels, (1, 0))[:-1]
    starts = (pixels != before).nonzero().flatten()
    return torch.nn.functional.pad(starts, (1, 0)).diff(append=starts.new_tensor([pixels.numel()]))


def _characters(runs: Tensor) -> Tensor:
    numbers = runs.clone()
    numbers[3:] -= runs[1:-2]
    more = torch.ones_like(numbers, dtype=torch.bool)
    columns = []
    for _ in range(7):  # 35 bits; a run has at most 31
        present, group = more, numbers & 31
        numbers = numbers >> 5
        more = present & (numbers != torch.where(group >= 16, -1, 0))  # the group's sign does not give the rest
        columns.append(torch.where(present, 48 + group + 32 * more, 0))
    table = torch.stack(columns, 1)
    return table[table > 0].to(torch.uint8)


def rle_decode(a: Args) -> Tensor:
    characters, offsets, height, width = a
    count, ends, text = offsets.numel() - 1, offsets.tolist(), characters.cpu().numpy().tobytes()
    words = characters.new_zeros((count, words_for(height * width)), dtype=torch.int32)
    found = torch.zeros((count, 3), dtype=torch.int64)
    for index, (start, end) in enumerate(pairwise(ends)):
        if not 0 <= start <= end <= len(text):
            found[index, 0] = faults.BAD_OFFSETS
            continue
        runs, fault = _parse(text[start:end], height * width)
        found[index] = torch.tensor(fault)
        if fault[0] == faults.FINE:
            lengths = torch.tensor(runs, dtype=torch.int64, device=characters.device)
            colours = torch.arange(len(runs), device=characters.device) % 2
            words[index] = pack(colours.repeat_interleave(lengths).reshape(width, height).T, 0.5)
    faults.raise_first(found, height, width)
    return words


def _parse(text: bytes, pixels: int) -> tuple[list[int], Fault]:
    """The runs of a string, and its first fault."""
    runs: list[int] = []
    place, rest = 0, pixels
    while place < len(text):
        number, start = 0, place
        while True:
            if place - start == faults.MOST_CHARACTERS:
                return runs, (faults.TOO_LONG, start, 0)
            if place == len(text):
                return runs, (faults.TRUNCATED, start, 0)
            group = text[place] - 48
            if not 0 <= group <= 63:
                return runs, (faults.BAD_CHARACTER, place, text[place])
            number |= (group & 31) << 5 * (place - start)
            place += 1
            if not group & 32:
                break
        if group & 16:
            number -= 1 << 5 * (place - start)
        run = number + runs[-2] if len(runs) > 2 else number
        if run < 0:
            return runs, (faults.NEGATIVE, len(runs), run)
        if run > rest:
            return runs, (faults.TOO_MANY, len(runs), run)
        runs.append(run)
        rest -= run
    if rest > 0:
        return runs, (faults.TOO_FEW, len(runs), pixels - rest)
    return runs, (faults.FINE, 0, 0)
