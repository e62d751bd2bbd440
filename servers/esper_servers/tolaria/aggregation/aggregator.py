from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from torch import Tensor

from esper_rpc.config import Range, validate
from esper_rpc.errors import ConfigError, InvalidRequest

from . import conflicts
from .conflict_rate import ConflictRate
from .conflicts import Gradients
from .dropped import Dropped

SEED = "seed"


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregationConfig:
    """When gradients conflict, what is done then, and how long a gradient may be."""

    conflict: str = conflicts.PCGRAD
    threshold: Annotated[float, Range(-1.0, 1.0)] = -0.5
    """The cosine below which a gradient is in conflict."""
    max_norm: Annotated[float, Range(1e-6, 1e12)] = 10.0

    def __post_init__(self) -> None:
        validate(self)
        if self.conflict not in conflicts.WAYS:
            raise ConfigError(f"conflict = {self.conflict!r} is none of {', '.join(conflicts.WAYS)}.")


class SeedGradients(NamedTuple):
    """The gradients of a seed's loss, and how much they count."""

    gradients: Gradients
    share: float


class Aggregated(NamedTuple):
    """What came of several gradients."""

    gradients: list[Tensor | None]
    conflicts: tuple[str, ...] = ()
    """Who was in conflict."""
    dropped: tuple[str, ...] = ()
    """Whose gradients were not finite, and left out."""
    norm: float = 0.0
    """Before it was limited."""


class GradientAggregator:
    """Adds the gradients of seeds to that of the model, and knows how often they conflict.

    Each seed is compared with the gradient of the model alone, in the order of their identifiers, so that the same
    gradients give the same sum bit for bit however they are handed over.
    """

    def __init__(self, config: AggregationConfig | None = None) -> None:
        self.config = config or AggregationConfig()
        self.rate = ConflictRate(SEED)
        self._dropped = Dropped(SEED)

    def combine(self, host: Gradients, seeds: Mapping[str, SeedGradients], *, shared: int | None = None) -> Aggregated:
        """Add the gradients of seeds to that of the model. All tensors that are given are taken over and changed.

        Only the first `shared` parameters are compared and limited; behind them stand those that are a seed's own.
        A gradient of the model that is not finite comes back as it is, for whoever scales losses to see.

        Raises:
            InvalidRequest: When the lists are of different lengths, or a gradient is sparse.
        """
        shared = len(host) if shared is None else shared
        names = sorted(name for name, seed in seeds.items() if seed.share)
        given = {name: list(seeds[name].gradients) for name in names}
        check(host, *given.values())
        angles, is_finite = conflicts.angles(list(given.values()), host, shared=shared)
        total, lying = list(host), dict(zip(names, angles, strict=True))
        if not is_finite:
            return Aggregated(total, norm=math.nan)
        dropped = [name for name in names if not lying[name].is_finite]
        opposed = [n for n in names if lying[n].is_finite and lying[n].cosine < self.config.threshold]
        # All are settled before any is added: the gradient of the model is the measure of each.
        way = self.config.conflict
        overruled = [n for n in opposed if not conflicts.settle(way, given[n], host, lying[n], shared=shared)]
        for name in names:
            if name not in dropped and name not in overruled:
                conflicts.add(total, given[name], seeds[name].share)
        self.rate.note(len(opposed), len(names) - len(dropped))
        self._dropped.note(names, dropped)
        norm = conflicts.clip(total[:shared], self.config.max_norm)
        return Aggregated(total, tuple(opposed), tuple(dropped), norm)


def check(*gradients: Gradients) -> None:
    """Raise InvalidRequest unless lists of gradients belong to the same parameters and are dense."""
    if len({len(each) for each in gradients}) > 1:
        raise InvalidRequest("Every list of gradients has one entry for each parameter.")
    if any(each is not None and each.is_sparse for row in gradients for each in row):
        raise InvalidRequest("A sparse gradient cannot be compared: make its embedding with sparse=False.")
