"""A blueprint in a package of its own: a gain for every feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_servers.blueprints.catalogue import ModuleFactory


class Scale(nn.Module):
    """Multiplies each feature by a learned gain."""

    def __init__(self, feature_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(feature_shape[-1]))

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., F) to (..., F)."""
        return h * self.gain


FACTORY = ModuleFactory(
    name="example_scale", description="A gain for every feature.", module=Scale, shape=("*", "F"), example=(4,)
)
