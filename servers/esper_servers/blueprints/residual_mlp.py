from __future__ import annotations

import torch
from torch import Tensor, nn

from .catalogue import ModuleFactory


class ResidualMLP(nn.Module):
    """Adds a two-layer perceptron of the features to the features."""

    def __init__(self, feature_shape: tuple[int, ...], *, expansion: float) -> None:
        super().__init__()
        features = feature_shape[-1]
        hidden = max(1, int(features * expansion))
        self.norm = nn.LayerNorm(features)
        self.up = nn.Linear(features, hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, features)

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., F) to (..., F)."""
        return torch.add(h, self.down(self.act(self.up(self.norm(h)))))


FACTORY = ModuleFactory(
    name="residual_mlp",
    description="A residual two-layer perceptron over the last dimension.",
    module=ResidualMLP,
    shape=("*", "F"),
    example=(32,),
    settings={"expansion": 4.0},
    bounds={"expansion": (0.25, 8.0)},
    risk=0.15,
    tags=("mlp",),
)
