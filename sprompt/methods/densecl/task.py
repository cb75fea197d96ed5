"""Dense contrastive learning (DenseCL, Wang et al. 2021): a backbone from pictures alone.

The query encoder sees the first view of every picture. The key encoder sees the second view; its weights follow the query
encoder slowly. Each query vector must be closer to its own key than to the keys in a queue of earlier pictures. There is a loss
for whole views, and a loss for the cells of one map. The key of a cell is the most similar cell of the other view, compared in
the backbone's features.

Batch norm of the key encoder uses its running statistics. They follow the query encoder as the weights do. So a key depends on
its own picture only: no information of the batch leaks into it, and batches need not be shuffled between processes.

The queue starts empty. The keys of the batch enter it before queries are compared. A queue of random vectors or of old keys
only has a trivial solution: one vector for all pictures that differs from the queue, or moves away from it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from sprompt.methods.densecl.views import Views
from sprompt.models.backbone import BackboneConfig, Kind, build_backbone
from sprompt.nn.distributed import rank, world
from sprompt.nn.resnet import Variant
from sprompt.settings import check_choices


@dataclass(frozen=True)
class DenseCLConfig:
    """The network and its contrastive loss. The defaults suit a small run; the paper's values are in brackets."""

    backbone: Kind = "resnet"
    """A ResNet, with the three settings that follow, or an EfficientNet-Lite (resnet)."""
    depth: int = 18
    """Layers of the ResNet: 18, 34, 50 or 101 (50)."""
    width: int = 64
    """Channels of the ResNet's stem, at least 1; 64 is the normal network (64)."""
    variant: Variant = "plain"
    """"d" is ResNet-D, with a deep stem and means in its shortcuts; "d-dcn" has deformable convolutions too (plain)."""
    embedding: int = 128
    """Channels of the vectors that are compared, at least 1 (128)."""
    queue: int = 4096
    """Number of keys in the queue, at least the pictures of a batch. Each query is compared with all of them (65536)."""
    momentum: float = 0.99
    """Share of its weights that the key encoder keeps in a step, from 0 to 1. It starts at 0 and rises to this value
    (0.999)."""
    temperature: float = 0.2
    """Divisor of the cosine similarities, above 0. Smaller values give more weight to the closest keys (0.2)."""
    dense_weight: float = 0.5
    """Weight of the loss of cells, from 0 to 1. The loss of whole views has weight 1 minus this (0.5)."""
    dense_level: Literal["C3", "C4", "C5"] = "C5"
    """The backbone's map whose cells are compared, of stride 8, 16 or 32. Take a finer map if views are small (C5)."""
    dense_warmup: int = 0
    """Number of first steps without the loss of cells, at least 0 (0)."""
    seed: int = 0
    """Seed of the initial weights, at least 0."""

    def __post_init__(self) -> None:
        check_choices(type(self), vars(self))
        for name, low, high in (("momentum", 0, 1), ("dense_weight", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: must lie between {low} and {high}, got {getattr(self, name)}")
        for name, least in (("embedding", 1), ("queue", 1), ("dense_warmup", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: must be above 0, got {self.temperature}")


class Heads(nn.Module):
    """C5 (B, D, H, W) -> a vector for the whole view (B, E); the dense map (B, D', H', W') -> a vector for each cell
    (B, E, H', W'). All vectors have length 1."""

    def __init__(self, channels: int, dense_channels: int, embedding: int) -> None:
        super().__init__()
        self.whole = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, embedding))
        self.dense = nn.Sequential(
            nn.Conv2d(dense_channels, dense_channels, 1), nn.ReLU(), nn.Conv2d(dense_channels, embedding, 1)
        )

    def forward(self, last: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.whole(last.mean((2, 3)))
        return normalize(whole.float(), dim=1), normalize(self.dense(features).float(), dim=1)


class DenseCL(nn.Module):
    """(views, step) -> (loss, values to log). The result of training is `backbone`."""

    queue: Tensor  # (K, E) keys of whole views, of length 1; zeros in places that are still empty
    dense_queue: Tensor  # (K, E) keys of the mean of a view's cells
    keys_seen: Tensor  # () int64, number of keys that entered so far; modulo K it is the place of the next key

    def __init__(self, config: DenseCLConfig) -> None:
        super().__init__()
        self.config = config
        self._level = ("C2", "C3", "C4", "C5").index(config.dense_level)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            sizes = BackboneConfig(config.backbone, config.depth, config.width, config.variant)
            self.backbone = build_backbone(sizes, frozen_stages=-1, train_batchnorm=True)
            channels = self.backbone.channels
            self.heads = Heads(channels[-1], channels[self._level], config.embedding)
            for name in ("queue", "dense_queue"):
                self.register_buffer(name, torch.zeros(config.queue, config.embedding))
        self.register_buffer("keys_seen", torch.zeros((), dtype=torch.int64))
        self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.key_heads = copy.deepcopy(self.heads).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> DenseCL:
        super().train(mode)
        self.key_backbone.eval()
        self.key_heads.eval()
        return self

    def forward(self, batch: Views, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """In training the key encoder is updated first, and the keys of the batch enter the queues before the comparison."""
        if self.training:
            self._follow(step)
        maps = self.backbone(batch.first)
        features = maps[self._level]
        whole, cells = self.heads(maps[-1], features)
        with torch.no_grad():
            key_maps = self.key_backbone(batch.second)
            key_whole, key_cells = self.key_heads(key_maps[-1], key_maps[self._level])
            match = correspondence(features, key_maps[self._level])  # (B, HW)
            key_cells = key_cells.flatten(2)
            matched = key_cells.gather(2, match[:, None].expand(-1, key_cells.shape[1], -1))  # (B, E, HW)
            hidden = torch.arange(len(self.queue), device=match.device) >= self.keys_seen  # (K,)
            hidden = hidden.expand(len(batch), -1)
            if self.training:
                hidden = self._enqueue(key_whole, normalize(key_cells.mean(2), dim=1))

        with torch.autocast(batch.first.device.type, enabled=False):
            logits = contrast(whole, key_whole, self.queue, hidden)
            vectors, keys = (x.flatten(2).transpose(1, 2).flatten(0, 1) for x in (cells, matched))  # (B·HW, E)
            dense_logits = contrast(vectors, keys, self.dense_queue, hidden.repeat_interleave(match.shape[1], 0))
            share = self.config.dense_weight if step >= self.config.dense_warmup else 0.0
            terms = {
                "global": (1 - share) * info_nce(logits, self.config.temperature),
                "dense": share * info_nce(dense_logits, self.config.temperature),
            }
        logs = {name: term.detach() for name, term in terms.items()}
        for name, compared in (("global", logits), ("dense", dense_logits)):
            logs[f"monitor/{name}_accuracy"] = (compared.detach().argmax(1) == 0).float().mean()
        # 1 if all vectors of a batch are equal: the encoder has collapsed
        logs["monitor/alikeness"] = whole.detach().mean(0).square().sum()
        return terms["global"] + terms["dense"], logs

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        """key = m · key + (1 - m) · query, for weights and running statistics. At step 0 m is 0: the key encoder is a copy."""
        momentum = min(self.config.momentum, step / (step + 10))
        for key, query in ((self.key_backbone, self.backbone), (self.key_heads, self.heads)):
            for old, new in zip(key.state_dict().values(), query.state_dict().values(), strict=True):
                if old.is_floating_point():
                    old.lerp_(new, 1 - momentum)
                else:
                    old.copy_(new)  # counters of batch norm

    @torch.no_grad()
    def _enqueue(self, whole: Tensor, dense: Tensor) -> Tensor:
        """Replaces the oldest keys by the keys of all processes.

        Returns (B, K) bool, true for places that are no negatives of a query of this process: the place of its own key, and
        places that are still empty.
        """
        size, own = len(self.queue), len(whole)
        whole, dense = _gathered(whole), _gathered(dense)
        if len(whole) > size:
            raise ValueError(
                f"queue: must hold at least a batch, got {size} places for {len(whole)} pictures; raise queue"
            )
        places = (self.keys_seen + torch.arange(len(whole), device=whole.device)) % size
        self.queue.index_copy_(0, places, whole)
        self.dense_queue.index_copy_(0, places, dense)
        self.keys_seen += len(whole)
        index = torch.arange(size, device=whole.device)
        return (index >= self.keys_seen) | (index == places[rank() * own :][:own, None])


def correspondence(features: Tensor, key_features: Tensor) -> Tensor:
    """For each cell of (B, D, H, W) the index of the cell of (B, D, H', W') with the highest cosine: (B, HW) int64.

    Among equal cosines the first cell counts.
    """
    queries, keys = (normalize(x.detach().float().flatten(2), dim=1) for x in (features, key_features))
    return torch.einsum("bdi,bdj->bij", queries, keys).argmax(2)


def contrast(queries: Tensor, keys: Tensor, queue: Tensor, hidden: Tensor) -> Tensor:
    """Similarities (n, 1 + K) of queries (n, E): first with their own keys (n, E), then with the queue (K, E).

    They are -inf where `hidden` (n, K) is true.
    """
    others = (queries @ queue.T).masked_fill(hidden, -torch.inf)
    return torch.cat(((queries * keys).sum(1, keepdim=True), others), 1)


def info_nce(similarities: Tensor, temperature: float) -> Tensor:
    """The mean over rows of −log softmax(similarities / temperature) at column 0."""
    own = torch.zeros(len(similarities), dtype=torch.int64, device=similarities.device)
    return cross_entropy(similarities / temperature, own)


def _gathered(keys: Tensor) -> Tensor:
    """Keys (n, E) of every process, by rank; n must be the same in every process."""
    if world() == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(world())]
    dist.all_gather(parts, keys.contiguous())
    return torch.cat(parts)
