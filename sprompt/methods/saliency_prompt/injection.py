"""Adds prompts to queries: which prompt a query takes, at which site, and with which probability."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sprompt.methods.saliency_prompt.config import SaliencyPromptConfig
from sprompt.methods.saliency_prompt.prompts import Prompts, Source
from sprompt.ops import prompt_match

LATE = "kernel_late"  # matched at "kernel", added at "proposal"


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on these whole numbers only, such as (seed, step)."""
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def check_site(site: str, sites: Sequence[str]) -> None:
    """Raises ValueError if a model does not have this site."""
    late = (LATE,) if {"kernel", "proposal"} <= set(sites) else ()
    if site not in (*sites, *late):
        raise ValueError(f"site: must be one of the model's ({', '.join((*sites, *late))}), got {site!r}")


class Injection:
    """The `Prompter` of one batch: it adds a prompt to each query at one site.

    A query that drops its prompt is unchanged; so is a query of an image without prompts. The dropped prompts depend on the
    seed, the step and the image only, and the random permutation on the seed and the step only. So the result is the same for
    every split of a batch over processes.

    After the forward pass `index` (B, N) holds the prompt of each query, -1 for none; `monitors()` summarises it.
    """

    def __init__(
        self, prompts: Source, config: SaliencyPromptConfig, image_ids: Sequence[int], *, seed: int, step: int
    ) -> None:
        self.source, self.config, self.image_ids = prompts, config, image_ids
        self.prompts: Prompts | None = prompts if isinstance(prompts, Prompts) else None
        self.seed, self.step = seed, step
        self.index: Tensor | None = None  # (B, N) int64
        self._ratio: Tensor | None = None

    def __call__(self, site: str, queries: Tensor, features: Tensor | None = None) -> Tensor:
        matched_at, added_at = ("kernel", "proposal") if self.config.site == LATE else (self.config.site,) * 2
        if self.config.assign == "none" or site not in (matched_at, added_at):
            return queries
        if self.prompts is None:
            self.prompts = self._read(site, features)
        vectors, counts = self.prompts
        if queries.dim() != 3 or queries.shape[0] != len(counts) or queries.shape[2] != vectors.shape[2]:
            raise ValueError(
                f"{site}: queries must have shape (B, N, C) with B = {len(counts)} and C = {vectors.shape[2]}, "
                f"got {tuple(queries.shape)}; expand queries that all images share, and drop 1x1 axes"
            )
        prompted = queries
        if site == added_at and self.config.ratio is not None:
            self.prompts = self.prompts._replace(vectors=_lengthened(vectors, queries, self.config.ratio))
        if site == matched_at:
            prompted = self._match(queries)
        if site == added_at:
            assert self.index is not None
            if added_at != matched_at:
                prompted = queries + self._taken(self.index).to(queries.dtype)
            self._ratio = self._ratio_of(self.index, queries)
        return prompted if site == added_at else queries

    def _read(self, site: str, features: Tensor | None) -> Prompts:
        assert callable(self.source)
        if features is None:
            raise ValueError(
                f"{site}: the model must hand its prompter the map that queries act on; else choose another level"
            )
        return self.source(features.detach())

    def _match(self, queries: Tensor) -> Tensor:
        """The prompted queries; sets `index`."""
        assert self.prompts is not None
        order = generator(self.seed, self.step, device=queries.device) if self.config.assign == "random" else None
        prompted, index = prompt_match(
            queries, self.prompts.vectors, self.prompts.counts, assign=self.config.assign, generator=order
        )
        prompted = prompted.to(queries.dtype)
        if self.config.dropout > 0:
            keep = self._keep(queries.shape[1]).to(queries.device, non_blocking=True)
            prompted, index = torch.where(keep[..., None], prompted, queries), torch.where(keep, index, -1)
        self.index = index
        return prompted

    def _keep(self, number: int) -> Tensor:
        """(B, N) bool, drawn image by image."""
        draws = number if self.config.dropout_of == "query" else 1
        drawn = [torch.rand(draws, generator=generator(self.seed, self.step, image_id)) for image_id in self.image_ids]
        keep = torch.stack(drawn) >= self.config.dropout if drawn else torch.empty(0, draws, dtype=torch.bool)
        return keep.expand(-1, number)

    def _taken(self, index: Tensor) -> Tensor:
        """The prompt of each query (B, N, C); 0 for a query without a prompt."""
        assert self.prompts is not None
        vectors = self.prompts.vectors
        if vectors.shape[1] == 0:
            return vectors.new_zeros((*index.shape, vectors.shape[2]))
        taken = vectors.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, vectors.shape[2]))
        return torch.where(index[..., None] >= 0, taken, 0)

    @torch.no_grad()
    def _ratio_of(self, index: Tensor, queries: Tensor) -> Tensor:
        """Mean of ‖prompt‖ / ‖query‖ over the queries with a prompt, in float32."""
        ratio = self._taken(index).float().norm(dim=2) / queries.detach().float().norm(dim=2).clamp(min=1e-8)
        return ratio.sum() / (index >= 0).sum().clamp(min=1)

    @torch.no_grad()
    def monitors(self) -> dict[str, Tensor]:
        """Length of prompts relative to queries, queries for each used prompt, and the share of the prompts that is used."""
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


@torch.no_grad()
def _lengthened(vectors: Tensor, queries: Tensor, ratio: float) -> Tensor:
    """Prompts (B, L, C) of `ratio` times the mean length of their image's queries (B, N, C). Cosine matches do not change."""
    length = queries.detach().float().norm(dim=2).mean(1)[:, None, None]
    return (normalize(vectors.float(), dim=2) * (ratio * length)).to(vectors.dtype)
