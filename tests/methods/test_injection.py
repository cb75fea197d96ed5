"""Prompts added to queries: matching by §4 and §5, dropout, sites; the result is the same for every split of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_queries import batch_of
from torch import Tensor

from sprompt.methods.saliency_prompt import Injection, Prompts, SaliencyPromptConfig, prompts_of
from sprompt.methods.saliency_prompt.injection import places
from sprompt.models.protocol import Features
from sprompt.seeding import generator


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def injection(
    prompts: Tensor, counts: list[int], step: int = 0, ids: list[int] | None = None, **config: Any
) -> Injection:
    settings = SaliencyPromptConfig(**{"dropout": 0.0, **config})
    ids = list(range(len(counts))) if ids is None else ids
    return Injection(
        lambda _: Prompts(prompts, torch.tensor(counts)), settings, ids, sites=("kernel", "proposal"), seed=3, step=step
    )


def literal(kernels: Tensor, prompts: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Eqs. 6–8, one kernel at a time."""
    out, index = kernels.clone().double(), torch.full(kernels.shape[:2], -1)
    for b, count in enumerate(counts):
        for n, k in enumerate(kernels[b].double()):
            e = [float(k @ p / (max(k.norm(), 1e-8) * max(p.norm(), 1e-8))) for p in prompts[b, :count].double()]
            if e:
                index[b, n] = e.index(max(e))
                out[b, n] += prompts[b, index[b, n]].double()
    return out, index


@pytest.mark.parametrize("site", ["kernel", "proposal"])
def test_cosine_at_its_site_only(site: str) -> None:
    prompts, counts = drawn(3, 5, 8, seed=1), [5, 0, 2]
    inject = injection(prompts, counts, site=site)
    for name in ("kernel", "proposal"):
        kernels = drawn(3, 20, 8, seed=len(name))
        got = inject(name, kernels)
        if name != site:
            assert got is kernels
            continue
        wanted, index = literal(kernels, prompts, counts)
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=0)
        assert inject.index is not None and torch.equal(inject.index, index)
        assert torch.equal(got[1], kernels[1])


def test_late_matches_at_the_first_site_and_adds_at_the_second() -> None:
    prompts, counts = drawn(2, 4, 8, seed=1), [4, 3]
    inject = injection(prompts, counts, site="late")
    first, second = drawn(2, 20, 8, seed=5), drawn(2, 20, 8, seed=6)
    assert inject("kernel", first) is first
    _, index = literal(first, prompts, counts)
    added = torch.stack([prompts[b, index[b]] for b in range(2)])
    torch.testing.assert_close(inject("proposal", second), second + added)


