from __future__ import annotations

import operator
from typing import Any, Protocol

LAST_EPOCH = 2**32 - 1
"""A packet counts no further."""


class Loss(Protocol):
    """A number, or a tensor of one element."""

    def __float__(self) -> float: ...


class BadArgument(TypeError):
    """What a loop gave is no number; the message begins with what was to be one."""

    @property
    def argument(self) -> str:
        """What it was given as."""
        return str(self).split(" ", 1)[0].split("[", 1)[0]


def read_loss(loss: Loss) -> float:
    """Read a number, or a tensor of one element without its graph; raises BadArgument."""
    return read_number("loss", loss)


def read_number(name: str, value: Any) -> float:
    """Read what a step was given under a name, as `read_loss`."""
    try:
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise BadArgument(f"{name} must be a number or a tensor of one element: {error}.") from error


def read_epoch(value: Any) -> int:
    """Read the number of an epoch, as `read_loss`."""
    try:
        epoch = operator.index(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadArgument(f"epoch must be a whole number from 0 on: {error}.") from error
    if not 0 <= epoch <= LAST_EPOCH:
        raise BadArgument(f"epoch must be a whole number from 0 to {LAST_EPOCH}, not {epoch}.")
    return epoch
