"""Pre-training: a model learns proposals as labels. Its queries take prompts from them, and its kernels are pulled to their
seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sprompt.data.sample import Batch
from sprompt.methods.saliency_prompt.config import STRIDES, ProposalConfig, SaliencyPromptConfig
from sprompt.methods.saliency_prompt.injection import Injection, places
from sprompt.methods.saliency_prompt.prompts import prompts_of
from sprompt.methods.saliency_prompt.supervision import Projection, kernel_loss, seed_vectors, target_cosine
from sprompt.methods.supervised import summed
from sprompt.models.protocol import Features, Losses, ParameterGroup, QueryModel, Targets, checked_model, features_of


class Pretraining(nn.Module):
    """The task of a model and a proposal file.

    The loss is the model's loss with the proposals as labels of one class, plus kernel supervision. Queries get prompts in
    training mode only. The result of training is `model`; the projection of the seeds and the layer of the prompts are not needed
    afterwards.

    Args:
        model: an nn.Module that is a `QueryModel` of one class.
        config: prompts and kernel supervision.
        proposals: the settings of the proposal file, `ProposalConfig.from_record` of its `info.proposals`.
        seed: seed of all random draws, together with the step and the picture.
    """

    Config = SaliencyPromptConfig

    def __init__(
        self,
        model: nn.Module,
        config: SaliencyPromptConfig | None = None,
        *,
        proposals: ProposalConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = checked_model(model)
        self.config = config = config or SaliencyPromptConfig()
        self.proposals = proposals or ProposalConfig()
        self.seed = seed
        network = self.network
        if network.num_classes != 1:
            raise ValueError(
                f"model: must have 1 class, as proposals have, got {network.num_classes}; set num_classes 1"
            )
        places(config.site, network.sites)  # refuses a site that the model does not have
        if config.freeze_backbone:
            network.freeze_backbone(4)
        self.projection: Projection | None = None
        if config.uses_seeds:
            width = cast(Any, network.backbone).channels[self._level]
            self.projection = Projection(width, network.channels, config.projection, seed)
        self.prompt_layer: nn.Linear | None = None
        if config.level == "C5" and config.assign != "none":
            self.prompt_layer = nn.Linear(cast(Any, network.backbone).channels[-1], network.channels)
        self.train(self.training)

    @staticmethod
    def classes(config: SaliencyPromptConfig, dataset: Any) -> list[str]:
        return ["object"]

    @classmethod
    def on(cls, model: nn.Module, config: SaliencyPromptConfig, dataset: Any, seed: int) -> Pretraining:
        if config.uses_seeds and not dataset.has_seeds:
            raise ValueError(
                "--proposals: the file does not say where the seeds of its masks lay; make it by `sprompt propose`, or give "
                "--method.kernel-weight 0"
            )
        made_with = dataset.info["proposals"] if dataset.has_seeds else {}
        return cls(model, config, proposals=ProposalConfig.from_record(made_with) if made_with else None, seed=seed)

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        return self.network.parameter_groups()

    def watch(self, dataset: Any, augment: Any, out: Path) -> Callable[..., dict[str, float]]:
        """How steadily kernels are matched; see `Stability`."""
        from sprompt.methods.saliency_prompt.stability import Stability

        return Stability(self, dataset, augment, out)

    def train(self, mode: bool = True) -> Pretraining:
        super().train(mode)
        if self.config.freeze_backbone:
            self.network.backbone.eval()
        return self

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its terms and monitors for the log)."""
        model = self.network
        features = features_of(model, batch.images, batch.sizes)
        injection = self.injection(features, batch, step) if self.training else None
        labels = torch.zeros_like(batch.labels)
        outputs = model.decode(features, injection, Targets(batch.masks, labels, batch.counts))
        found: Losses = model.losses(outputs, batch.masks, labels, batch.counts)
        terms, monitors = dict(found.terms), injection.monitors() if injection else {}
        if self.projection is not None:
            terms["kernel"], monitors["monitor/target_cosine"] = self._supervision(features.backbone, batch, found)
        return summed(terms.values()), {name: term.detach() for name, term in terms.items()} | monitors

    def injection(self, features: Features, batch: Batch, step: int) -> Injection | None:
        """The prompter of a batch; None if prompts are off."""
        if self.config.assign == "none":
            return None
        read = prompts_of(batch, features, self.config, self.prompt_layer)
        sites = self.network.sites
        return Injection(read, self.config, batch.image_ids, sites=sites, seed=self.seed, step=step)

    def _supervision(self, backbone: list[Tensor], batch: Batch, found: Losses) -> tuple[Tensor, Tensor]:
        """(weighted loss of the kernels, mean cosine of its targets)."""
        assert self.projection is not None
        level = backbone[self._level]
        if self.training:
            self.projection.fit(level)
        targets = self.projection(seed_vectors(level, batch, self.proposals))
        loss = kernel_loss(
            targets, found.matched, batch.counts,
            reduction=self.config.reduction, release_pairing=self.config.release_pairing,
        )  # fmt: skip
        return self.config.kernel_weight * loss, target_cosine(targets, batch.counts)

    @property
    def network(self) -> QueryModel:
        return cast(QueryModel, self.model)

    @property
    def _level(self) -> int:
        """Index of the seeds' map in the list of the backbone's maps."""
        return list(STRIDES).index(self.proposals.level)
