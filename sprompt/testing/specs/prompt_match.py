"""prompt_match."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sprompt.ops import PromptMatch, prompt_match
from sprompt.testing.spec import Bench, OpSpec, Sample, random, refusals


def _counts(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def _match_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    def draw(*shape: int, offset: int = 0) -> Tensor:
        return torch.randn(shape, generator=random(seed + offset)).to(device, dtype)

    samples = []
    for b, n, l, c in ((2, 20, 7, 16), (1, 1, 1, 1), (2, 33, 5, 19), (3, 4, 2, 8), (1, 70, 300, 12), (2, 6, 1, 5)):
        samples.append(Sample(f"{b}, {n} kernels, {l} prompts of {c}", (draw(b, n, c), draw(b, l, c, offset=1))))
    kernels, prompts = draw(3, 9, 24), draw(3, 6, 24, offset=1)
    counts = _counts(device, 3, 0, 6)
    padded = prompts.clone()
    padded[0, 3:], padded[1] = float("nan"), float("nan")
    many = draw(2, 23, 24, offset=2)
    return [
        *samples,
        Sample("counts, padding of NaN", (kernels, padded, counts)),
        Sample("shared kernels", (kernels[0], prompts, counts)),
        Sample("all dropped", (kernels, prompts), {"dropout": 1.0}),
        Sample("some kept", (kernels, prompts), {"keep": (torch.arange(27, device=device) % 3 > 0).view(3, 9)}),
        Sample("sequential", (kernels, prompts), {"assign": "sequential", "counts": counts}),
        Sample("sequential, 20 kernels, 23 prompts", (draw(20, 24), many), {"assign": "sequential"}),
        Sample("random, one kernel", (kernels[:, :1], prompts), {"assign": "random", "counts": counts}),
        Sample("half and float32 kernels", (kernels, prompts.float())),
        Sample("no prompts", (kernels, prompts[:, :0])),
        Sample("no kernels", (kernels[:, :0], prompts)),
        Sample("no images", (kernels[:0], prompts[:0], counts[:0])),
        Sample("shared kernels, no images", (kernels[0], prompts[:0])),
        Sample("no channels", (kernels[..., :0], prompts[..., :0])),
    ]


def match_extremes(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Calls whose match changes with the smallest change of the input. So they must not be samples, whose gradient is
    checked."""
    kernels = torch.randn(3, 9, 24, generator=random(seed)).to(device, dtype)
    prompts = torch.randn(3, 6, 24, generator=random(seed + 1)).to(device, dtype)
    equal = prompts[:, :1].repeat(1, 6, 1)
    equal[1] = -equal[1]
    holes = prompts.clone()
    holes[0, 1] = float("nan")
    holes[1] = float("nan")
    holes[2, 3:, 0] = float("inf")
    kernel_holes = kernels.clone()
    kernel_holes[0, 4] = float("nan")
    zeros = prompts.clone()
    zeros[:, 2] = 0
    return [
        Sample("equal prompts", (kernels, equal)),
        Sample("NaN and infinite prompts", (kernels, holes)),
        Sample("a NaN kernel", (kernel_holes, prompts)),
        Sample("zero prompt, zero kernel", (kernels * (torch.arange(9, device=device) > 4)[:, None], zeros)),
    ]


