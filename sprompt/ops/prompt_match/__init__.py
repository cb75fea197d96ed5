"""Matches kernels with prompts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sprompt.ops import checks
from sprompt.ops.prompt_match import op

ASSIGNMENTS = ("cosine", "sequential", "random")


class PromptMatch(NamedTuple):
    """The result of `prompt_match`."""

    kernels: Tensor  # (B, N, C): the kernels with their prompts added
    index: Tensor  # type: ignore[assignment]  # hides tuple.index; (B, N) int64: prompt of each kernel, -1: none


def prompt_match(
    kernels: Tensor,
    prompts: Tensor,
    counts: Tensor | None = None,
    *,
    assign: str = "cosine",
    keep: Tensor | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> PromptMatch:
    """Gives every kernel one prompt and adds it (Eqs. 6–8).

    cosine: δ(n) = argmax_l ⟨K_n, P_l⟩ / (max(‖K_n‖, ε) · max(‖P_l‖, ε)), ε = 1e-8, over the counts[b] real prompts, in float32;
    K'_n = K_n + P_δ(n).
    sequential: kernel n reads slot t = ⌊n · 20 / N⌋ of 20 slots. With L = counts[b] and r = ⌊20 / L⌋, slots t < rL hold
    prompt ⌊t / r⌋, and the other slots hold prompts 0, 1, … If there are more than 20 prompts, only the first 20 are used.
    random: kernel n takes the prompt that sequential gives to kernel π(n). There is one permutation π per call, for the
    whole batch.

    Args:
        kernels: (B, N, C) float, or (N, C), shared by the batch.
        prompts: (B, L, C) float. If the dtypes of kernels and prompts differ, both are computed in the wider dtype.
        counts: (B,) int64, the number of real prompts of each image; None means all. Padding is not read.
        keep: (B, N) bool, which kernels of each image may take a prompt; None means all.
        dropout: probability, per image and kernel, that no prompt is added. The other kernels are not rescaled.
        generator: generator, on the kernels' device, for the permutation and the dropout; None means torch's own.
            torch.compile and torch.export accept only None.

    Returns: PromptMatch(kernels (B, N, C), index int64 (B, N)). Exact ties, such as equal prompts, go to the lowest index.
    A NaN similarity counts as −∞, so it never wins over a number. If all are NaN, the index is 0. A kernel without a prompt
    (counts[b] = 0, L = 0, or dropped) is returned as it is, with index −1.
    Gradient to kernels: the identity, summed over the batch if the kernels are shared. Gradient to prompts: the sum over the
    kernels that took the prompt, in float32, by increasing n. No gradient through the match: detach the prompts if a method
    requires it. Deterministic, except for the permutation and the dropout. Autocast changes nothing.

    >>> kernels = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> prompts = torch.tensor([[[0.0, 3.0], [5.0, 1.0]]])
    >>> prompt_match(kernels, prompts)
    PromptMatch(kernels=tensor([[[6., 1.],
             [0., 5.]]]), index=tensor([[1, 0]]))
    """
    checks.tensor("prompt_match", "kernels", kernels, checks.FLOATS)
    checks.tensor("prompt_match", "prompts", prompts, checks.FLOATS)
    checks.shape("prompt_match", "prompts", prompts, "(B, L, C)", (None, None, None), "pad the prompts and give counts")
    batch, _, channels = prompts.shape
    if kernels.dim() == 2:
        checks.shape("prompt_match", "kernels", kernels, "(N, C)", (None, channels), "prompts have C channels")
    else:
        advice = "kernels and prompts share the batch and the channels"
        checks.shape("prompt_match", "kernels", kernels, "(B, N, C) or (N, C)", (batch, None, channels), advice)
    checks.counts("prompt_match", counts, batch)
    checks.choice("prompt_match", "assign", assign, ASSIGNMENTS)
    checks.number("prompt_match", "dropout", dropout, "be a number between 0 and 1", 0, 1)
    checks.same_device("prompt_match", kernels=kernels, prompts=prompts, counts=counts)
    if generator is not None:
        _checked_generator(generator, kernels)
    if kernels.dtype != prompts.dtype:
        wider = torch.promote_types(kernels.dtype, prompts.dtype)
        kernels, prompts = kernels.to(wider), prompts.to(wider)
    number = kernels.shape[-2]
    if keep is not None:
        checks.tensor("prompt_match", "keep", keep, (torch.bool,))
        checks.shape("prompt_match", "keep", keep, "(B, N)", (batch, number), "one entry for each kernel of each image")
        checks.same_device("prompt_match", kernels=kernels, keep=keep)
    order = None
    if assign == "random":
        order = torch.randperm(number, generator=generator, device=kernels.device)
    if dropout > 0:
        drawn = torch.rand((batch, number), generator=generator, device=kernels.device) >= dropout
        keep = drawn if keep is None else drawn & keep
    return PromptMatch(*op.prompt_match(kernels, prompts, counts, keep, order, assign == "cosine"))


def _checked_generator(generator: Any, kernels: Tensor) -> None:
    if not isinstance(generator, torch.Generator):
        checks.bad_type("prompt_match", "generator", "be a torch.Generator or None", type(generator).__name__)
    if generator.device.type != kernels.device.type:
        advice = "make it with torch.Generator(device)"
        checks.bad_value(
            "prompt_match", "generator", f"be on the device of kernels ({kernels.device})", generator.device, advice
        )
