from __future__ import annotations

import torch
from torch import Tensor, nn

from .catalogue import ModuleFactory


class SqueezeExcite(nn.Module):
    """Scales channels by a gate computed from their means (Hu et al. 2017, arXiv 1709.01507)."""

    def __init__(self, feature_shape: tuple[int, ...], *, reduction: float) -> None:
        super().__init__()
        channels = feature_shape[0]
        narrow = max(1, int(channels / reduction))
        self.squeeze = nn.Linear(channels, narrow)
        self.act = nn.ReLU()
        self.excite = nn.Linear(narrow, channels)

    def forward(self, h: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        gate = torch.sigmoid(self.excite(self.act(self.squeeze(h.mean(dim=(2, 3))))))
        return 2 * h * gate[:, :, None, None]


FACTORY = ModuleFactory(
    name="squeeze_excite",
    description="A gate on every channel of a feature map.",
    module=SqueezeExcite,
    shape=("C", "H", "W"),
    example=(16, 8, 8),
    settings={"reduction": 4.0},
    bounds={"reduction": (1.0, 32.0)},
    risk=0.1,
    tags=("conv", "gate"),
)
