"""The interface of a query-based model. A model with all members of `QueryModel` works with every method, the engine and every command.

model = Model(Model.Config(...))
features = features_of(model, images, sizes)    # model.encode, and the sizes of the images before padding
outputs = model.decode(features, prompter)      # at each of the model's sites, the prompter may change the queries
losses = model.losses(outputs, masks, labels, counts)
losses.terms, losses.matched                    # weighted terms; for each stage, the query of each target
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from sprompt.masks import BitMasks, Size
from sprompt.models.registry import ModelConfig


class Features(NamedTuple):
    """Maps of a batch of images, finest first."""

    backbone: list[Tensor]  # C2, C3, C4, C5 of strides 4, 8, 16, 32; each with its own width
    maps: list[Tensor]  # P2, P3, P4, P5 of the same strides; their width is that of the queries
    sizes: Sequence[Size] | None = None  # of each image before padding, from `features_of`; None: there is no padding


class Prompter(Protocol):
    """Changes queries. A model calls it at each of its `sites`, in their order, and goes on with the queries that it returns."""

    def __call__(self, site: str, queries: Tensor, features: Tensor | None = None, /) -> Tensor:
        """queries (B, N, C) -> (B, N, C). `features` (B, C, h, w) is the map that gives masks at this site when it is
        multiplied with the queries, if the model has such a map. The prompter does not change the map."""


class QueryGroup(NamedTuple):
    """Extra queries that a training method sends through the decoder beside the model's own queries. The own queries never
    attend to extra queries, so a model predicts the same with and without groups."""

    content: Tensor  # (B, M, C)
    position: Tensor | None  # (B, M, C), or None for a model without positional queries
    sees: Tensor  # bool (M, N + all groups): the queries that each extra query attends to; the model's N own queries come first
    masks: BitMasks | None = None  # (B, M): the pixels of cross-attention in every layer; None: as for own queries


class Targets(NamedTuple):
    """Labels of a batch, for decoders that use them in training."""

    masks: BitMasks  # (B, G) of the size of the images
    labels: Tensor  # (B, G) int64
    counts: Tensor  # (B,) int64: the first counts[b] targets of image b are real
    groups: Sequence[QueryGroup] = ()


class Slots(NamedTuple):
    """The truth of a group of queries. Each query of the group is a slot: it takes targets of its own class only, and predicts
    objects of one class, whatever class that is."""

    classes: Tensor  # (B, M) int64: the class of each slot
    labels: Tensor  # (B, G) int64: the class of each target
    truth: Tensor  # (B, M) int64: NOTHING, OBJECT, or IF_MATCHED: an object where a target is matched to the slot
    compared: Tensor  # bool (B, G): targets whose mask is compared with that of their slot
    rows: Tensor | None = None  # (B, G) int64: the slot of each target, -1 for none; None: matched anew in every layer


NOTHING, OBJECT, IF_MATCHED = 0, 1, 2


class Matched(NamedTuple):
    """One decoder stage: its output queries, and the query that was matched to each target."""

    kernels: Tensor  # (B, N, C), with gradient
    rows: Tensor  # (B, G) int64, -1 for a target without a query


class Losses(NamedTuple):
    terms: dict[str, Tensor]  # scalars, weighted; the loss is their sum
    matched: list[Matched]  # one entry a decoder stage, in order


class Prediction(NamedTuple):
    """Results of one image by decreasing score."""

    masks: BitMasks  # (K,) of the picture's size
    scores: Tensor  # (K,) float32
    labels: Tensor  # (K,) int64


class ParameterGroup(NamedTuple):
    """Parameters with their own factors on learning rate and weight decay."""

    parameters: list[nn.Parameter]
    rate: float = 1.0  # factor on the learning rate
    decay: float = 1.0  # factor on the weight decay


@runtime_checkable
class QueryModel(Protocol):
    Config: ClassVar[type[ModelConfig]]  # a frozen dataclass; the constructor takes an instance of it and nothing else
    config: ModelConfig
    sites: Sequence[str]  # where queries can be prompted, in the order of the forward pass, e.g. ("kernel", "proposal")
    channels: int  # width of the queries and of `Features.maps`
    num_classes: int
    num_queries: int  # largest number of masks in an image
    backbone: nn.Module  # the first part of `encode`; `backbone.channels` are the widths of `Features.backbone`

    def encode(self, images: Tensor) -> Features:
        """Backbone and neck of images (B, 3, H, W), normalised, H and W multiples of 32."""

    def decode(self, features: Features, prompter: Prompter | None = None, targets: Targets | None = None) -> Any:
        """The model's outputs, in any form that the methods below take. `targets` are given in training only."""

    def losses(self, outputs: Any, masks: BitMasks, labels: Tensor, counts: Tensor) -> Losses:
        """Loss terms against masks (B, G) of the size of the images, labels (B, G) and counts (B,)."""

    def predictions(
        self, outputs: Any, input_size: Size, sizes: Sequence[Size], original_sizes: Sequence[Size], *,
        threshold: float = 0.5, max_per_image: int = 100,
    ) -> list[Prediction]:  # fmt: skip
        """Results at the pictures' own sizes. `sizes` are the sizes of the images before they were padded to `input_size`."""

    def mask_logits(self, outputs: Any) -> Tensor:
        """(B, N, h, w): the last mask of each query, before the sigmoid."""

    def reset_classifier(self, num_classes: int) -> None:
        """Makes fresh classification layers for this number of classes and updates `config`. Make the optimiser after this
        call."""

    def freeze_backbone(self, stages: int) -> None:
        """Freezes this many stages (ModelConfig.frozen_stages), makes the others trainable and updates `config`. Make the
        optimiser after this call."""

    def parameter_groups(self) -> Iterable[ParameterGroup]:
        """Parameters with factors of their own. All other parameters have factors of 1."""


