"""For DistributedDataParallel, which waits for a gradient of every parameter of the host in every step."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _Tie(torch.autograd.Function):
    """Forwards the mixture, and gives h a gradient of zero."""

    @staticmethod
    def forward(_ctx: Any, mixed: Tensor, _h: Tensor) -> Tensor:
        # A view would forbid what often follows, an in-place activation.
        return mixed.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.zeros_like(gradient)


def tie(mixed: Tensor, h: Tensor) -> Tensor:
    """Return the mixture bit for bit; the graph still leads to h, whose gradient is zero."""
    return cast("Tensor", _Tie.apply(mixed, h))  # type: ignore[no-untyped-call]
