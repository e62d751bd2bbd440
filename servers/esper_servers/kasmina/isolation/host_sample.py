"""The norm of the host's gradient, from a sample that costs the same at any size of model."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .spans import extent_of

BLOCKS = 64
BLOCK = 2048
"""Elements."""
_SEED = 0x15041


class _Block(NamedTuple):
    parameter: Tensor
    first: int
    last: int


class HostSample:
    """Blocks of parameters, spread evenly over all elements; the whole of a model that is no larger."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._total = sum(parameter.numel() for parameter in self._parameters)
        is_small = self._total <= BLOCKS * BLOCK
        self._blocks = list(_whole(self._parameters) if is_small else _spread(self._parameters, self._total))
        self._sampled = sum(block.last - block.first for block in self._blocks)

    def norm(self) -> Tensor | None:
        """Estimate the norm of the gradient that is there now, on its device; None where there is none."""
        parts = [part for block in self._blocks if (part := _gradient_of(block)) is not None]
        if not parts:
            return None
        norms = [norm.to(parts[0].device) for norm in torch._foreach_norm(parts, 2, torch.float32)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms)) * (self._total / self._sampled) ** 0.5
        return norm


def _gradient_of(block: _Block) -> Tensor | None:
    gradient = block.parameter.grad
    if gradient is None or gradient.layout != torch.strided or extent_of(gradient) != gradient.numel():
        return None
    return gradient.as_strided((block.last - block.first,), (1,), gradient.storage_offset() + block.first)


def _whole(parameters: Iterable[Tensor]) -> Iterator[_Block]:
    for parameter in parameters:
        yield _Block(parameter, 0, parameter.numel())


def _spread(parameters: Iterable[Tensor], total: int) -> Iterator[_Block]:
    """One block somewhere in each of as many equal parts; it ends with the parameter in which it begins."""
    drawn = random.Random(_SEED)  # noqa: S311  # Not for secrets.
    share = total // BLOCKS
    starts = [part * share + drawn.randrange(share) for part in range(BLOCKS)]
    begins = 0
    for parameter in parameters:
        ends = begins + parameter.numel()
        while starts and starts[0] < ends:
            first = starts.pop(0) - begins
            yield _Block(parameter, first, min(first + BLOCK, parameter.numel()))
        begins = ends
