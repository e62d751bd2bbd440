from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from torch import Tensor

from esper_rpc.config import Range, validate
from esper_rpc.errors import InvalidRequest
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage

FINE_TUNING_WEIGHT: Final = 1.0
"""Of a seed that fine-tunes, in whichever stage."""
GRAFTING_TEMPERATURE: Final = 2.0
# The table of requirements 3.5. It has older names of stages: grafting is BLENDING (its weight is alpha, below),
# stabilization SHADOWING, evaluating PROBATIONARY. Stages that it lacks hold no seed that could learn.
_WEIGHTS: Mapping[Stage.ValueType, float] = {
    Stage.SEED_LIFECYCLE_STAGE_GERMINATED: 0.01,
    Stage.SEED_LIFECYCLE_STAGE_TRAINING: 0.1,
    Stage.SEED_LIFECYCLE_STAGE_SHADOWING: 0.5,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedLoss:
    """A loss that is a seed's own, in addition to that of the model."""

    loss: Tensor
    stage: Stage.ValueType
    samples: Annotated[int, Range(1, 10**12)]
    """Over how many it is a mean."""
    alpha: float = 0.0
    """How far it is blended in; counts in BLENDING only."""
    is_fine_tuning: bool = False
    parameters: Sequence[Tensor] = ()
    """Those of the seed itself, if its loss is to reach them."""

    def __post_init__(self) -> None:
        validate(self)

    def share(self, host_samples: int) -> float:
        """Return how much it counts beside the loss of the model."""
        if host_samples < 1:
            raise InvalidRequest("The loss of the model must be a mean over one sample at least.")
        return weight_of(self.stage, alpha=self.alpha, is_fine_tuning=self.is_fine_tuning) * self.samples / host_samples


def weight_of(stage: Stage.ValueType, *, alpha: float = 0.0, is_fine_tuning: bool = False) -> float:
    """Return the weight of a seed's loss in its stage."""
    if is_fine_tuning:
        return FINE_TUNING_WEIGHT
    if stage == Stage.SEED_LIFECYCLE_STAGE_BLENDING:
        # In this order a NaN gives 0.
        return min(1.0, max(0.0, alpha))
    return _WEIGHTS.get(stage, 0.0)


def grafting_alpha(epoch: float, total_epochs: float, temperature: float = GRAFTING_TEMPERATURE) -> float:
    """Return the alpha of a seed whose blending is counted in epochs; Kasmina's own alpha is to be preferred."""
    if total_epochs <= 0:
        return 0.5
    x = (epoch / total_epochs - 0.5) * temperature * 2 * math.pi
    # The logistic function, written so that nothing overflows.
    return 0.5 * (1.0 + math.tanh(x / 2))


def total_loss(host_loss: Tensor, seeds: Iterable[SeedLoss], *, host_samples: int) -> Tensor:
    """Return the loss of the model plus that of each seed by its share, for one backward pass and no conflicts."""
    shares = [(each.share(host_samples), each.loss) for each in seeds]
    return host_loss + sum(share * loss for share, loss in shares if share)
