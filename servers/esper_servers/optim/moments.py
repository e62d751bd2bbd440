"""What an optimizer remembers of a parameter, brought to another shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

PLAIN_MOMENTUM: Final = "momentum_buffer"
"""How torch names the momentum of SGD and RMSprop."""
PLAIN_MOMENTUM_SHARE: Final = 0.1
"""The share of their mean with which new rows of a plain momentum begin."""


def carried_over(state: Mapping[str, Any], old: Tensor, new: Tensor) -> dict[str, Any] | None:
    """Return the state of one parameter for another in its place; None where its parts have shapes of their own.

    Counters stay. A part shaped like the parameter is transformed: see `transformed`.
    """
    found: dict[str, Any] = {}
    for name, part in state.items():
        if isinstance(part, Tensor) and part.shape == old.shape and part.dim() > 0:
            share = PLAIN_MOMENTUM_SHARE if name == PLAIN_MOMENTUM else 1.0
            found[name] = transformed(part, new.shape, fill_share=share).to(device=new.device)
        elif not isinstance(part, Tensor) or part.numel() == 1:
            found[name] = part.clone() if isinstance(part, Tensor) else part
        else:
            return None
    return found


def transformed(values: Tensor, shape: torch.Size, *, fill_share: float = 1.0) -> Tensor:
    """Bring values to a shape: identity, expand, contract or reshape, whichever it takes.

    - Identity: a copy.
    - Expand, where no side is shorter: old values keep their place, new ones are the mean times `fill_share`.
    - Contract, where no side is longer: the leading part.
    - Reshape, where neither: linear interpolation along each side, or along all values where sides come or go.

    No value that comes out lies outside the old ones and the fill, so a second moment stays above zero.
    """
    if values.shape == shape:
        return values.clone()
    if values.dim() == len(shape) and all(new >= old for old, new in zip(values.shape, shape, strict=True)):
        return _expanded(values, shape, fill_share)
    if values.dim() == len(shape) and all(new <= old for old, new in zip(values.shape, shape, strict=True)):
        return values[_leading(shape)].clone()
    return _interpolated(values, shape)


def _expanded(values: Tensor, shape: torch.Size, fill_share: float) -> Tensor:
    mean = values.mean() * fill_share if values.numel() else values.new_zeros(())
    found = mean.expand(shape).clone()
    found[_leading(values.shape)] = values
    return found


def _leading(shape: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(0, side) for side in shape)


def _interpolated(values: Tensor, shape: torch.Size) -> Tensor:
    if values.dim() != len(shape):
        return _along(values.reshape(1, -1), shape.numel()).reshape(shape)
    for axis, side in enumerate(shape):
        if values.shape[axis] != side:
            moved = values.movedim(axis, -1)
            values = _along(moved.reshape(-1, moved.shape[-1]), side).reshape(*moved.shape[:-1], side).movedim(-1, axis)
    return values.contiguous()


def _along(rows: Tensor, side: int) -> Tensor:
    if not rows.numel() or not side:
        return rows.new_zeros((rows.shape[0], side))
    # Not every device interpolates half precision.
    found = functional.interpolate(rows[None].float(), size=side, mode="linear", align_corners=True)[0]
    return found.to(rows.dtype)
