from __future__ import annotations

from torch import Tensor, nn

from .catalogue import ModuleFactory


class AttentionAdapter(nn.Module):
    """Adds self-attention over the sequence to it."""

    def __init__(self, feature_shape: tuple[int, ...], *, heads: float) -> None:
        super().__init__()
        features = feature_shape[-1]
        count = next(n for n in range(min(int(heads), features), 0, -1) if features % n == 0)
        self.norm = nn.LayerNorm(features)
        self.attention = nn.MultiheadAttention(features, count, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        """Map (N, T, F) to the same shape."""
        x = self.norm(h)
        out: Tensor = h + self.attention(x, x, x, need_weights=False)[0]
        return out


FACTORY = ModuleFactory(
    name="attention_adapter",
    description="Residual self-attention over a sequence.",
    module=AttentionAdapter,
    shape=("T", "F"),
    example=(8, 32),
    settings={"heads": 2.0},
    bounds={"heads": (1.0, 16.0)},
    risk=0.25,
    tags=("attention", "adapter"),
)