@pytest.mark.parametrize("assign", ["sequential", "random"])
def test_baselines(assign: str) -> None:
    """§5 by hand: L = 3, N = 40, so slots 0–5, 6–11, 12–17 and then 0, 1; each slot serves two kernels."""
    slots = [0] * 6 + [1] * 6 + [2] * 6 + [0, 1]
    by_place = [slots[n * 20 // 40] for n in range(40)]
    prompts, kernels = drawn(2, 3, 8, seed=1), drawn(2, 40, 8)
    inject = injection(prompts, [3, 3], assign=assign)
    got = inject("kernel", kernels)
    assert inject.index is not None
    for b in range(2):
        index = inject.index[b].tolist()
        if assign == "sequential":
            assert index == by_place
        else:
            assert sorted(index) == sorted(by_place)
            assert index != by_place
        torch.testing.assert_close(got[b], kernels[b] + prompts[b, inject.index[b]])
    assert torch.equal(inject.index[0], inject.index[1]), "one permutation for the batch"
    if assign == "random":
        other = injection(prompts, [3, 3], assign=assign, step=1)
        other("kernel", kernels)
        assert other.index is not None and not torch.equal(other.index, inject.index), "another one every step"


def test_no_prompt_no_change() -> None:
    kernels = drawn(2, 20, 8)
    for inject in (
        injection(drawn(2, 4, 8), [4, 4], assign="none"),
        injection(drawn(2, 0, 8), [0, 0]),
        injection(drawn(2, 4, 8), [0, 0], dropout=0.5),
        injection(drawn(2, 4, 8), [4, 4], dropout=1.0),
        injection(drawn(2, 0, 8), [0, 0], assign="sequential"),
    ):
        assert torch.equal(inject("kernel", kernels), kernels)
    late = injection(drawn(2, 0, 8), [0, 0], site="late")
    assert torch.equal(late("proposal", late("kernel", kernels)), kernels)


def test_dropout_is_of_kernels_and_images() -> None:
    prompts, kernels = drawn(50, 3, 8, seed=1), drawn(1, 100, 8).expand(50, -1, -1)
    inject = injection(prompts, [3] * 50, dropout=0.1)
    got = inject("kernel", kernels)
    plain, index = literal(kernels[:3], prompts, [3] * 3)
    assert inject.index is not None
    dropped = inject.index < 0
    assert 0.08 < dropped.float().mean() < 0.12  # 5000 draws: 0.1 ± 5 deviations of 0.0042
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(got[dropped], kernels[dropped])
    kept = ~dropped[:3]
    torch.testing.assert_close(got[:3][kept].double(), plain[kept], atol=1e-5, rtol=0)  # not rescaled
    assert torch.equal(inject.index[:3][kept], index[kept])


def test_dropout_of_images() -> None:
    prompts, kernels = drawn(400, 3, 8, seed=1), drawn(1, 20, 8).expand(400, -1, -1)
    inject = injection(prompts, [3] * 400, dropout=0.3, dropout_of="image")
    got = inject("kernel", kernels)
    assert inject.index is not None
    dropped = (inject.index < 0).all(1)
    assert torch.equal(dropped, (inject.index < 0).any(1)), "all kernels of an image or none"
    assert 0.2 < dropped.float().mean() < 0.4  # 400 draws: 0.3 ± 4.4 deviations of 0.023
    assert torch.equal(got[dropped], kernels[dropped]) and (got[~dropped] != kernels[~dropped]).any(2).all()
    half = injection(prompts[200:], [3] * 200, ids=list(range(200, 400)), dropout=0.3, dropout_of="image")
    assert torch.equal(half("kernel", kernels[200:]), got[200:])


@pytest.mark.parametrize("site", ["kernel", "proposal", "late"])
def test_prompts_of_the_map_that_queries_act_on(site: str) -> None:
    """They are read once, from the map that the model gives to its prompter at the matching."""
    prompts, first, second = drawn(2, 3, 8, seed=1), drawn(2, 20, 8, seed=5), drawn(2, 20, 8, seed=6)
    maps = {"kernel": drawn(2, 8, 3, 5, seed=7).requires_grad_(), "proposal": drawn(2, 8, 3, 5, seed=8)}
    seen = []

    def read(features: Tensor) -> Prompts:
        seen.append(features)
        return Prompts(prompts, torch.tensor([3, 2]))

    config = SaliencyPromptConfig(dropout=0.0, site=site, level="features")
    sites = ("kernel", "proposal")
    inject, plain = Injection(read, config, [0, 1], sites=sites, seed=3, step=0), injection(prompts, [3, 2], site=site)
    for name, queries in (("kernel", first), ("proposal", second)):
        assert torch.equal(inject(name, queries, maps[name]), plain(name, queries))
    assert len(seen) == 1 and not seen[0].requires_grad
    assert torch.equal(seen[0], maps["proposal" if site == "proposal" else "kernel"])
    assert inject.monitors().keys() == plain.monitors().keys()


def test_a_model_without_that_map_is_refused() -> None:
    batch = batch_of(torch.ones(2, 1, 32, 32), [1, 1])
    with pytest.raises(ValueError, match=r'level: "features" needs a model that hands its prompter the map'):
        prompts_of(batch, Features([], []), SaliencyPromptConfig(level="features"))(None)


@pytest.mark.parametrize("assign", ["cosine", "random"])
def test_splitting_a_batch_changes_nothing(assign: str) -> None:
    prompts, kernels, ids = drawn(4, 3, 8, seed=1), drawn(4, 40, 8), [7, 3, 9, 1]
    whole = injection(prompts, [3, 2, 0, 3], step=5, ids=ids, dropout=0.3, assign=assign)("kernel", kernels)
    halves = [
        injection(prompts[s], [3, 2, 0, 3][s], step=5, ids=ids[s], dropout=0.3, assign=assign)("kernel", kernels[s])
        for s in (slice(0, 2), slice(2, 4))
    ]
    assert torch.equal(torch.cat(halves), whole)
    other = injection(prompts, [3, 2, 0, 3], step=6, ids=ids, dropout=0.3, assign=assign)("kernel", kernels)
    assert not torch.equal(other, whole)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    injection(drawn(2, 3, 8), [3, 3], dropout=0.5, assign="random")("kernel", drawn(2, 20, 8))
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = (torch.rand(4, generator=generator(*key)) for key in ((1, 2), (1, 2), (2, 1)))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_permuting_prompts_permutes_nothing_in_the_kernels() -> None:
    prompts, kernels = drawn(2, 6, 8, seed=1), drawn(2, 40, 8)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    a, b = injection(prompts, [6, 6]), injection(prompts[:, order], [6, 6])
    assert torch.equal(a("kernel", kernels), b("kernel", kernels))
    assert a.index is not None and b.index is not None
    assert torch.equal(order[b.index], a.index)


@pytest.mark.parametrize("site", ["kernel", "proposal", "late"])
def test_ratio_is_the_length_of_prompts_in_lengths_of_queries(site: str) -> None:
    """Every added prompt has the requested length and its own direction, and goes to the same kernels as without ratio."""
    prompts, counts = drawn(2, 4, 8, seed=1) * torch.tensor([1.0, 5.0, 0.1, 30.0])[:, None], [4, 3]
    first, second = drawn(2, 20, 8, seed=5), 7 * drawn(2, 20, 8, seed=6)
    inject, plain = (injection(prompts, counts, site=site, ratio=ratio) for ratio in (0.5, None))
    got = [inject(name, queries) - queries for name, queries in (("kernel", first), ("proposal", second))]
    _ = [plain(name, queries) for name, queries in (("kernel", first), ("proposal", second))]
    assert inject.index is not None and plain.index is not None and torch.equal(inject.index, plain.index)
    added, queries = (got[0], first) if site == "kernel" else (got[1], second)
    for b in range(2):
        length = 0.5 * queries[b].double().norm(dim=1).mean()
        own = prompts[b, inject.index[b]].double()
        torch.testing.assert_close(added[b].double(), own / own.norm(dim=1, keepdim=True) * length, atol=1e-5, rtol=0)
    zero = injection(torch.zeros(1, 2, 8), [2], ratio=1.0)
    assert torch.equal(zero("kernel", first[:1]), first[:1])
    with pytest.raises(ValueError, match="ratio must be above 0"):
        SaliencyPromptConfig(ratio=0)


def test_gradient_passes_to_kernels_unchanged() -> None:
    prompts = drawn(2, 3, 8, seed=1).requires_grad_(False)
    for site, config in (("kernel", {}), ("kernel", {"dropout": 0.5}), ("proposal", {"site": "late"})):
        kernels, weight = drawn(2, 20, 8).requires_grad_(), drawn(2, 20, 8, seed=9)
        inject = injection(prompts, [3, 0], **config)
        out = inject("proposal", inject("kernel", kernels)) if site == "proposal" else inject("kernel", kernels)
        (out * weight).sum().backward()
        assert kernels.grad is not None and torch.equal(kernels.grad, weight)


def test_dtype_of_the_queries_is_kept() -> None:
    got = injection(drawn(2, 3, 8), [3, 3])("kernel", drawn(2, 20, 8).bfloat16())
    assert got.dtype == torch.bfloat16


def test_monitors() -> None:
    prompts = torch.tensor([[[4.0, 0.0], [0.0, 4.0], [-1.0, -1.0]], [[9.0, 9.0], [9.0, 9.0], [9.0, 9.0]]])
    kernels = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 8.0], [2.0, 0.1]]]).expand(2, -1, -1)
    inject = injection(prompts, [3, 0])
    inject("kernel", kernels)
    monitors = inject.monitors()
    ratio = (4 / 1 + 4 / 2 + 4 / 8 + 4 / (4.01**0.5)) / 4
    assert float(monitors["monitor/prompt_ratio"]) == pytest.approx(ratio)
    assert float(monitors["monitor/kernels_per_prompt"]) == 2  # 4 kernels share 2 prompts
    assert float(monitors["monitor/prompts_used"]) == pytest.approx(2 / 3)
    empty = injection(prompts[:, :0], [0, 0])
    empty("kernel", kernels)
    assert all(float(v) == 0 for v in empty.monitors().values())


def test_shapes_that_would_broadcast_are_refused() -> None:
    inject = injection(drawn(2, 3, 8), [3, 3])
    for bad in (drawn(20, 8), drawn(1, 20, 8), drawn(2, 20, 9), drawn(2, 20, 8, 1)):
        with pytest.raises(ValueError, match=r"kernel: queries must have shape \(B, N, C\) with B = 2 and C = 8"):
            inject("kernel", bad)


BOTH = ("kernel", "proposal")


@pytest.mark.parametrize(
    ("site", "sites", "good"),
    [("kernel", BOTH, True), ("late", BOTH, True), ("late", ("kernel",), False),
     ("kernel", ("content",), False), ("content", ("content",), True)],
)  # fmt: skip
def test_sites(site: str, sites: tuple[str, ...], good: bool) -> None:
    if good:
        places(site, sites)
    else:
        with pytest.raises(ValueError, match="site: must be one of first"):
            places(site, sites)
