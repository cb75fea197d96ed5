"""Dynamic interaction: the features of a box pass two layers that a query makes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


class DynamicInteraction(nn.Module):
    """Features r (M, C, h, w) and queries q (M, C) -> (M, h·w, C), or (M, C) if the number of cells is given.

    [U | V] = dynamic_layer(q), U (C, D) and V (D, C); x = ReLU(norm_out(ReLU(norm_in(r U)) V)), for each cell of r, row by row.
    U and V of all queries are made at once: a block of queries that stays in a cache would read all weights of dynamic_layer again.
    With `cells`, the number of cells, all x of a box become one vector: ReLU(fc_norm(fc_layer(x))), where x is flattened cell by
    cell.
    """

    def __init__(self, channels: int, dynamic: int, cells: int | None = None) -> None:
        super().__init__()
        self.shape = (channels, dynamic)
        self.dynamic_layer = nn.Linear(channels, 2 * channels * dynamic)
        self.norm_in = nn.LayerNorm(dynamic)
        self.norm_out = nn.LayerNorm(channels)
        self.joins = cells is not None
        if cells is not None:
            self.fc_layer = nn.Linear(cells * channels, channels)
            self.fc_norm = nn.LayerNorm(channels)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        first, second = self.dynamic_layer(queries).chunk(2, -1)
        channels, dynamic = self.shape
        x = relu(self.norm_in(features.flatten(2).mT @ first.unflatten(1, (channels, dynamic))), inplace=True)
        x = relu(self.norm_out(x @ second.unflatten(1, (dynamic, channels))), inplace=True)
        return relu(self.fc_norm(self.fc_layer(x.flatten(1))), inplace=True) if self.joins else x