def _slot(turn: int, number: int, length: int) -> int:
    """The prompt of kernel `turn` of `number`, from an explicit list of the 20 slots."""
    each, rest = 20 // length, 20 % length
    slots = [l for l in range(length) for _ in range(each)] + list(range(rest))
    return slots[turn * 20 // number]


def match_oracle(
    kernels: Tensor, prompts: Tensor, counts: Tensor | None = None, *, assign: str = "cosine", keep: Tensor | None = None,
    dropout: float = 0.0,
) -> PromptMatch:  # fmt: skip
    """Computes one kernel at a time in numpy. The result must not depend on random numbers (one kernel, or all dropped)."""
    import numpy as np

    batch, length = prompts.shape[:2]
    k = kernels.expand(batch, *kernels.shape[-2:]).cpu().numpy().copy()
    p, index = prompts.cpu().numpy(), np.full((batch, kernels.shape[-2]), -1, dtype=np.int64)
    for b, n in np.ndindex(*index.shape):
        real = length if counts is None else int(counts[b])
        if real == 0 or dropout == 1 or (keep is not None and not keep[b, n]):
            continue
        if assign == "cosine":
            with np.errstate(invalid="ignore"):
                norm = np.maximum(np.linalg.norm(k[b, n]), 1e-8) * np.maximum(np.linalg.norm(p[b, :real], axis=1), 1e-8)
                similarity = (p[b, :real] * k[b, n]).sum(1) / norm
            index[b, n] = np.argmax(np.where(np.isnan(similarity), -np.inf, similarity))
        else:
            index[b, n] = _slot(n, index.shape[1], real)
    out = (
        k + np.where(index[..., None] >= 0, np.take_along_axis(p, np.maximum(index, 0)[..., None], 1), 0)
        if length
        else k
    )
    return PromptMatch(torch.from_numpy(out), torch.from_numpy(index))


def compare_match(actual: PromptMatch, expected: PromptMatch, sample: Sample) -> None:
    """Checks that indices are equal, unless two prompts are equally similar up to rounding, and that kernels are exactly kernel
    + prompt of the index."""
    kernels, prompts = (x.cpu() for x in sample.args[:2])
    index, wanted = actual.index.cpu(), expected.index.cpu()
    channels = prompts.shape[-1]
    if prompts.shape[1] == 0:
        assert torch.equal(index, torch.full_like(index, -1))
    assert torch.equal(index < 0, wanted < 0) and bool((index < max(prompts.shape[1], 1)).all())
    differ = index != wanted
    if differ.any():
        k = kernels.double().expand(*index.shape, channels)
        near, best = (
            F.cosine_similarity(k, prompts.double().gather(1, i.clamp(min=0)[..., None].expand(-1, -1, channels)), -1)
            for i in (index, wanted)
        )
        gap = (best - near).abs()[differ]
        assert bool((gap <= 4 * (channels + 4) * 2.0**-24).all()), f"less similar prompts taken, by {gap.max():.3g}"
    chosen = prompts.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, channels)) if prompts.shape[1] else 0
    sum_ = torch.where(index[..., None] >= 0, kernels + chosen, kernels.expand(*index.shape, channels))
    torch.testing.assert_close(actual.kernels.cpu(), sum_, rtol=0, atol=0, equal_nan=True)


_k, _p = torch.zeros(2, 5, 8), torch.zeros(2, 3, 8)
_bad = refusals(prompt_match)

PROMPT_MATCH = OpSpec(
    prompt_match, _match_samples, ("prompt_match",), gradients=("kernels", "prompts"), oracle=match_oracle, compare=compare_match,
    bound=lambda sample: (1e-5, 1e-5),
    errors=(
        _bad("a list", r"kernels must be a tensor, got list", [1], _p, error=TypeError),
        _bad("integer kernels", r"kernels must have dtype float32, .*, got int64", _k.long(), _p, error=TypeError),
        _bad("integer prompts", r"prompts must have dtype float32, .*, got int64", _k, _p.long(), error=TypeError),
        _bad("prompts of one image", r"prompts must have shape \(B, L, C\), got \(3, 8\)", _k, _p[0]),
        _bad("one kernel", r"kernels must have shape \(B, N, C\) or \(N, C\)", _k[0, 0], _p),
        _bad("kernels of other images",
            r"kernels must have shape \(B, N, C\) or \(N, C\), got \(1, 5, 8\); kernels and prompts share", _k[:1], _p),
        _bad("batch in the middle", r"kernels must have shape", _k.transpose(0, 1), _p),
        _bad("other channels", r"kernels must have shape \(N, C\), got \(5, 7\)", _k[0, :, :7], _p),
        _bad("float counts", r"counts must have dtype int64, got float32", _k, _p, torch.ones(2), error=TypeError),
        _bad("one count", r"counts must have shape \(B,\) = \(2,\), got \(1,\)", _k, _p, torch.tensor([1])),
        _bad("negative count", r"counts must lie between 0 and 3, got -1", _k, _p, torch.tensor([-1, 1])),
        _bad("unknown assignment", r"assign must be one of 'cosine', 'sequential', 'random', got 'euclid'", _k, _p, assign="euclid"),
        _bad("dropout above 1", r"dropout must be a number between 0 and 1, got 1.5", _k, _p, dropout=1.5),
        _bad("dropout of text", r"dropout must be a number between 0 and 1, got '0.1'", _k, _p, error=TypeError, dropout="0.1"),
        _bad("kept by numbers", r"keep must have dtype bool, got int64", _k, _p, error=TypeError, keep=torch.ones(2, 5, dtype=torch.int64)),
        _bad("kept for one image", r"keep must have shape \(B, N\), got \(5,\)", _k, _p, keep=torch.ones(5, dtype=torch.bool)),
        _bad("a seed", r"generator must be a torch.Generator or None, got int", _k, _p, error=TypeError, generator=3),
        _bad("another device", r"prompts must be on the device of kernels \(cpu\), got meta", _k, _p.to("meta")),
    ),
)  # fmt: skip

