"""How an action is carried out, in numbers: from the logits of the parameter head to what a command may carry."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import schema


class Parameters(NamedTuple):
    """The numbers of one action, by their names in commands and in the order of the head."""

    learning_rate_multiplier: float
    blending_schedule_start: float
    """Where blending starts and ends, as shares of the time that the host gives it."""
    blending_schedule_end: float


def read_out(logits: Iterable[float]) -> NDArray[np.float32]:
    """Bring logits into the bounds: 0 is the middle, of a multiplier 1. One that is not finite becomes NaN."""
    bounds = schema.PARAMETER_BOUNDS.items()
    values = [_between(*pair, logit, name) for (name, pair), logit in zip(bounds, logits, strict=True)]
    return np.array(values, dtype=np.float32)


def made_fit(parameters: Parameters) -> Parameters:
    """Clamp every number to its bounds and put the ends of the schedule in order, whatever they were."""
    each = zip(parameters, schema.PARAMETER_BOUNDS.values(), strict=True)
    multiplier, *window = (min(most, max(least, value)) for value, (least, most) in each)
    return Parameters(multiplier, *sorted(window))


def _between(least: float, most: float, logit: float, name: str) -> float:
    if not math.isfinite(logit):
        return math.nan  # A sigmoid would hide the overflow.
    share = (1 + math.tanh(logit / 2)) / 2
    # What multiplies is drawn as often below 1 as above.
    return least * (most / least) ** share if name in schema.MULTIPLIERS else least + (most - least) * share
