from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from esper_rpc.errors import FailedPrecondition

from .fingerprint import fingerprint
from .rank_exchange import (
    ABORT,
    COMMIT,
    COMPARE,
    CONFIRM,
    KEEP,
    LACKING,
    PREPARE,
    READY,
    UNABLE,
    Ranks,
    collect,
    compare,
    require_all,
    send,
    unable,
)
from .rollback import RollbackOrder, Vote


class Leader(Protocol):
    """The seed host of the first rank."""

    is_heard: bool

    def order(self, order: Mapping[str, Any]) -> None:
        """Have the other ranks carry something out."""
        ...


class RanksParticipant:
    """The other ranks, in a rollback that the first one has decided. Any of them has a veto."""

    name = "ranks"

    def __init__(self, leader: Leader, ranks: Ranks, trained: Callable[[], Iterable[Tensor]]) -> None:
        """`trained` returns all that must be the same on every rank."""
        self._leader = leader
        self._ranks = ranks
        self._trained = trained
        self._is_prepared = False
        self._is_doubtful = False

    def keep(self, epoch: int, step: int) -> dict[str, Tensor]:
        """Have the others copy their state too, and return what is their own. Nothing where they do not listen."""
        if not self._leader.is_heard:
            return {}
        self._leader.order({"do": KEEP, "epoch": epoch, "step": step})
        return collect(self._ranks, b"")

    def prepare(self, order: RollbackOrder) -> Vote:
        """Agree when every rank can go back."""
        if not self._leader.is_heard:
            return Vote(self.name, False, reason="the other ranks are amid a step")
        self._is_prepared = True
        self._leader.order({"do": PREPARE, "epoch": order.epoch, "step": order.step, "tier": order.tier})
        answers = self._ranks.each(READY)
        if LACKING in answers and UNABLE not in answers:
            send(self._ranks, order.state)
            answers = self._ranks.each(READY)
        found = unable(answers)
        return Vote(self.name, not found, reason=f"rank {found} cannot go back" if found else "")

    def commit(self, order: RollbackOrder) -> None:
        """Have them go back, while this one does."""
        self._is_doubtful = True
        self._leader.order({"do": COMMIT})

    def confirm(self, order: RollbackOrder) -> None:
        """Raise FailedPrecondition when a rank is not where this one is."""
        own = fingerprint(self._trained())
        self._leader.order({"do": CONFIRM})
        if set(self._ranks.each(own)) != {own}:
            raise FailedPrecondition("After going back the ranks hold different weights.")
        self._is_prepared = self._is_doubtful = False

    def abort(self) -> None:
        """Have them forget the order."""
        if self._is_prepared:
            self._is_prepared = False
            self._leader.order({"do": ABORT})

    def settle(self) -> None:
        """After a rollback that failed on its way: raise OutOfStep, as every rank does, unless all are alike."""
        if self._is_doubtful:
            self._is_doubtful, own = False, fingerprint(self._trained())
            self._leader.order({"do": COMPARE})
            compare(self._ranks, own)

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Hand over what this rank resumes from, outside of any step, before it does; None when it does not.

        Raises FailedPrecondition when another rank cannot.
        """
        send(self._ranks, state)
        if state is not None:
            require_all(self._ranks.each(READY))
