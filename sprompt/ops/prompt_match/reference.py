"""prompt_match in plain PyTorch. Sums are in float32 (float64 for float64)."""

import torch
from torch import Tensor

from sprompt.ops.declare import Args
from sprompt.ops.region_mean.reference import real, wide

#: max(norm, EPSILON) in the cosine.
EPSILON = 1e-8
#: Slots that the prompts of one image share in the assignments "sequential" and "random".
SLOTS = 20


def cosine(kernels: Tensor, prompts: Tensor) -> Tensor:
    """The similarities (B, N, L). Every entry is summed in the same order, so equal prompts tie."""
    k, p = wide(kernels), wide(prompts)
    dot = torch.stack([(k * p[:, l, None]).sum(-1) for l in range(p.shape[1])], -1)
    norm_k, norm_p = (x.square().sum(-1).sqrt().clamp(min=EPSILON) for x in (k, p))
    return dot / (norm_k[..., None] * norm_p[:, None])


def slot_prompts(order: Tensor, counts: Tensor) -> Tensor:
    """The prompt of each kernel, (B, N): kernel n reads slot ⌊order[n] · 20 / N⌋, and counts[b] prompts share the slots."""
    slot = order * SLOTS // max(order.shape[0], 1)
    length = counts.clamp(min=1)[:, None]
    each = SLOTS // length
    return torch.where(slot < each * length, slot // each.clamp(min=1), slot - each * length)


def prompt_match(a: Args) -> tuple[Tensor, Tensor]:
    prompts, counts = a.prompts, a.counts
    batch, length, channels = prompts.shape
    number = a.kernels.shape[-2]
    kernels = a.kernels.expand(batch, number, channels)
    if length == 0:
        return kernels.clone(memory_format=torch.contiguous_format), prompts.new_full(
            (batch, number), -1, dtype=torch.int64
        )
    if counts is None:
        counts = torch.full((batch,), length, device=prompts.device)
    if a.cosine:
        similarity = cosine(kernels, prompts)
        similarity = similarity.masked_fill(similarity.isnan() | ~real(counts, length)[:, None], -torch.inf)
        # argmax may return any of several largest entries, but the result must be the first.
        best = similarity == similarity.amax(-1, keepdim=True)
        index = torch.where(best, torch.arange(length, device=prompts.device), length).amin(-1)
    else:
        turn = torch.arange(number, device=prompts.device) if a.order is None else a.order
        index = slot_prompts(turn, counts)
    index = index.masked_fill((counts == 0)[:, None], -1)
    if a.keep is not None:
        index = index.masked_fill(~a.keep, -1)
    chosen = prompts.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, channels))
    return torch.where(index[..., None] >= 0, kernels + chosen, kernels), index


def prompt_match_backward(a: Args) -> Tensor:
    grad = wide(a.grad)
    out = grad.new_zeros((grad.shape[0], a.prompts, grad.shape[2]))
    for l in range(a.prompts):
        out[:, l] = torch.where((a.index == l)[..., None], grad, 0).sum(1)
    return out.to(a.grad.dtype)
