from __future__ import annotations

from torch import Tensor, nn

from .catalogue import ModuleFactory


class NormAffine(nn.Module):
    """Mixes in the features normalised, with a gain and a bias of their own."""

    def __init__(self, feature_shape: tuple[int, ...], *, mix: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_shape[-1])
        self.mix = mix

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., F) to (..., F)."""
        out: Tensor = (1 - self.mix) * h + self.mix * self.norm(h)
        return out


FACTORY = ModuleFactory(
    name="norm_affine",
    description="Layer normalisation with gain and bias, mixed into the features.",
    module=NormAffine,
    shape=("*", "F"),
    example=(32,),
    settings={"mix": 0.5},
    bounds={"mix": (0.0, 1.0)},
    risk=0.05,
    tags=("norm",),
)
