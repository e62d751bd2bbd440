"""Who takes part in a rollback: Tamiyo, Kasmina's seeds, and the model with all that trains it, in this order."""

from __future__ import annotations

from typing import Any, Protocol

from esper_rpc.errors import EsperError, FailedPrecondition
from esper_servers.tolaria.state.training_state import SESSION, TrainingState

from .rollback import RollbackOrder, Vote


class SeedHost(Protocol):
    """The seed host of this process."""

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise when a state cannot be restored."""
        ...

    def roll_back(self, state: dict[str, Any]) -> None:
        """Restore a state, and void what was decided since."""
        ...


class Counters(Protocol):
    """How far a session is."""

    epoch: int
    global_step: int


class Session(Counters, Protocol):
    """The session of this run."""

    @property
    def is_connected(self) -> bool:
        """Whether Tamiyo can be reached."""
        ...

    def open_again(self) -> None:
        """Have Tamiyo told of the run as it is; does not wait for it."""
        ...


class TamiyoParticipant:
    """Tamiyo holds no part of the model, so it has no veto: its vote says whether it will hear of the rollback.

    The seed host's new challenge voids all that it decided before. It learns of the run as it is when the run is opened
    again, for which nobody waits; and begins a new memory of it, since what it observed is of a future that is gone.
    """

    name = "tamiyo"

    def __init__(self, session: Session) -> None:
        self._session = session

    def prepare(self, order: RollbackOrder) -> Vote:
        """Agree, or be absent."""
        is_connected = self._session.is_connected
        return Vote(self.name, is_connected, is_absent=not is_connected)

    def commit(self, order: RollbackOrder) -> None:
        """Do nothing: it has nothing to go back with."""

    def confirm(self, order: RollbackOrder) -> None:
        """Have the run opened again."""
        self._session.open_again()

    def abort(self) -> None:
        """Do nothing."""


class SeedHostParticipant:
    """Kasmina: seeds, their optimizers and their places in the user's optimizer; and the counters of the session."""

    name = "kasmina"

    def __init__(self, session: Counters, host: SeedHost) -> None:
        self._session = session
        self._host = host

    def prepare(self, order: RollbackOrder) -> Vote:
        """Agree when every seed can be restored."""
        try:
            self._host.check_state(order.state[SESSION]["host"])
        except EsperError as error:
            return Vote(self.name, False, reason=error.message)
        return Vote(self.name, True)

    def commit(self, order: RollbackOrder) -> None:
        """Restore them."""
        state = order.state[SESSION]
        self._host.roll_back(state["host"])
        self._session.epoch, self._session.global_step = state["epoch"], state["global_step"]

    def confirm(self, order: RollbackOrder) -> None:
        """Raise FailedPrecondition when the session is at another step."""
        if self._session.global_step != order.step:
            raise FailedPrecondition(f"The session is at step {self._session.global_step}, not {order.step}.")

    def abort(self) -> None:
        """Do nothing: nothing was kept of the order."""


class TrainingParticipant:
    """Model, optimizer, random numbers and what else was registered.

    It follows the seed host, which gives the optimizer the groups of then.
    """

    name = "tolaria"

    def __init__(self, state: TrainingState) -> None:
        self._state = state

    def prepare(self, order: RollbackOrder) -> Vote:
        """Agree when the checkpoint is of this model and these parts."""
        try:
            self._state.check(order.state)
        except EsperError as error:
            return Vote(self.name, False, reason=error.message)
        return Vote(self.name, True)

    def commit(self, order: RollbackOrder) -> None:
        """Restore them."""
        self._state.restore(order.state, without=frozenset({SESSION}))

    def confirm(self, order: RollbackOrder) -> None:
        """Raise FailedPrecondition when the model does not fit the checkpoint after all."""
        self._state.check(order.state)

    def abort(self) -> None:
        """Do nothing: nothing was kept of the order."""
