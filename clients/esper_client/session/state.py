from __future__ import annotations

from typing import Any, Protocol

from esper_rpc.errors import InvalidRequest


class Keeper(Protocol):
    """What holds the part of a session's state that is not numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Counting(Protocol):
    """A session, as far as it counts."""

    epoch: int
    global_step: int


def write_state(session: Counting, host: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint must hold beside the model and its optimizer."""
    return {"epoch": session.epoch, "global_step": session.global_step, "host": host}


def read_state(session: Counting, host: Keeper, state: dict[str, Any]) -> None:
    """Restore what `write_state` returned; an empty state is that of a new run. All or nothing.

    Raises:
        InvalidRequest: When it is something else.
    """
    if not isinstance(state, dict) or (state and state.keys() != {"epoch", "global_step", "host"}):
        raise InvalidRequest("This is no state of a session: give what its `state_dict` returned.")
    if state:
        host.load_state_dict(state["host"])
        session.epoch, session.global_step = state["epoch"], state["global_step"]
