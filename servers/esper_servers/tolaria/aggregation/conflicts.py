"""What is done with a gradient that pulls against another one. Gradients are lists with one entry per parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]
"""None where a loss does not reach a parameter, which counts as zero."""

_Squares = dict[int, Tensor]
"""The squared norms of the gradients of parameters, by the place of the parameter."""

PCGRAD, AVERAGE, PRIORITY, KEEP = "pcgrad", "average", "priority", "keep"
"""How a conflict is settled, see `settle`."""
WAYS: Final = (PCGRAD, AVERAGE, PRIORITY, KEEP)
EPSILON: Final = 1e-8
"""Added to the squared norm that a projection divides by."""


class Angle(NamedTuple):
    """How a gradient lies to a reference, over the parameters that both reach."""

    dot: float
    squared: float
    """The squared norm of the gradient there."""
    reference_squared: float
    is_finite: bool
    """Whether every number of the gradient is one, wherever it reaches."""

    @property
    def cosine(self) -> float:
        """From -1, opposed, to 1; 0 where either is zero."""
        length = math.sqrt(self.squared) * math.sqrt(self.reference_squared)
        return self.dot / length if length > 0 else 0.0


def angles(gradients: Sequence[Gradients], reference: Gradients, *, shared: int) -> tuple[list[Angle], bool]:
    """Compare gradients with a reference over the first `shared` parameters, and tell whether that is finite itself.

    Reads from the device once, unless something is not finite.
    """
    squares = _squares(reference)
    rows = [row for each in gradients for row in _measured(each, reference, squares, shared)]
    *numbers, overall = _read([*rows, _sum(list(squares.values()))])
    found = zip(gradients, *(numbers[part::4] for part in range(4)), strict=True)
    # Squares overflow long before the numbers themselves.
    lying = [Angle(dot, own, other, math.isfinite(whole) or is_finite(each)) for each, dot, own, other, whole in found]
    return lying, math.isfinite(overall) or is_finite(reference)


def is_finite(gradient: Gradients) -> bool:
    """Whether every number is one."""
    return math.isfinite(float(_largest([each for each in gradient if each is not None])))


def settle(way: str, gradient: list[Tensor | None], reference: Gradients, angle: Angle, *, shared: int) -> bool:
    """Settle a conflict, in place; False when the gradient is to be left out.

    - pcgrad: its projection on the reference is subtracted, so that it no longer pulls against it (Yu et al. 2020).
    - average: it becomes the mean of both.
    - priority: it is left out.
    - keep: it stays as it is.
    """
    mine, theirs = common(gradient[:shared], reference[:shared])
    if way == PCGRAD and mine:
        torch._foreach_add_(mine, theirs, alpha=-angle.dot / (angle.reference_squared + EPSILON))
    if way == AVERAGE and mine:
        torch._foreach_lerp_(mine, theirs, 0.5)
    return way != PRIORITY


def add(total: list[Tensor | None], gradient: Gradients, share: float) -> None:
    """Add a share of a gradient to a total, in place; where the total had none the tensors of the gradient are used."""
    mine, theirs = common(total, gradient)
    if mine:
        torch._foreach_add_(mine, theirs, alpha=share)
    for index, (present, new) in enumerate(zip(total, gradient, strict=True)):
        if present is None and new is not None:
            total[index] = new.mul_(share)


def clip(gradients: Gradients, most: float) -> float:
    """Scale gradients down to a norm, in place; returns their norm before. What is not finite is left alone."""
    present = [each for each in gradients if each is not None]
    norm = math.sqrt(float(_sum(list(_squares(present).values()))))
    if norm == math.inf:
        largest = float(_largest(present))
        if math.isfinite(largest):
            torch._foreach_mul_(present, most / largest)
            clip(present, most)
            return norm
    if norm > most and math.isfinite(norm):
        torch._foreach_mul_(present, most / (norm + 1e-6))
    return norm


def common(one: Gradients, other: Gradients) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of both where both have one."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _measured(gradient: Gradients, reference: Gradients, of_reference: _Squares, shared: int) -> list[Tensor]:
    squares = _squares(gradient)
    both = [place for place in squares if place in of_reference and place < shared]
    products = [_dot(*pair) for pair in zip(*common(gradient[:shared], reference[:shared]), strict=True)]
    mine, theirs = [squares[place] for place in both], [of_reference[place] for place in both]
    return [_sum(products), _sum(mine), _sum(theirs), _sum(list(squares.values()))]


def _squares(gradient: Gradients) -> _Squares:
    present = {place: each for place, each in enumerate(gradient) if each is not None}
    if not present:
        return {}
    tensors = list(present.values())
    norms = torch._foreach_norm(tensors, 2, dtype=_precision(tensors))
    return {place: norm.square() for place, norm in zip(present, norms, strict=True)}


def _dot(one: Tensor, other: Tensor) -> Tensor:
    precision = _precision([one])
    return torch.dot(one.to(precision).flatten(), other.to(precision).flatten())


def _largest(tensors: list[Tensor]) -> Tensor:
    """The largest magnitude; NaN where there is one."""
    if not tensors:
        return torch.zeros(())
    return torch.stack([each.to(tensors[0].device) for each in torch._foreach_norm(tensors, math.inf)]).max()


def _sum(numbers: list[Tensor]) -> Tensor:
    if not numbers:
        return torch.zeros(())
    # A model may be spread over devices.
    return torch.stack([number.to(numbers[0].device) for number in numbers]).sum()


def _read(numbers: list[Tensor]) -> list[float]:
    device = next((number.device for number in numbers if number.device.type != "cpu"), numbers[0].device)
    found: list[float] = torch.stack([number.to(device) for number in numbers]).tolist()
    return found


def _precision(tensors: list[Tensor]) -> torch.dtype:
    # In half precision a sum of many products loses most of them.
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32
