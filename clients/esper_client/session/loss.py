from __future__ import annotations

from typing import Any, Protocol


class Loss(Protocol):
    """A number, or a tensor of one element."""

    def __float__(self) -> float: ...


class BadArgument(TypeError):
    """What a loop gave a step is no number; the message says what was to be one."""


def read_loss(loss: Loss) -> float:
    """Read a number, or a tensor of one element without its graph; raises BadArgument."""
    return read_number("loss", loss)


def read_number(name: str, value: Any) -> float:
    """Read what a step was given under a name, as `read_loss`."""
    try:
        return float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise BadArgument(f"{name} must be a number or a tensor of one element: {error}.") from error
