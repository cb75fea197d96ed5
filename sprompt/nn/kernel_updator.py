"""The kernel updator: a gated sum of kernels and of the features pooled under their masks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


class KernelUpdator(nn.Module):
    """Pooled features u and kernels k, both (..., C) -> updated kernels (..., C).

    [p_g, p_v] = dynamic_layer(u), [q_g, q_v] = input_layer(k), g = p_g ⊙ q_g;
    α = σ(input_norm_in(input_gate(g))), β = σ(norm_in(update_gate(g)));
    ReLU(fc_norm(fc_layer(β ⊙ norm_out(p_v) + α ⊙ input_norm_out(q_v)))).
    Names with "input" belong to the kernels, the others to the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dynamic_layer = nn.Linear(channels, 2 * channels)
        self.input_layer = nn.Linear(channels, 2 * channels)
        self.input_gate = nn.Linear(channels, channels)
        self.update_gate = nn.Linear(channels, channels)
        self.norm_in = nn.LayerNorm(channels)
        self.norm_out = nn.LayerNorm(channels)
        self.input_norm_in = nn.LayerNorm(channels)
        self.input_norm_out = nn.LayerNorm(channels)
        self.fc_layer = nn.Linear(channels, channels)
        self.fc_norm = nn.LayerNorm(channels)

    def forward(self, pooled: Tensor, kernels: Tensor) -> Tensor:
        feature_gate, feature_value = self.dynamic_layer(pooled).chunk(2, dim=-1)
        kernel_gate, kernel_value = self.input_layer(kernels).chunk(2, dim=-1)
        gate = kernel_gate * feature_gate
        alpha = self.input_norm_in(self.input_gate(gate)).sigmoid()
        beta = self.norm_in(self.update_gate(gate)).sigmoid()
        mixed = beta * self.norm_out(feature_value) + alpha * self.input_norm_out(kernel_value)
        return relu(self.fc_norm(self.fc_layer(mixed)))
