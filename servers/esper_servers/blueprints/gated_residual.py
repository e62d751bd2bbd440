from __future__ import annotations

import torch
from torch import Tensor, nn

from .catalogue import ModuleFactory


class GatedResidual(nn.Module):
    """Adds a candidate, weighed feature by feature by a gate (the highway idea, arXiv 1505.00387)."""

    def __init__(self, feature_shape: tuple[int, ...], *, gate_bias: float) -> None:
        super().__init__()
        features = feature_shape[-1]
        self.candidate = nn.Linear(features, features)
        self.act = nn.GELU()
        self.gate = nn.Linear(features, features)
        nn.init.constant_(self.gate.bias, gate_bias)

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., F) to (..., F)."""
        out: Tensor = h + torch.sigmoid(self.gate(h)) * self.act(self.candidate(h))
        return out


FACTORY = ModuleFactory(
    name="gated_residual",
    description="A gated residual layer over the last dimension.",
    module=GatedResidual,
    shape=("*", "F"),
    example=(32,),
    settings={"gate_bias": 0.0},
    bounds={"gate_bias": (-4.0, 4.0)},
    risk=0.1,
    tags=("mlp", "gate"),
)
