"""Adds prompts to queries: which prompt a query takes, at which site, and with which probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sprompt.methods.saliency_prompt.config import SaliencyPromptConfig
from sprompt.methods.saliency_prompt.prompts import Prompts
from sprompt.ops import prompt_match
from sprompt.seeding import generator


def places(site: str, sites: Sequence[str]) -> tuple[str, str]:
    """The model's sites at which prompts are matched and added, by the setting `site`. Raises ValueError for a site it does not have."""
    if site == "first" and sites:
        return sites[0], sites[0]
    if site == "late" and len(sites) > 1:
        return sites[0], sites[1]
    if site not in sites:
        known = ("first", *(("late",) if len(sites) > 1 else ()), *sites)
        raise ValueError(f"site: must be one of {', '.join(known)}, the sites of this model, got {site!r}")
    return site, site


class Injection:
    """The `Prompter` of one batch: adds to the queries at one site the prompt that each of them takes.

    A query that drops its prompt, or whose image has no prompt, stays unchanged. The seed, the step and the image alone determine which
    queries drop theirs; the seed and the step determine a drawn permutation. So every way to split a batch over processes gives the
    same result.

    After the forward pass `index` (B, N) holds the prompt of each query, -1 for none, and `monitors()` describes the match.

    Args:
        read: gives the prompts, from the map that queries act on at the site of the match.
        sites: those of the model.
    """

    def __init__(
        self, read: Callable[[Tensor | None], Prompts], config: SaliencyPromptConfig, image_ids: Sequence[int], *,
        sites: Sequence[str], seed: int, step: int,
    ) -> None:  # fmt: skip
        self.read, self.config, self.image_ids = read, config, image_ids
        self.matched_at, self.added_at = places(config.site, sites)
        self.seed, self.step = seed, step
        self.prompts: Prompts | None = None
        self.index: Tensor | None = None  # (B, N) int64
        self._ratio: Tensor | None = None

    def __call__(self, site: str, queries: Tensor, features: Tensor | None = None) -> Tensor:
        if self.config.assign == "none" or site not in (self.matched_at, self.added_at):
            return queries
        if site == self.matched_at:
            self.prompts = self.read(None if features is None else features.detach())
            self._check(site, queries, self.prompts)
        assert self.prompts is not None
        vectors = self.prompts.vectors
        if site == self.added_at and self.config.ratio is not None:
            vectors = _lengthened(vectors, queries, self.config.ratio)
        if site == self.matched_at:
            prompted, self.index = self._match(queries, vectors, self.prompts.counts)
        else:
            assert self.index is not None
            prompted = queries + _taken(vectors, self.index).to(queries.dtype)
        if site != self.added_at:
            return queries
        self._ratio = _ratio(vectors, self.index, queries)
        return prompted

    def _check(self, site: str, queries: Tensor, prompts: Prompts) -> None:
        batch, width = len(prompts.counts), prompts.vectors.shape[2]
        if queries.dim() != 3 or queries.shape[0] != batch or queries.shape[2] != width:
            raise ValueError(
                f"{site}: queries must have shape (B, N, C) with B = {batch} and C = {width}, "
                f"got {tuple(queries.shape)}; expand queries that all images share, and drop 1x1 axes"
            )

    def _match(self, queries: Tensor, vectors: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The prompted queries, and the prompt of each."""
        order = generator(self.seed, self.step, device=queries.device) if self.config.assign == "random" else None
        keep = self._keep(queries.shape[1]).to(queries.device, non_blocking=True) if self.config.dropout > 0 else None
        prompted, index = prompt_match(queries, vectors, counts, assign=self.config.assign, keep=keep, generator=order)
        return prompted.to(queries.dtype), index

    def _keep(self, number: int) -> Tensor:
        """(B, N) bool, drawn image by image."""
        draws = number if self.config.dropout_of == "query" else 1
        drawn = [torch.rand(draws, generator=generator(self.seed, self.step, image_id)) for image_id in self.image_ids]
        keep = torch.stack(drawn) >= self.config.dropout if drawn else torch.empty(0, draws, dtype=torch.bool)
        return keep.expand(-1, number)

    @torch.no_grad()
    def monitors(self) -> dict[str, Tensor]:
        """The length of prompts relative to queries, the number of queries that share a prompt, and the share of the prompts in use."""
        if self.prompts is None or self.index is None or self._ratio is None:
            return {}
        real = self.prompts.counts.sum()
        number = self.prompts.vectors.shape[1]
        users = self.index.new_zeros((len(self.index), number + 1))
        users.scatter_add_(1, self.index + 1, torch.ones_like(self.index))
        used = (users[:, 1:] > 0).sum()
        return {
            "monitor/prompt_ratio": self._ratio,
            "monitor/kernels_per_prompt": users[:, 1:].sum() / used.clamp(min=1),
            "monitor/prompts_used": used / real.clamp(min=1),
        }


def _lengthened(vectors: Tensor, queries: Tensor, ratio: float) -> Tensor:
    """Prompts (B, L, C) of `ratio` times the mean length of their image's queries (B, N, C). Cosine matches do not change."""
    length = queries.detach().float().norm(dim=2).mean(1)[:, None, None]
    return (normalize(vectors.float(), dim=2) * (ratio * length)).to(vectors.dtype)


def _taken(vectors: Tensor, index: Tensor) -> Tensor:
    """The prompt of each query (B, N, C), 0 where it has none."""
    if vectors.shape[1] == 0:
        return vectors.new_zeros((*index.shape, vectors.shape[2]))
    taken = vectors.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, vectors.shape[2]))
    return torch.where(index[..., None] >= 0, taken, 0)


@torch.no_grad()
def _ratio(vectors: Tensor, index: Tensor, queries: Tensor) -> Tensor:
    """Mean of ‖prompt‖ / ‖query‖ over the queries that took a prompt, in float32."""
    ratio = _taken(vectors, index).float().norm(dim=2) / queries.detach().float().norm(dim=2).clamp(min=1e-8)
    return ratio.sum() / (index >= 0).sum().clamp(min=1)
