from __future__ import annotations

from torch import Tensor, nn

from .catalogue import ModuleFactory


class BottleneckAdapter(nn.Module):
    """Squeezes the features through a narrow layer and adds the result (Houlsby et al. 2019, arXiv 1902.00751)."""

    def __init__(self, feature_shape: tuple[int, ...], *, reduction: float) -> None:
        super().__init__()
        features = feature_shape[-1]
        narrow = max(1, int(features / reduction))
        self.norm = nn.LayerNorm(features)
        self.down = nn.Linear(features, narrow)
        self.act = nn.ReLU()
        self.up = nn.Linear(narrow, features)

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., F) to (..., F)."""
        out: Tensor = h + self.up(self.act(self.down(self.norm(h))))
        return out


FACTORY = ModuleFactory(
    name="bottleneck_adapter",
    description="A narrow residual adapter over the last dimension.",
    module=BottleneckAdapter,
    shape=("*", "F"),
    example=(32,),
    settings={"reduction": 2.0},
    bounds={"reduction": (1.0, 16.0)},
    risk=0.05,
    tags=("adapter", "mlp"),
)
