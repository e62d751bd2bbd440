"""How the output of a seed meets the output of its host. h is the host's feature map, s the seed's, of one shape.

What derives from Mixing is plain torch, so that torch.fx can write it into an export without this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from esper_rpc.blending import CHANNEL, CONFIDENCE, RESIDUAL

from .config import BlendConfig

_LEAST_SQUARE = 1e-24
_PART = 2**16


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


class Mixing(nn.Module):
    """One of the modes: CONVEX, alpha·s + (1 - alpha)·h, unless a subclass says otherwise."""

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """Mix at full alpha, as a fossil does."""
        return s

    def at(self, alpha: Tensor, h: Tensor, s: Tensor) -> Tensor:
        """Mix at an alpha from 0, which gives h, to 1, which gives what `forward` does."""
        return torch.lerp(h, s, alpha.to(h.dtype))

    def nothing(self, h: Tensor) -> Tensor:
        """Return what a seed would give to leave h as it is."""
        return h


class Residual(Mixing):
    """h + alpha·s."""

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """Mix at full alpha."""
        return h + s

    def at(self, alpha: Tensor, h: Tensor, s: Tensor) -> Tensor:
        """Mix at an alpha."""
        return torch.addcmul(h, s, alpha.to(h.dtype))

    def nothing(self, h: Tensor) -> Tensor:
        """Return zero."""
        return h.new_zeros(())


class _Shared(Mixing):
    """Convex by a share of the seed that is not the same everywhere; alpha scales it."""

    def share(self, h: Tensor, s: Tensor) -> Tensor:
        """Return the share at full alpha, from 0 to 1, in a shape that broadcasts to that of h."""
        raise NotImplementedError

    def forward(self, h: Tensor, s: Tensor) -> Tensor:
        """Mix at full alpha."""
        return torch.lerp(h, s, self.share(h, s).to(h.dtype))

    def at(self, alpha: Tensor, h: Tensor, s: Tensor) -> Tensor:
        """Mix at an alpha."""
        return torch.lerp(h, s, (alpha * self.share(h, s)).to(h.dtype))


class Channel(_Shared):
    """A share for each channel, or each group of neighbouring channels."""

    shares: Tensor

    def __init__(self, alpha_vec: tuple[float, ...], *, channels: int, dim: int, dims: int) -> None:
        super().__init__()
        shares = torch.tensor(alpha_vec).repeat_interleave(channels // len(alpha_vec))
        self.register_buffer("shares", shares if dim == -1 else shares.reshape(-1, *[1] * (dims - 2)))

    def share(self, h: Tensor, s: Tensor) -> Tensor:
        """Return the vector."""
        return self.shares


class Confidence(_Shared):
    """A gate at each position, sigmoid(k·(signal - tau)) within bounds.

    The signal goes from 0 to 1. For a classifier it is the margin between the two greatest probabilities of the seed;
    for other maps, how little the seed changes h there, |h| / (|h| + |s - h|). No gradient goes through the gate: a
    seed should learn to be right, not to look sure.
    """

    def __init__(self, config: BlendConfig, *, dim: int, is_classifier: bool) -> None:
        super().__init__()
        self.k, self.tau, self.lo, self.hi = config.gate_k, config.gate_tau, config.alpha_lo, config.alpha_hi
        self.dim, self.is_classifier = dim, is_classifier

    def share(self, h: Tensor, s: Tensor) -> Tensor:
        """Return the gate, in float32."""
        h, s = h.detach(), s.detach()
        return self._gate(self._margin(s) if self.is_classifier else _stability(*self._squares(h, s)))

    def at(self, alpha: Tensor, h: Tensor, s: Tensor) -> Tensor:
        """Mix at an alpha."""
        if self.is_classifier:
            return super().at(alpha, h, s)
        # As in `share`, which an export can follow; by parts it takes half as long.
        parts = [self._squares(*part) for part in _parts(h.detach(), s.detach())]
        before, change = (torch.cat(squares) for squares in zip(*parts, strict=True))
        return torch.lerp(h, s, (alpha * self._gate(_stability(before, change))).to(h.dtype))

    def _gate(self, signal: Tensor) -> Tensor:
        # What overflows even float32 opens no gate.
        return torch.sigmoid(self.k * (torch.nan_to_num(signal, nan=0.0) - self.tau)).clamp(self.lo, self.hi)

    def _margin(self, s: Tensor) -> Tensor:
        best: Tensor = torch.softmax(s.float(), self.dim).topk(2, self.dim).values
        return best.narrow(self.dim, 0, 1) - best.narrow(self.dim, 1, 1)

    def _squares(self, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squares of |h| and of |s - h| at each position."""
        # float16 has no room for the sum of squares.
        h, s = h.float(), s.float()
        # Over the channels of an image vector_norm takes thirteen times as long.
        return (h * h).sum(self.dim, keepdim=True), mse_loss(s, h, reduction="none").sum(self.dim, keepdim=True)


def _stability(before: Tensor, change: Tensor) -> Tensor:
    return (change / (before + _LEAST_SQUARE)).sqrt().add(1.0).reciprocal()


def _parts(h: Tensor, s: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Divide two maps by samples into what the cache of a processor holds, so that a sum finds the squares there."""
    if h.device.type != "cpu" or h.numel() <= _PART:
        return [(h, s)]
    count = math.ceil(h.numel() / _PART)
    return zip(h.chunk(count), s.chunk(count), strict=True)


class Blend(nn.Module):
    """Mixes a seed in while it is on trial. Alpha is a buffer and changes in place, whatever was compiled around it."""

    alpha: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.zeros(()))
        self.mixing = Mixing()

    def forward(self, h: Tensor, s: Tensor, is_finite: Tensor | None = None) -> Tensor:
        """Mix s into h; where s is not finite, h alone. None says that it is finite everywhere."""
        h = h.detach()
        # The backward pass needs the alpha of this one, and may come after it has changed.
        alpha = self.alpha.clone()
        # The product is taken after the choice, so that no NaN reaches the gradient either.
        return self.mixing.at(alpha, h, s if is_finite is None else torch.where(is_finite, s, self.mixing.nothing(h)))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # It moves with its model, and is not cast with it: bfloat16 would round alpha to one part in 256.
        super()._apply(lambda buffer: buffer.to(fn(buffer).device), recurse)  # type: ignore[no-untyped-call]
        return self


def mixing_of(config: BlendConfig, *, channels: int, dim: int, dims: int, is_classifier: bool) -> Mixing:
    """Make what a configuration asks for, for maps of so many dimensions, of which `dim` holds the channels."""
    if config.mode == RESIDUAL:
        return Residual()
    if config.mode == CHANNEL:
        return Channel(config.alpha_vec, channels=channels, dim=dim, dims=dims)
    if config.mode == CONFIDENCE:
        return Confidence(config, dim=dim, is_classifier=is_classifier)
    return Mixing()
