"""How the output of a seed meets the output of its host. h is the host's feature map, s the seed's, of one shape."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


class _Shadow(torch.autograd.Function):
    """Forwards h untouched and gives the gradient to both, so that the seed learns and the output stays the host's."""

    @staticmethod
    def forward(_ctx: Any, h: Tensor, _s: Tensor) -> Tensor:
        # A view would forbid what often follows, an in-place activation.
        return h.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient


def shadow(h: Tensor, s: Tensor) -> Tensor:
    """Return h bit for bit; s gets the gradient that h gets."""
    return cast("Tensor", _Shadow.apply(h, s))  # type: ignore[no-untyped-call]


def convex(h: Tensor, s: Tensor, alpha: float) -> Tensor:
    """alpha·s + (1 - alpha)·h with h detached; where s is not finite, h alone."""
    h = h.detach()
    # The product is taken after the choice, so that no NaN reaches the gradient either.
    s = torch.where(torch.isfinite(s), s, h)
    return s if alpha >= 1.0 else alpha * s + (1.0 - alpha) * h
