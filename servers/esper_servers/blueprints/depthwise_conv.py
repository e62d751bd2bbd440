from __future__ import annotations

from torch import Tensor, nn

from .catalogue import ModuleFactory


class DepthwiseConv(nn.Module):
    """Adds a depthwise and a pointwise convolution of the feature map to it."""

    def __init__(self, feature_shape: tuple[int, ...], *, kernel_size: float) -> None:
        super().__init__()
        channels, size = feature_shape[0], int(kernel_size)
        self.depthwise = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
        self.act = nn.GELU()
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        out: Tensor = h + self.pointwise(self.act(self.depthwise(h)))
        return out


FACTORY = ModuleFactory(
    name="depthwise_conv",
    description="A residual depthwise separable convolution.",
    module=DepthwiseConv,
    shape=("C", "H", "W"),
    example=(16, 8, 8),
    settings={"kernel_size": 3.0},
    bounds={"kernel_size": (1.0, 7.0)},
    risk=0.15,
    tags=("conv",),
)