SPECS = [PROMPT_MATCH]


# ---- benchmarks: the shape of the method

_B, _N, _L, _C = 16, 100, 20, 256
_B_GPU = 12


def _bench(batch: int, shared: bool) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        kernels = torch.randn(batch, _N, _C, generator=random(seed)).to(device, dtype)
        prompts = torch.randn(batch, _L, _C, generator=random(seed + 1)).to(device, dtype)
        return Sample("", (kernels[0] if shared else kernels, prompts))

    return make


def _match_eager(kernels: Tensor, prompts: Tensor) -> PromptMatch:
    """A loop over kernels, like the released code."""
    kernels = kernels.expand(prompts.shape[0], *kernels.shape[-2:])
    out, index = [], []
    for b in range(kernels.shape[0]):
        for n in range(kernels.shape[1]):
            chosen = F.cosine_similarity(kernels[b, n][None].float(), prompts[b].float()).argmax()
            index.append(chosen)
            out.append(kernels[b, n] + prompts[b, chosen])
    shape = kernels.shape[:2]
    return PromptMatch(torch.stack(out).unflatten(0, shape), torch.stack(index).unflatten(0, shape))


def _match_vectorised(kernels: Tensor, prompts: Tensor) -> PromptMatch:
    kernels = kernels.expand(prompts.shape[0], *kernels.shape[-2:])
    with torch.no_grad():
        unit_k, unit_p = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (kernels, prompts))
        index = (unit_k @ unit_p.mT).argmax(-1)
    return PromptMatch(kernels + prompts.gather(1, index[..., None].expand(-1, -1, prompts.shape[-1])), index)


_numbers = _B * _C * (2 * _N + _L)

BENCHES = [
    Bench(
        prompt_match, "B 16, N 100, L 20, C 256", _bench(_B, False), _match_eager, vectorised=_match_vectorised,
        libraries={"vectorised eager": _match_vectorised}, agree=compare_match, dtypes=(torch.float32, torch.bfloat16, torch.float16),
        flops=2.0 * _B * _N * _L * _C, bytes=4.0 * _numbers, gradients=("kernels", "prompts"),
        goals={"forward": 150, "vectorised eager": 4},
    ),
    Bench(
        prompt_match, "B 16, N 100 shared, L 20, C 256", _bench(_B, True), _match_eager, vectorised=_match_vectorised,
        libraries={"vectorised eager": _match_vectorised}, agree=compare_match,
        flops=2.0 * _B * _N * _L * _C, bytes=4.0 * (_numbers - (_B - 1) * _N * _C), gradients=("kernels", "prompts"),
        goals={"forward": 150, "vectorised eager": 4},
    ),
    *(
        Bench(
            prompt_match, f"B {_B_GPU}, N 100{' shared' if shared else ''}, L 20, C 256", _bench(_B_GPU, shared), _match_eager,
            vectorised=_match_vectorised, libraries={"vectorised eager": _match_vectorised}, agree=compare_match,
            dtypes=(torch.float32, torch.bfloat16), device="cuda", gradients=("kernels", "prompts"),
            flops=2.0 * _B_GPU * _N * _L * _C,
            bytes=4.0 * _C * (_B_GPU * (_N + _L) + (1 if shared else _B_GPU) * _N),
        )
        for shared in (False, True)
    ),
]  # fmt: skip
