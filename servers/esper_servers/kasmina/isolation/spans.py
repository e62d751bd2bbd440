"""Where tensors lie, and which lie on each other."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


class Span(NamedTuple):
    """Addresses, the last one excluded. One and the same memory is at one address, whatever tensor shows it."""

    start: int
    end: int


def extent_of(tensor: Tensor) -> int:
    """Return how many elements lie from the first to the last of a tensor, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def address_of(tensor: Tensor) -> int:
    """Return where a tensor begins, 0 when it has no address."""
    return tensor.data_ptr() if _has_address(tensor) else 0


def span_of(tensor: Tensor) -> Span | None:
    """Return where a tensor lies, None when it takes no memory."""
    if not _has_address(tensor) or tensor.is_meta or not tensor.numel():
        return None
    start = tensor.data_ptr()
    return Span(start, start + extent_of(tensor) * tensor.element_size())


class MemoryMap:
    """Tensors by where they lie. Asking costs a search, however many there are."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if _has_address(tensor)]
        self._addresses = _addresses_of(self._tensors)
        known = [(span, tensor) for tensor in self._tensors if (span := span_of(tensor)) is not None]
        self._known = sorted(known, key=lambda each: each[0])
        self._starts = [span.start for span, _ in self._known]
        self._longest = max((span.end - span.start for span, _ in self._known), default=0)

    @property
    def is_current(self) -> bool:
        """Whether each lies where it lay."""
        return _addresses_of(self._tensors) == self._addresses

    def over(self, span: Span) -> Iterator[Tensor]:
        """Yield the tensors that lie in a part of a span."""
        first = bisect.bisect_right(self._starts, span.start - self._longest)
        for known, tensor in self._known[first : bisect.bisect_left(self._starts, span.end)]:
            if known.end > span.start:
                yield tensor


def _has_address(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.layout == torch.strided


def _addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
