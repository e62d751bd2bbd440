from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from esper_rpc.proto.leyline.v1 import MetricPoint

NAME: Final = "tolaria.grad_agg.seed.layer_norm"
MOST_SEEDS: Final = 4
"""Of more seeds nothing is told, so that there is a bound on what a step has to say."""


class SeedGradients(NamedTuple):
    """The gradients of a seed that grows, by the names of its parameters."""

    seed_id: str
    stage: str
    gradients: Sequence[tuple[str, Tensor]]


class Seeds(Protocol):
    """The seeds of a run that grow."""

    def growing(self) -> Sequence[SeedGradients]:
        """Return them, and what gradients they have at present."""
        ...


class LayerNorm(NamedTuple):
    """The norm of the gradient of one layer of a seed."""

    seed_id: str
    stage: str
    layer: str
    norm: float


def layer_norms(seeds: Iterable[SeedGradients], *, top: int) -> list[LayerNorm]:
    """Return the `top` largest norms of each of the first seeds, the largest first. Waits for the device."""
    return [norm for seed in list(seeds)[:MOST_SEEDS] for norm in _of(seed)[:top]]


def as_points(norms: Iterable[LayerNorm]) -> list[MetricPoint]:
    """Return them as metrics."""
    return [
        MetricPoint(
            name=NAME, value=each.norm, attributes={"seed_id": each.seed_id, "stage": each.stage, "layer": each.layer}
        )
        for each in norms
    ]


def _of(seed: SeedGradients) -> list[LayerNorm]:
    if not seed.gradients:
        return []
    squares: dict[str, float] = {}
    norms = torch._foreach_norm([gradient for _, gradient in seed.gradients])
    for (name, _), norm in zip(seed.gradients, torch.stack(list(norms)).double().tolist(), strict=True):
        layer = name.rpartition(".")[0] or name
        squares[layer] = squares.get(layer, 0.0) + norm * norm
    finite = {layer: square for layer, square in squares.items() if math.isfinite(square)}
    found = [LayerNorm(seed.seed_id, seed.stage, layer, math.sqrt(square)) for layer, square in finite.items()]
    return sorted(found, key=lambda each: (-each.norm, each.layer))
