"""Reading, comparing and writing the learning rate of a group, which may be a number or a tensor."""

from __future__ import annotations

import math
from typing import Any, Final

from torch import Tensor

ABSOLUTE_TOLERANCE: Final = 1e-12
RELATIVE_TOLERANCE: Final = 1e-6


def read(group: dict[str, Any]) -> float:
    """Return the rate; NaN where there is none."""
    try:
        return float(group["lr"])
    except (KeyError, TypeError, ValueError):
        return float("nan")


def write(group: dict[str, Any], rate: float) -> None:
    """Set the rate; a tensor stays the same tensor, which a captured graph may read."""
    if isinstance(group.get("lr"), Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def is_same(one: float, other: float) -> bool:
    """Whether two rates differ by no more than rounding does (invariant L3 of requirements 3.5)."""
    tolerance = max(ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE * max(abs(one), abs(other)))
    # Written so that what is no finite number differs from everything.
    return abs(one - other) <= tolerance < math.inf
