from __future__ import annotations

from torch import Tensor, nn

from .catalogue import ModuleFactory


class LoraLinear(nn.Module):
    """Adds a linear map of low rank (Hu et al. 2021, arXiv 2106.09685).

    The second factor starts small instead of at zero, so that both factors get a gradient from the first step.
    """

    def __init__(self, feature_shape: tuple[int, ...], *, rank: float, scale: float) -> None:
        super().__init__()
        features = feature_shape[-1]
        self.reduce = nn.Linear(features, max(1, int(rank)), bias=False)
        self.expand = nn.Linear(max(1, int(rank)), features, bias=False)
        nn.init.normal_(self.expand.weight, std=0.02)
        self.scale = scale

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., F) to (..., F)."""
        out: Tensor = h + self.scale * self.expand(self.reduce(h))
        return out


FACTORY = ModuleFactory(
    name="lora_linear",
    description="A residual linear map of low rank.",
    module=LoraLinear,
    shape=("*", "F"),
    example=(32,),
    settings={"rank": 8.0, "scale": 1.0},
    bounds={"rank": (1.0, 256.0), "scale": (0.0, 4.0)},
    risk=0.05,
    tags=("adapter", "linear"),
)