@runtime_checkable
class GroupModel(QueryModel, Protocol):
    """A model that can train with groups of extra queries (`Targets.groups`), and that has one class."""

    def learned_queries(self) -> tuple[Tensor, Tensor]:
        """Content and positions of the learned queries, (N, C) each, with gradient."""

    def group_states(self, outputs: Any, group: int) -> Tensor:
        """(B, M, C): the queries of a group behind the last layer."""

    def group_losses(
        self, outputs: Any, group: int, masks: BitMasks, counts: Tensor, slots: Slots
    ) -> dict[str, Tensor]:
        """Weighted terms (class, mask, dice) of a group, over all layers, against masks (B, G) of the size of the images."""


def checked_model(model: nn.Module) -> nn.Module:
    """Returns the model if it is an nn.Module with all members of `QueryModel`. Raises TypeError otherwise."""
    members = [
        *QueryModel.__annotations__,
        *(n for n, v in vars(QueryModel).items() if callable(v) and not n.startswith("_")),
    ]
    missing = [name for name in members if not hasattr(model, name)]
    if missing or not isinstance(model, nn.Module):
        lack = f"one without {', '.join(missing)}" if missing else "something else"
        raise TypeError(
            f"model: must be an nn.Module with all of sprompt.models.protocol.QueryModel, got {type(model).__name__}, {lack}"
        )
    return model


def features_of(model: QueryModel, images: Tensor, sizes: Sequence[Size]) -> Features:
    """The features of padded images. Models whose queries have boxes read the sizes before padding from them."""
    return model.encode(images)._replace(sizes=sizes)


def prompted(name: str, prompter: Prompter | None, site: str, queries: Tensor) -> Tensor:
    """What a prompter makes of the queries (B, N, C) at a site; the queries themselves without a prompter. Raises ValueError, in the name
    of a model, for another shape."""
    if prompter is None:
        return queries
    found = prompter(site, queries)
    if found.shape != queries.shape:
        raise ValueError(
            f"{name}: the prompter must return queries of shape {tuple(queries.shape)}, got {tuple(found.shape)}"
        )
    return found


def refuse_groups(name: str, targets: Targets | None) -> None:
    """Raises ValueError, in the name of a model that cannot train with groups of extra queries, if there are any."""
    if targets is not None and targets.groups:
        raise ValueError(
            f"{name}: targets.groups must be empty, got groups of queries; train a model that takes extra queries"
        )


def check_images(name: str, images: Tensor) -> None:
    """Raises ValueError, in the name of a model, for images that its `encode` cannot take."""
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % 32 or images.shape[3] % 32:
        raise ValueError(
            f"{name}: images must have shape (B, 3, H, W) with H and W multiples of 32, got {tuple(images.shape)}; pad them on "
            "the right and below"
        )
