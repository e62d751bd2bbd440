"""Random projections of gradients, keyed by the memory of the parameter that a gradient belongs to."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from .spans import extent_of

WINDOW = 2**18
"""Elements of a parameter that are projected in one step."""
BUCKETS = 1024
"""The projected dot product is off by about sqrt(2 / BUCKETS) of the product of both norms."""
_SEED = 0x15041


class Projection:
    """What has been added to the gradient of one place in memory, as a few numbers that outlive the gradient.

    Each element gets a random sign by its place and is added to one of the buckets, so that the dot product of two
    projections of the same place is, on average, that of the gradients. Up to BUCKETS elements it is exact.
    """

    def __init__(self, extent: int) -> None:
        """Project what lies in so many elements; of more than a window, one window after the other."""
        self._extent = extent
        self._first = 0
        self._sum: Tensor | None = None

    @property
    def window(self) -> tuple[int, int]:
        """From where to where what is added counts at present."""
        return self._first, min(self._first + WINDOW, self._extent)

    def add(self, flat: Tensor, at: int) -> None:
        """Add elements that lie `at` so many behind the beginning; those that lie elsewhere are left out."""
        first, last = self.window
        low, high = max(at, first), min(at + len(flat), last)
        if low >= high:
            return
        signs = _signs(flat.device)[low - self._first : high - self._first]
        signed = flat[low - at : high - at].float() * signs
        # A bucket holds every so manyth place of the window.
        whole = functional.pad(signed, ((low - self._first) % BUCKETS, (self._first - high) % BUCKETS))
        added = whole.view(-1, BUCKETS).sum(0)
        self._sum = added if self._sum is None else self._sum + added

    def take(self) -> Tensor | None:
        """Return what was added since the last call, None when nothing was; the window moves on."""
        taken, self._sum = self._sum, None
        self._first = self._first + WINDOW if self._first + WINDOW < self._extent else 0
        return taken


def as_it_lies(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient in the order in which its parameter lies in memory, with zeros in the gaps."""
    gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
    extent = extent_of(parameter)
    if gradient.stride() == parameter.stride() and extent == parameter.numel():
        return gradient.as_strided((extent,), (1,), gradient.storage_offset())
    flat = gradient.new_zeros(extent)
    flat.as_strided(parameter.shape, parameter.stride()).copy_(gradient)
    return flat


def part_as_it_lies(gradient: Tensor, parameter: Tensor, first: int, last: int) -> tuple[Tensor, int]:
    """Return at least what lies from one place to another, and where that begins: a copy costs what it holds."""
    if parameter.dim() < 2 or not parameter.is_contiguous() or gradient.layout != torch.strided:
        return as_it_lies(gradient, parameter), 0
    row = parameter.numel() // len(parameter)
    begin, end = max(first, 0) // row, max(-(-last // row), 0)
    return gradient[begin:end].reshape(-1), begin * row


@cache
def _signs(device: torch.device) -> Tensor:
    # A generator of its own: that of the user must not move.
    drawn = torch.randint(0, 2, (WINDOW,), generator=torch.Generator().manual_seed(_SEED))
    return (2.0 * drawn - 1.0).to(device)
