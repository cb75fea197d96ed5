"""The match of kernels with prompts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sprompt.ops import checks
from sprompt.ops.prompt_match import op

ASSIGNMENTS = ("cosine", "sequential", "random")


class PromptMatch(NamedTuple):
    """What `prompt_match` returns."""

    kernels: Tensor  # (B, N, C): the kernels with their prompts added
    index: Tensor  # type: ignore[assignment]  # (B, N) int64: the prompt of each kernel, -1 for none


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
    sequential: kernel n reads slot t = ⌊n · 20 / N⌋ of 20; with L = counts[b] and r = ⌊20 / L⌋, slots t < rL hold prompt ⌊t / r⌋,
    the others prompts 0, 1, …; of more than 20 prompts the first 20 are used.
    random: kernel n takes what sequential gives kernel π(n); one permutation π per call, shared by the batch.

    Args:
        kernels: (B, N, C) float, or (N, C), shared by the batch.
        prompts: (B, L, C) float; of two float dtypes both are computed in the wider.
        counts: (B,) int64, how many prompts of each image are real; None means all. Padding is not looked at.
        keep: (B, N) bool, which kernels of each image may take a prompt; None means all.
        dropout: chance, per image and kernel, that no prompt is added, drawn from `generator`; others are not rescaled.
        generator: source of the permutation and the dropout, of the kernels' device; None is torch's own. torch.compile
            and torch.export take None only.

    Returns: PromptMatch(kernels (B, N, C), index int64 (B, N)). Ties, exact ones such as equal prompts, go to the lowest
    index. A NaN similarity counts as −∞, so it never wins over a number; where all are NaN the prompt is 0. Without a
    prompt (counts[b] = 0, L = 0, dropped) a kernel is returned as it is, with index −1.
    Gradient to kernels: the identity, summed over the batch if they are shared; to prompts: the sum over the kernels that took
    each, in float32, by increasing n; none through the match. Detach the prompts where a method says so. Deterministic, but
    for the drawn parts. Autocast changes nothing.

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
